import json
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import build_unet
from hub_server import serve
from safetensors.torch import load_file
from torch import nn

from cm_diffusers import ConsistencyConfig, ConsistencyPipeline, ConsistencyScheduler, ConsistencyTrainer
from cm_diffusers.cli import main
from cm_diffusers.hub import render_card
from cm_diffusers.training.record import public_name

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
DATA = "a folder | of <b>images ![t](x) **"
DATA_SHOWN = r"| data | a folder \| of &lt;b&gt;images \!\[t\](x) \*\*, 40 images |"


class Corners(nn.Module):
    def forward(self, images):
        return images[..., :2, :2].float().flatten(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student with everything: a teacher with a licence, a record, samples and an evaluation."""
    root = tmp_path_factory.mktemp("card")
    teacher = root / "teacher"
    diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(teacher)
    (teacher / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n<script>alert(1)</script>\n")
    AcceleratorState._reset_state(reset_partial_state=True)
    config = ConsistencyConfig(
        teacher=str(teacher), distance="pseudo_huber", num_levels=5, batch_size=8, max_train_steps=4, dataset=DATA,
        conversion_steps=2, teacher_check=False, output_dir=str(root / "run"), tracker="none", sample_steps=0,
        num_samples=4,
    )  # fmt: skip
    ConsistencyTrainer(config, train_dataset=IMAGES).train()
    images = root / "images"
    images.mkdir()
    from PIL import Image

    for index, pixels in enumerate(((IMAGES + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(images / f"{index}.png")
    main(["evaluate", str(root / "run"), "--dataset", str(images), "--features", "test_card:Corners", "--num_images",
          "8", "--nfes", "1", "2", "--teacher", str(teacher), "--teacher_nfes", "5", "--output_dir",
          str(root / "run" / "evaluation")])  # fmt: skip
    return root / "run"


def metadata(card):
    return yaml.safe_load(str(card).split("---")[1])


def test_the_hub_client_validates_it(run, tmp_path, monkeypatch):
    with serve(tmp_path) as endpoint:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        render_card(run, "me/student").validate()
        with pytest.raises(ValueError, match="More Information Needed"):
            huggingface_hub.ModelCard("---\nlicense: mit\n---\nMore Information Needed").validate()


def test_it_says_what_happened(run):
    text = str(render_card(run, "me/student"))
    for fact in (
        "# student", "images of 8 × 8 pixels", "![Samples in one step](samples.png)", "| method | cd |",
        "| source | teacher |", "| solver | heun |", "| target | ema |", "| distance | pseudo\\_huber |",
        "| weighting | uniform |", "| num levels | 5 |", "| steps | 4 |", "| steps of conversion before | 2 |",
        "| images seen | 48 |", "Teacher: `teacher`, under a `DDPMScheduler`", "CPU, precision no", "| FID ↓ |",
        "| student | multistep consistency | 2 |", "| teacher | Heun, sigma 0.01 to 80 | 5 |",
        "8 images (3 x 8 x 8, 8 bits) against 40",
        "## Limitations", "2 steps at σ = 80, ", "`cc-by-4.0`, that of its teacher", "@inproceedings{song2023",
    ):  # fmt: skip
        assert fact in text, fact
    for nothing in (str(run.parent), "More Information Needed", "None", "nan", "<script", "<b>"):
        assert nothing not in text
    assert DATA_SHOWN in text


def test_its_metadata_are_for_machines(run):
    values = metadata(render_card(run, "me/student"))
    assert values["license"] == "cc-by-4.0"
    assert values["library_name"] == "diffusers"
    assert values["pipeline_tag"] == "unconditional-image-generation"
    assert {"consistency-models", "one-step", "distillation"} <= set(values["tags"])
    (picture,) = values["widget"]
    assert (run / picture["output"]["url"]).is_file()
    (model,) = values["model-index"]
    names = {metric["name"] for result in model["results"] for metric in result["metrics"]}
    assert {"FID, 1 NFE", "FID, 2 NFE", "KID, 1 NFE"} <= names


@pytest.mark.parametrize("stock", [True, False])
def test_both_ways_of_loading_are_shown_as_they_are(stock, tmp_path):
    teacher = diffusers.EDMEulerScheduler() if stock else diffusers.DDPMScheduler(prediction_type="v_prediction")
    scheduler = ConsistencyScheduler.from_teacher(teacher, **({"family": "consistency"} if stock else {}))
    ConsistencyPipeline(build_unet(num_class_embeds=3), scheduler).save_pretrained(tmp_path)
    text = str(render_card(tmp_path, "me/student"))
    assert 'ConsistencyPipeline.from_pretrained("me/student")' in text
    assert ('DiffusionPipeline.from_pretrained("me/student")' in text) == stock
    assert ('UNet2DModel.from_pretrained("me/student", subfolder="unet")' in text) != stock
    assert "pipe(class_labels=0, num_inference_steps=1)" in text
    assert "of 3 classes" in text
    # What is not known is not said.
    assert "## Training" not in text and "## Evaluation" not in text and "Its quality has not been measured" in text
    for code in text.split("```python\n")[1:]:
        compile(code.split("```")[0], "card", "exec")


def test_a_teacher_and_data_of_the_hub_are_linked(run, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(run, folder)
    record = json.loads((folder / "training.json").read_text())
    record["teacher"] = {"name": "google/ddpm-cifar10-32", "scheduler": "DDPMScheduler", "license": None}
    record["dataset"] = {"name": "uoft-cs/cifar10", "rows": 50_000}
    (folder / "training.json").write_text(json.dumps(record))
    card = render_card(folder, "me/student")
    assert metadata(card)["base_model"] == "google/ddpm-cifar10-32"
    assert metadata(card)["datasets"] == ["uoft-cs/cifar10"]
    assert "license" not in metadata(card)
    assert "which states none" in str(card)
    assert "[uoft-cs/cifar10](https://huggingface.co/datasets/uoft-cs/cifar10), 50,000 images" in str(card)


@pytest.mark.parametrize("name", ["training.json", "evaluation/report.json", "model_index.json"])
def test_a_damaged_file_is_named(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "student")
    (tmp_path / "student" / name).write_text("{")
    with pytest.raises(ValueError, match="student"):
        render_card(tmp_path / "student", "me/student")


@pytest.fixture
def student(run, tmp_path):
    """A copy of the student, to be changed."""
    return shutil.copytree(run, tmp_path / "student")


def change_record(student, **changes):
    record = json.loads((student / "training.json").read_text())
    (student / "training.json").write_text(json.dumps({**record, **changes}))


def introduction(folder):
    return str(render_card(folder, "me/student")).split("# student")[1].split("##")[0]


def test_its_origin_is_what_the_record_says(student):
    assert "distilled from `teacher`: it draws" in introduction(student)
    change_record(student, method="ct", choices={"source": "data"})
    assert "trained on data from the weights of `teacher`: it draws" in introduction(student)
    assert "distillation" not in metadata(render_card(student, "me/student"))["tags"]
    change_record(student, teacher=None)
    assert "trained on data alone: it draws" in introduction(student)
    (student / "training.json").unlink()
    assert "(https://arxiv.org/abs/2303.01469): it draws" in introduction(student)
    assert "distillation" not in metadata(render_card(student, "me/student"))["tags"]


def test_nothing_is_better_without_a_measurement(student):
    assert "better" not in str(render_card(student, "me/student"))


def test_what_was_measured_while_it_trained_is_told(student):
    (protocol,) = {json.dumps(r["protocol"]) for r in json.loads((student / "evaluation/report.json").read_text())}
    shutil.rmtree(student / "evaluation")
    assert "has not been measured" in str(render_card(student, "me/student"))
    entries = [{"step": step, "nfe": nfe, "fid": step / nfe} for step in (100, 2000) for nfe in (1, 2)]
    lines = [json.dumps({**entry, "protocol": json.loads(protocol)}) for entry in entries]
    (student / "evaluation.jsonl").write_text("\n".join(lines) + "\n")
    text = str(render_card(student, "me/student"))
    assert "While it trained, at step 2,000: FID ↓ 2000 at 1 NFE; FID ↓ 1000 at 2 NFE. 8 images" in text
    assert "has not been measured" not in text
    (student / "evaluation.jsonl").write_text('{"fid": 1}\n')
    with pytest.raises(ValueError, match="evaluation.jsonl holds no evaluation"):
        render_card(student, "me/student")


@pytest.mark.parametrize("file", ["evaluation.jsonl", "evaluation.json"])
def test_figures_that_are_none_are_named(student, file):
    (student / file).write_text('{"fid": 1, "step": 3}\n')
    with pytest.raises(ValueError, match=f"{file} holds no evaluation of a student: KeyError"):
        render_card(student, "me/student")


def test_an_evaluation_of_half_precision_is_shown(run, tmp_path):
    pipeline = ConsistencyPipeline.from_pretrained(run).to(dtype=torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    images = str(run.parent / "images")
    main(["evaluate", str(tmp_path), "--dataset", images, "--features", "test_card:Corners", "--num_images", "8",
          "--nfes", "1", "--output_dir", str(tmp_path / "evaluation")])  # fmt: skip
    text = str(render_card(tmp_path, "me/half"))
    assert "| FID ↓ |" in text
    assert 'ConsistencyPipeline.from_pretrained("me/half", variant="fp16")' in text
    assert 'UNet2DModel.from_pretrained("me/half", subfolder="unet", variant="fp16")' in text
    pipeline.save_pretrained(tmp_path)  # beside them, weights under the plain name
    assert "variant" not in str(render_card(tmp_path, "me/half"))


def test_levels_stored_for_a_stock_student_are_told(tmp_path):
    grid = ConsistencyScheduler(num_train_timesteps=18)
    grid.set_timesteps(timesteps=[12, 5, 0])
    stored = {"3": grid.sigmas[:3].tolist(), "2": [80.0, 1.234]}
    scheduler = ConsistencyScheduler(num_train_timesteps=18, few_step_sigmas=stored)
    ConsistencyPipeline(build_unet(), scheduler).save_pretrained(tmp_path)
    text = str(render_card(tmp_path, "me/student"))
    unknown = "cm_diffusers takes stored levels, unknown to stock diffusers"
    assert f"In 2 steps {unknown}: it draws other images." in text
    assert f"In 3 steps {unknown}: pass it `timesteps=[12, 5, 0]` for the same images." in text


def test_a_teacher_s_name_is_no_markup(student):
    change_record(student, teacher={"name": "x` ![t](y) `", "scheduler": "S` <b>", "license": None})
    text = str(render_card(student, "me/student"))
    assert "distilled from `x' ![t](y) '`" in text
    assert "Teacher: `x' ![t](y) '`, under a `S' <b>`." in text


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("google/ddpm-cifar10-32", "google/ddpm-cifar10-32"), ("cifar10", "cifar10"), (None, None),
        ("/home/me/secret/teacher", "teacher"), ("../secret/data/", "data"),
        ("https://host/secret/data.tar?token=abc", "data.tar"),
    ],
)  # fmt: skip
def test_only_a_hub_id_is_public_as_a_whole(source, name):
    assert public_name(source) == name


def test_all_weights_that_are_saved_are_counted(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    config = ConsistencyConfig(
        distance="pseudo_huber", num_levels=5, batch_size=8, max_train_steps=4, conversion_steps=0, num_samples=1,
        teacher_check=False, output_dir=str(tmp_path), tracker="none", sample_steps=0,
    )  # fmt: skip
    trainer = ConsistencyTrainer(config, teacher=(build_unet(), diffusers.DDPMScheduler()), train_dataset=IMAGES)
    pipeline = trainer.pipeline()
    for weight in trainer.unet.parameters():  # as where they are in parts, on other processes
        weight.data = weight.data.new_empty(0)
    trainer.save(pipeline)
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["parameters"] == sum(weight.numel() for weight in saved.values())
