"""Students to a real HTTP hub on loopback, and back."""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import wait
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_unet
from hub_server import connected

from cm_diffusers import ConsistencyConfig, ConsistencyPipeline, ConsistencyScheduler, ConsistencyTrainer
from cm_diffusers.cli import main
from cm_diffusers.hub import export_to_diffusers, push, push_to_hub, render_card
from cm_diffusers.hub.push import PushError
from cm_diffusers.pipelines.weights import load_weights

IMAGES = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's address and state."""
    with connected(tmp_path / "hub", monkeypatch) as found:
        yield found


def make_student(folder, stock=False, seed=0):
    teacher = diffusers.EDMEulerScheduler() if stock else diffusers.DDPMScheduler(prediction_type="v_prediction")
    family = {"family": "consistency"} if stock else {}
    scheduler = ConsistencyScheduler.from_teacher(teacher, **family)
    ConsistencyPipeline(build_unet(seed), scheduler).save_pretrained(folder)
    return folder


def load_elsewhere(code, endpoint, home):
    """The output of code in a process that knows nothing but the hub."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        env.pop(name, None)
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


SAMPLE = (
    "import torch\nnoise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
    "print(float(pipe(latents=noise, num_inference_steps=1, output_type='pt').images.double().sum()))"
)
OURS = "from cm_diffusers import ConsistencyPipeline\npipe = ConsistencyPipeline.from_pretrained('{}')\n" + SAMPLE
STOCK = (
    "import sys\nsys.modules['cm_diffusers'] = None\nfrom diffusers import DiffusionPipeline\n"
    "pipe = DiffusionPipeline.from_pretrained('{}')\nassert type(pipe).__name__ == 'ConsistencyModelPipeline'\n"
    "import torch\nnoise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
    "images = pipe(latents=noise, num_inference_steps=1, output_type='np').images\n"
    "print(float(torch.as_tensor(images).double().sum()))"
)


def test_a_student_comes_back_with_our_classes(hub, tmp_path):
    endpoint, state = hub
    folder = make_student(tmp_path / "student")
    address = push_to_hub(folder, "me/student")
    assert address.startswith(f"{endpoint}/me/student/commit/")
    assert state.commits == [("me/student", "main", "Upload student")]
    here = ConsistencyPipeline.from_pretrained(folder)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = float(here(latents=noise, output_type="pt").images.double().sum())
    assert float(load_elsewhere(OURS.format("me/student"), endpoint, tmp_path)) == pytest.approx(expected, rel=1e-6)


COMMANDS = """
from PIL import Image
from cm_diffusers.cli import main
from cm_diffusers.evaluation.classifier import DomainClassifier
[Image.new("RGB", (8, 8), (50 * i, 9, 9)).save(f"{place}/{i}.png") for i in range(4)]
DomainClassifier(3, 8, 2, width=8).save(place + "/classifier")
main(["sample", student, *pinned, "--num_images", "1", "--output_dir", place + "/samples"])
main(["edit", "denoise", student, *pinned, place + "/0.png", "--output_dir", place + "/edits"])
main(["export", student, *pinned, place + "/export"])
main(["evaluate", student, *pinned, "--dataset", place, "--data_files", "*.png", "--nfes", "1", "--num_images", "2",
      "--features", place + "/classifier", "--output_dir", place + "/evaluation"])
"""


def test_commands_take_the_revision_that_is_named(hub, tmp_path):
    endpoint, _ = hub
    folders = [make_student(tmp_path / name, stock=True, seed=seed) for seed, name in enumerate(("old", "new"))]
    push_to_hub(folders[0], "me/student")
    push_to_hub(folders[1], "me/student", revision="v2")

    def run(name, student, *pinned):
        place = tmp_path / name
        place.mkdir()
        begin = f"place, student, pinned = {str(place)!r}, {str(student)!r}, {list(pinned)}"
        load_elsewhere(begin + COMMANDS, endpoint, tmp_path / "home")
        (figure,) = json.loads((place / "evaluation" / "report.json").read_text())
        files = ("samples/00000.png", "edits/0-00.png", "export/unet/diffusion_pytorch_model.safetensors")
        return [figure["weights"], *((place / file).read_bytes() for file in files)]

    assert run("here", folders[1]) == run("there", "me/student", "--revision", "v2") != run("main", "me/student")


def test_a_stock_student_comes_back_without_our_classes(hub, tmp_path):
    endpoint, _ = hub
    push_to_hub(make_student(tmp_path / "student", stock=True), "me/stock")
    ours = float(load_elsewhere(OURS.format("me/stock"), endpoint, tmp_path))
    assert float(load_elsewhere(STOCK.format("me/stock"), endpoint, tmp_path)) == pytest.approx(ours, rel=1e-6)


def snippets(card):
    """The code of a card, with the noise of a seed, and what it draws."""
    codes = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    seeded = [code.replace("image = pipe(", "torch.manual_seed(0)\nimage = pipe(") for code in codes]
    return [f"import numpy, torch\n{code}print(float(numpy.asarray(image, float).sum()))" for code in seeded]


def first_image(folder):
    """The sum of the same image, drawn here in one step."""
    pipe = load_weights(ConsistencyPipeline, str(folder))
    return float(np.asarray(pipe(generator=torch.manual_seed(0)).images[0], float).sum())


def test_an_export_comes_back_as_its_card_says(hub, tmp_path):
    endpoint, state = hub
    scheduler = ConsistencyScheduler.from_teacher(diffusers.DDPMScheduler(), boundary="lcm")
    pipeline = ConsistencyPipeline(build_unet(), scheduler)
    pipeline.save_pretrained(tmp_path / "student")
    export_to_diffusers(pipeline, tmp_path / "stock")
    push_to_hub(tmp_path / "stock", "me/stock")
    card = (state.root / "me/stock/README.md").read_text()
    assert "ConsistencyPipeline.from" not in card and "does not load" not in card
    assert "Always pass `num_inference_steps`, at most 50:" in card
    (code,) = snippets(card)
    alone = "import sys\nsys.modules['cm_diffusers'] = None\n" + code
    found = float(load_elsewhere(alone, endpoint, tmp_path / "home"))
    assert found == pytest.approx(first_image(tmp_path / "student"), rel=1e-3)  # an epsilon times 157, in 8 bits


def test_a_pipeline_of_a_diffusion_model_is_no_student(hub, tmp_path):
    _, state = hub
    diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="A student's scheduler is made by"):
        push_to_hub(tmp_path / "teacher", "me/teacher")
    assert state.commits == []


@pytest.mark.parametrize("stock", [True, False])
def test_half_the_precision_comes_back_as_its_card_says(hub, tmp_path, stock):
    endpoint, state = hub
    pipeline = ConsistencyPipeline.from_pretrained(make_student(tmp_path / "student", stock))
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    push_to_hub(tmp_path / "half", "me/half")
    codes = [code for code in snippets((state.root / "me/half/README.md").read_text()) if "pipe = " in code]
    assert len(codes) == 1 + stock
    for code in codes:
        one_step = code.replace("num_inference_steps=2", "num_inference_steps=1")
        found = float(load_elsewhere(one_step, endpoint, tmp_path / "home"))
        assert found == pytest.approx(first_image(tmp_path / "half"), rel=1e-4)


def test_pushing_twice_updates(hub, tmp_path):
    _, state = hub
    folder = make_student(tmp_path / "student")
    (folder / "samples.png").write_bytes(b"pixels")
    push_to_hub(folder, "me/student")
    remote = state.root / "me" / "student"
    (remote / "notes.md").write_text("of somebody else")
    (folder / "samples.png").unlink()
    push_to_hub(folder, "me/student", commit_message="Again")
    assert [message for *_, message in state.commits] == ["Upload student", "Again"]
    # Nothing that is there is deleted.
    for name in ("samples.png", "notes.md", "unet/diffusion_pytorch_model.safetensors"):
        assert (remote / name).exists(), name


def test_names_branches_privacy_and_pull_requests(hub, tmp_path):
    _, state = hub
    folder = make_student(tmp_path / "student")
    push_to_hub(folder, "student", private=True)
    assert state.private == {"me/student"}
    push_to_hub(folder, "org/student", revision="v2")
    assert state.commits[-1][:2] == ("org/student", "v2")
    assert not (state.root / "org" / "student" / "unet").exists()
    assert push_to_hub(folder, "me/student", create_pr=True).endswith("/discussions/1")


def test_what_is_private_goes_to_no_public_repository(hub, tmp_path):
    _, state = hub
    folder = make_student(tmp_path / "student")
    push_to_hub(folder, "me/student")
    with pytest.raises(PushError, match="me/student is public"):
        push_to_hub(folder, "me/student", private=True)
    assert len(state.commits) == 1


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_wrong", "me/student", "does not know who pushes to me/student: `hf auth login`"),
        ("hf_reader", "me/student", "may not write to me/student"),
        ("hf_writer", "else/student", "may not write to else/student"),
    ],
)
def test_who_may_not_is_told(hub, tmp_path, token, repo, message):
    _, state = hub
    (state.root / repo).mkdir(parents=True)
    folder = make_student(tmp_path / "student")
    with pytest.raises(PushError, match=message):
        push_to_hub(folder, repo, token=token)
    assert state.commits == []
    with pytest.raises(SystemExit, match=f"cm-diffusers push: error: .*{message}"):
        main(["push", str(folder), repo, "--token", token])


@pytest.mark.parametrize("pattern", ["/api/repos/create", "/lfs/", "/preupload/", "/commit/"])
def test_a_connection_that_breaks_is_tried_again(hub, tmp_path, pattern):
    _, state = hub
    state.drop.append(pattern)
    push_to_hub(make_student(tmp_path / "student"), "me/student")
    assert state.drop == []
    assert len(state.commits) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_busy_is_asked_again(hub, tmp_path, status):
    _, state = hub
    state.refuse += [("/api/repos/create", status)] * 2
    push_to_hub(make_student(tmp_path / "student"), "me/student")
    assert state.refuse == []
    assert len(state.commits) == 1


@pytest.fixture
def impatient(monkeypatch):
    """The client itself tries large files again, and waits for seconds in between."""
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)


def test_large_files_that_fail_are_tried_again(hub, tmp_path, impatient):
    _, state = hub
    state.refuse += [("^/lfs/", 503)] * 7  # one more than the client itself tries
    push_to_hub(make_student(tmp_path / "student"), "me/student")
    assert state.refuse == []
    assert len(state.commits) == 1


def test_large_files_that_go_on_failing_are_a_clear_error(hub, tmp_path, impatient):
    _, state = hub
    state.refuse += [("^/lfs/", 503)] * 100
    with pytest.raises(PushError, match="The Hub refused me/student: .*503"):
        push_to_hub(make_student(tmp_path / "student"), "me/student")
    assert state.commits == []


def test_a_full_disk_is_not_taken_for_the_hub(hub, tmp_path, monkeypatch):
    _, state = hub
    folder = make_student(tmp_path / "student")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(push.shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        push_to_hub(folder, "me/student")
    assert "Hub" not in str(caught.value)
    assert not (state.root / "me").exists()


def test_a_rendered_card_is_rendered_anew_and_a_person_s_own_is_kept(hub, tmp_path):
    _, state = hub
    folder, remote = make_student(tmp_path / "student"), state.root / "me" / "new" / "README.md"
    render_card(folder, "me/old").save(folder / "README.md")
    push_to_hub(folder, "me/new")
    assert 'from_pretrained("me/new")' in remote.read_text() and "me/old" not in remote.read_text()
    own = "---\nlicense: mit\n---\nMy own.\n"
    (folder / "README.md").write_text(own)
    push_to_hub(folder, "me/new")
    assert remote.read_text() == own


@pytest.mark.parametrize("stock", [True, False])
def test_no_place_of_this_machine_is_published(hub, tmp_path, stock):
    _, state = hub
    folder = make_student(tmp_path / "student", stock)
    ConsistencyPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again/unet/config.json").read_text()
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/teacher"}))
    push_to_hub(folder, "me/student")
    published = json.loads((state.root / "me/student/unet/config.json").read_text())
    assert "_name_or_path" not in published
    assert published == {name: value for name, value in config.items() if name != "_name_or_path"}


def test_a_hub_that_is_gone_is_a_clear_error_and_nothing_is_lost(hub, tmp_path):
    _, state = hub
    folder = make_student(tmp_path / "student")
    before = sorted(path.name for path in folder.rglob("*"))
    state.drop += ["/api/repos/create"] * push.TRIES
    with pytest.raises(PushError, match="Nothing is lost: push again"):
        push_to_hub(folder, "me/student")
    assert sorted(path.name for path in folder.rglob("*")) == before
    push_to_hub(folder, "me/student")
    assert len(state.commits) == 1


@pytest.mark.parametrize("repo", ["a/b/c", "me/stu dent", "me/"])
def test_names_that_the_hub_does_not_allow(hub, tmp_path, repo):
    with pytest.raises(ValueError, match="is no name of a repository"):
        push_to_hub(make_student(tmp_path / "student"), repo)


def test_a_folder_without_a_student_makes_no_repository(hub, tmp_path):
    _, state = hub
    with pytest.raises(ValueError, match="holds no student"):
        push_to_hub(tmp_path, "me/student")
    assert not state.root.exists() or not (state.root / "me").exists()


# From a run


def make_trainer(folder, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "distance": "pseudo_huber", "num_levels": 5, "batch_size": 8, "max_train_steps": 6, "conversion_steps": 2,
        "teacher_check": False, "output_dir": str(folder), "tracker": "none", "sample_steps": 0, "num_samples": 4,
        "push_to_hub": True,
    }  # fmt: skip
    config = ConsistencyConfig.from_dict({**settings, **changes})
    return ConsistencyTrainer(config, teacher=(build_unet(), diffusers.DDPMScheduler()), train_dataset=IMAGES)


def test_a_run_pushes_at_its_end_and_meanwhile(hub, tmp_path):
    _, state = hub
    make_trainer(tmp_path / "my-run", hub_strategy="checkpoint", checkpoint_steps=3, hub_private_repo=True).train()
    messages = [message for *_, message in state.commits]
    assert messages[0] == "Step 3" and messages[-1] == "End of training"
    assert {repo for repo, *_ in state.commits} == {"me/my-run"} == state.private
    published = {
        str(p.relative_to(state.root / "me/my-run")) for p in (state.root / "me/my-run").rglob("*") if p.is_file()
    }
    assert published == {
        "README.md", "model_index.json", "samples.png", "training.json", "scheduler/scheduler_config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    record = json.loads((state.root / "me/my-run/training.json").read_text())
    assert (record["steps"], record["conversion_steps"], record["images"]) == (6, 2, 64)


def test_a_push_that_fails_meanwhile_does_not_end_the_run(hub, tmp_path, caplog):
    _, state = hub
    state.tokens["hf_writer"] = ()
    trainer = make_trainer(tmp_path / "run", hub_strategy="checkpoint", checkpoint_steps=3)
    with pytest.raises(PushError, match=r"The student is saved: push it with `cm-diffusers push .*run run`"):
        trainer.train()
    assert "The student of step 3 is not pushed" in caplog.text
    assert trainer.step == 8
    assert ConsistencyPipeline.from_pretrained(tmp_path / "run")


def test_a_meanwhile_push_whose_large_files_fail_is_made_up_for_at_the_end(hub, tmp_path, caplog, impatient):
    _, state = hub
    trainer = make_trainer(tmp_path / "run")
    pipeline = trainer.pipeline()
    trainer.save(pipeline)
    state.refuse += [("^/lfs/", 503)] * 100
    trainer.publisher.push_meanwhile(3)
    wait([trainer.publisher._under_way])
    assert "The student of step 3 is not pushed" in caplog.text
    state.refuse.clear()
    trainer.push_to_hub()
    assert [message for *_, message in state.commits] == ["End of training"]


@pytest.mark.parametrize("damage", ["report", "disk"])
def test_what_cannot_be_gathered_meanwhile_does_not_end_the_run(hub, tmp_path, caplog, monkeypatch, damage):
    _, state = hub
    trainer = make_trainer(tmp_path / "run")
    trainer.save(trainer.pipeline())
    staging = tmp_path / "tmp"
    staging.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(staging))
    with monkeypatch.context() as broken:
        if damage == "report":
            (tmp_path / "run/evaluation").mkdir()
            (tmp_path / "run/evaluation/report.json").write_text("[{")
        else:
            broken.setattr(push.shutil, "copy2", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        trainer.publisher.push_meanwhile(3)
        if trainer.publisher._under_way is not None:
            wait([trainer.publisher._under_way])
    assert "The student of step 3 is not pushed" in caplog.text
    assert list(staging.iterdir()) == []
    assert state.commits == []


def test_a_card_of_meanwhile_names_the_repository(hub, tmp_path):
    _, state = hub
    trainer = make_trainer(tmp_path / "run3")
    trainer.save(trainer.pipeline())
    trainer.publisher.push_meanwhile(3)
    wait([trainer.publisher._under_way])
    assert 'from_pretrained("me/run3")' in (state.root / "me/run3/README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hub_model_id": "a/b/c"}, ValueError, "'a/b/c' is no name of a repository"),
        ({"hub_token": "hf_wrong"}, PushError, "does not know who pushes to run: `hf auth login`"),
        ({"hub_token": "hf_reader"}, PushError, "may not write to run"),
    ],
)
def test_who_cannot_push_is_told_before_the_run(hub, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path / "run", **changes)


def test_a_hub_that_is_away_before_the_run_is_a_warning(hub, tmp_path, caplog):
    _, state = hub
    state.refuse += [("/api/whoami-v2", 503)] * push.TRIES
    make_trainer(tmp_path / "run")
    assert "Whether run can be pushed to is not known" in caplog.text


def test_options_without_effect_are_named(hub, tmp_path, caplog):
    make_trainer(tmp_path / "run", push_to_hub=False, hub_model_id="me/run", hub_private_repo=True)
    assert "hub_model_id, hub_private_repo: of no effect on the run without `push_to_hub`" in caplog.text
    make_trainer(tmp_path / "run", hub_strategy="checkpoint", checkpoint_steps=0)
    assert "`checkpoint_steps` is 0" in caplog.text


def test_a_student_that_cannot_be_described_is_pushed_later(hub, tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.save(trainer.pipeline())
    (tmp_path / "run/training.json").write_text("{")
    with pytest.raises(PushError, match=r"push it with `cm-diffusers push .*run run`"):
        trainer.push_to_hub()


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_token_is_written_nowhere(hub, tmp_path, tracker):
    if tracker == "tensorboard":
        pytest.importorskip("tensorboard")
    trainer = make_trainer(tmp_path / "run", hub_token="hf_writer", checkpoint_steps=4, tracker=tracker)
    trainer.train()
    assert "hf_writer" not in repr(trainer.config)
    for path in Path(tmp_path).rglob("*"):
        if path.is_file():
            assert b"hf_writer" not in path.read_bytes(), path


def test_a_pipeline_pushes_itself(hub, tmp_path):
    _, state = hub
    ConsistencyPipeline.from_pretrained(make_student(tmp_path / "student")).push_to_hub("me/own", private=True)
    assert (state.root / "me/own/model_index.json").exists()
    assert state.private == {"me/own"}


def test_the_command_pushes_or_shows_the_card(hub, tmp_path, capsys):
    _, state = hub
    folder = make_student(tmp_path / "student")
    main(["push", str(folder), "me/student", "--dry_run"])
    assert capsys.readouterr().out.strip() == str(render_card(folder, "me/student")).strip()
    assert state.commits == []
    main(["push", str(folder), "me/student", "--commit_message", "By hand"])
    assert "Pushed to http://127.0.0.1" in capsys.readouterr().out
    assert state.commits[0][2] == "By hand"
