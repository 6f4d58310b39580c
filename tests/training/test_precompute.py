"""Caches of a captioned dataset: what is in them, and that runs from them are the runs from its pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from damaging import damage
from launching import environment
from PIL import Image
from safetensors.torch import load_file
from stable_diffusion import make_sdxl, make_stable_diffusion

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer, doctor
from cm_diffusers.training import latent_cache, runtime
from cm_diffusers.training import precompute as precomputing
from cm_diffusers.training.inputs import CachedInputs, TextInputs
from cm_diffusers.training.latent_cache import CachedLatents, CacheError
from cm_diffusers.training.loading import SAMPLE, Batches
from cm_diffusers.training.precompute import precompute
from cm_diffusers.training.randomness import SampleRandom, mixed
from cm_diffusers.training.samples import drawing
from cm_diffusers.training.text_to_image import TextToImage

TEACHERS = {"sd": make_stable_diffusion, "sdxl": make_sdxl}
ROWS = 24


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def make_rows(size=(16, 16), captions=lambda row: f"cat {row}, left"):
    pixels = np.random.default_rng(0).integers(0, 255, (ROWS, *size, 3), dtype=np.uint8)
    pictures = [Image.fromarray(image) for image in pixels]
    return datasets.Dataset.from_dict({"image": pictures, "text": [captions(row) for row in range(ROWS)]})


@pytest.fixture(scope="module")
def captioned():
    return make_rows()


@pytest.fixture(scope="module")
def caches(tmp_path_factory, captioned):
    """The finished cache of each teacher."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return {name: make_cache(tmp_path_factory.mktemp(name), captioned, name) for name in TEACHERS}


def make_cache(folder, data, teacher="sd", cache_dtype="float32", **changes):
    config = ConsistencyConfig(**{"batch_size": 5, "output_dir": str(folder), **changes})
    return precompute(config, TEACHERS[teacher](), data, cache_dtype)


def make_trainer(folder, data, teacher="sd", **changes):
    values = {
        "method": "lcm", "batch_size": 4, "max_train_steps": 4, "teacher_check": False, "tracker": "none",
        "sample_steps": 0, "checkpoint_steps": 0, "num_samples": 2, "learning_rate": 1e-3,
        "conversion_learning_rate": 1e-3, "output_dir": str(folder),
    }  # fmt: skip
    values |= {"dataset": str(data), **changes} if not isinstance(data, datasets.Dataset) else changes
    teacher = TEACHERS[teacher]() if isinstance(teacher, str) else teacher
    dataset = data if isinstance(data, datasets.Dataset) else None
    return ConsistencyTrainer(ConsistencyConfig(**values), teacher, dataset)


def losses(trainer):
    batches, phase = iter(trainer.batches), trainer.phases[-1]
    trainer.step = phase.start
    return torch.cat([trainer.advance(phase, batches).losses for _ in range(3)])


# What is in a cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
def test_rows_are_what_the_encoders_say(caches, captioned, teacher):
    cached, text = CachedLatents(caches[teacher]), TextToImage(TEACHERS[teacher]())
    pixels = np.stack([np.asarray(picture) for picture in captioned["image"]])
    mean, std = text.posterior(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    expected = {"latent_mean": mean, "latent_std": std, **text.encode_prompts(list(captioned["text"]))}
    assert len(cached) == ROWS and cached.fields.keys() == expected.keys() | {"sizes"}
    assert ("pooled_prompt_embeds" in cached.fields) == (teacher == "sdxl")
    for row in range(ROWS):
        item = cached[row]
        assert item["sizes"].tolist() == [16, 16, 0, 0]
        for name, values in expected.items():
            torch.testing.assert_close(item[name], values[row], rtol=1e-5, atol=1e-5)


def test_what_is_random_is_drawn_by_row(tmp_path):
    data = make_rows((20, 30), lambda row: [f"{row}", f"the {row}"])
    options = {"center_crop": False, "random_flip": True, "seed": 3}
    cached = CachedLatents(make_cache(tmp_path / "one", data, **options))
    again = CachedLatents(make_cache(tmp_path / "two", data, batch_size=24, num_workers=1, **options))
    for row in range(ROWS):
        torch.testing.assert_close(cached[row], again[row], rtol=1e-5, atol=1e-5)
    trainer = make_trainer(tmp_path / "run", data, **options)
    items = [trainer.dataset[row, mixed(SAMPLE, 3, row)] for row in range(ROWS)]
    assert len({item["captions"].split()[0] for item in items}) > 1
    assert len({tuple(item["sizes"].tolist()) for item in items}) > 4
    prompts = trainer.text.encode_prompts([item["captions"] for item in items])["prompt_embeds"]
    for row, item in enumerate(items):
        assert torch.equal(cached[row]["sizes"], item["sizes"])
        torch.testing.assert_close(cached[row]["prompt_embeds"], prompts[row], rtol=1e-5, atol=1e-5)
    other = CachedLatents(make_cache(tmp_path / "other", data, **{**options, "seed": 4}))
    assert any(not torch.equal(cached[row]["sizes"], other[row]["sizes"]) for row in range(ROWS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_float32(tmp_path, caches, captioned, dtype):
    half, whole = CachedLatents(make_cache(tmp_path, captioned, cache_dtype=dtype)), CachedLatents(caches["sd"])
    for name, tensor in half[7].items():
        if name != "sizes":
            assert tensor.dtype == getattr(torch, dtype)
            assert torch.equal(tensor, whole[7][name].to(tensor.dtype))
    assert losses(make_trainer(tmp_path / "run", half.folder)).isfinite().all()


def test_a_cache_says_what_it_is_made_from(caches):
    made = CachedLatents(caches["sdxl"]).identity()["made_from"]
    assert made["teacher"] == "StableDiffusionXLPipeline" and made["dataset"]["rows"] == ROWS
    assert made["encoders"] == TextToImage(make_sdxl()).digests()
    assert made["encoders"].keys() == {"vae", "text_encoder", "text_encoder_2"}
    assert made["pictures"]["height"] == 16 and made["pictures"]["caption_column"] == "text"
    assert made["dtypes"] == {"encoders": "float32", "rows": "float32"}


# Going on -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(precomputing, "MOST_SHARD_ROWS", 8)


@pytest.mark.usefixtures("small_shards")
def test_what_is_there_is_not_computed_again(tmp_path, captioned, monkeypatch):
    whole = CachedLatents(make_cache(tmp_path / "whole", captioned)).identity()
    saved, left = latent_cache.save_file, [2]

    def fills_up(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        saved(*arguments)

    monkeypatch.setattr(latent_cache, "save_file", fills_up)
    with pytest.raises(CacheError, match="No space left"):
        make_cache(tmp_path / "cut", captioned)
    with pytest.raises(ValueError, match="is not finished: go on with `cm-diffusers precompute`"):
        make_trainer(tmp_path / "run", tmp_path / "cut")
    left[0], rows = ROWS, []
    encode = TextToImage.encode_prompts
    monkeypatch.setattr(TextToImage, "encode_prompts", lambda self, texts: rows.extend(texts) or encode(self, texts))
    assert CachedLatents(make_cache(tmp_path / "cut", captioned)).identity() == whole
    assert rows == ["cat 0, left", *(f"cat {row}, left" for row in range(16, ROWS))]  # the first one for its size


@pytest.mark.usefixtures("small_shards")
def test_a_folder_of_another_cache_is_refused(tmp_path, captioned):
    make_cache(tmp_path, captioned)
    with pytest.raises(ValueError) as refused:
        make_cache(tmp_path, captioned, "sdxl", "float16", random_flip=True)
    for text in (
        "teacher was",
        "text_encoder was",
        "random_flip was False and is True",
        "rows was 'float32' and is 'float16'",
    ):
        assert text in str(refused.value)


def test_processes_share_the_work(tmp_path, captioned):
    make_stable_diffusion().save_pretrained(tmp_path / "teacher")
    datasets.concatenate_datasets([captioned] * 90).save_to_disk(tmp_path / "data")  # two shards and a bit
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "cm_diffusers.cli", "precompute", "--teacher", str(tmp_path / "teacher")),
        *("--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "cache"), "--batch_size", "64"),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("Cache saved to") == 1
    cached, alone = CachedLatents(tmp_path / "cache"), CachedLatents(make_cache(tmp_path / "alone", captioned))
    assert len(cached) == 90 * ROWS and len(list(tmp_path.glob("cache/*.safetensors"))) == 3
    for row in (0, 1023, 1024, 2047, 2048, 90 * ROWS - 1):
        torch.testing.assert_close(cached[row], alone[row % ROWS], rtol=1e-5, atol=1e-5)
    damage(tmp_path / "cache" / "latents-00001.safetensors", "flip")  # the second process finds it
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stderr.count("It is made again") == 1
    assert CachedLatents(tmp_path / "cache").identity() == cached.identity()


def test_what_one_process_finds_wrong_ends_all(tmp_path, caches, monkeypatch):
    """The first of two finds the only shard torn; the second has nothing to look at, and hears of it."""
    shutil.copytree(caches["sd"], tmp_path / "cache")
    damage(tmp_path / "cache" / "latents-00000.safetensors", "flip")
    cache, said = CachedLatents(tmp_path / "cache", verify=False), []
    monkeypatch.setattr(runtime, "gather_object", lambda mine: said.extend(mine) or list(said))
    for index in (0, 1):
        process = SimpleNamespace(num_processes=2, process_index=index, is_main_process=index == 0)
        with pytest.raises(CacheError, match="latents-00000.safetensors is corrupt"):
            runtime.in_turns(process, cache.num_shards, cache.check_shard, "cache")
    assert [failure is None for _, failure in said] == [False, True]


def test_shards_are_of_a_size_that_memory_has(monkeypatch):
    rows = precomputing._rows_of_a_shard
    assert (rows(2**10), rows(2**20), rows(2**40)) == (1024, 256, 1)
    assert rows(1_200_000) == 128  # SDXL's in float32


# Runs from a cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"caption_dropout": 0.5}, {"lora_rank": 2}, {"method": "ect"}, {"channels_last": True}],
    ids=["full", "dropout", "lora", "ect", "channels_last"],
)
def test_a_run_from_a_cache_is_the_run_from_its_pictures(tmp_path, caches, captioned, teacher, changes):
    trainer = make_trainer(tmp_path / "cache", caches[teacher], teacher, **changes)
    assert isinstance(trainer.inputs, CachedInputs)
    found = losses(trainer)
    trainer = make_trainer(tmp_path / "pictures", captioned, teacher, **changes)
    assert isinstance(trainer.inputs, TextInputs)
    torch.testing.assert_close(found, losses(trainer), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_are_shown_and_told_the_same(tmp_path, captioned, teacher, dtype):
    cache = make_cache(tmp_path / "cache", captioned, teacher, teacher_dtype=dtype)
    options = {"caption_dropout": 0.5, "batch_size": ROWS, "teacher_dtype": dtype}
    trainers = [make_trainer(tmp_path / "run", data, teacher, **options) for data in (cache, captioned)]
    seen = []
    for trainer in trainers:
        batch = next(iter(trainer.batches))
        seen.append(trainer.inputs(batch, SampleRandom(batch["seed"], torch.device("cpu"))))
    (latents, told), (expected, expected_told) = seen
    precision = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(latents, expected, **precision)
    assert torch.equal(told["guidance_scale"], expected_told["guidance_scale"])
    torch.testing.assert_close(told, expected_told, check_dtype=False, **precision)
    empty = trainers[0].text.empty()["prompt_embeds"].float()
    assert (empty.abs().sum() == 0) == (teacher == "sdxl")  # which knows no caption as zeros
    assert 4 <= (told["encoder_hidden_states"] == empty).flatten(1).all(1).sum() <= 20


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_run_from_a_cache_resumes_to_the_same_bits(tmp_path, caches, teacher, changes):
    changes = {"caption_dropout": 0.3, "max_train_steps": 5, "conversion_steps": 0, **changes}
    make_trainer(tmp_path / "whole", caches[teacher], teacher, **changes).train()
    trainer = make_trainer(tmp_path / "cut", caches[teacher], teacher, checkpoint_steps=2, **changes)
    batches = iter(trainer.batches)
    for _ in range(3):
        trainer.advance(trainer.phases[0], batches)
        if trainer.step == 2:
            trainer.save_checkpoint()
    make_trainer(tmp_path / "cut", caches[teacher], teacher, checkpoint_steps=2, resume="auto", **changes).train()
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        other = load_file(tmp_path / "cut" / file.relative_to(tmp_path / "whole"))
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())


def test_the_record_names_what_the_cache_is_made_from(tmp_path, caches):
    make_trainer(tmp_path, caches["sd"], max_train_steps=1).train()
    record = json.loads((tmp_path / "training.json").read_text())["dataset"]
    assert (record["rows"], record["name"]) == (ROWS, caches["sd"].name)
    assert record["made_from"] == CachedLatents(caches["sd"]).identity()["made_from"]
    assert (tmp_path / "samples.png").exists()


def test_the_teacher_is_checked_on_latents_of_the_cache(tmp_path, caches):
    trainer = make_trainer(tmp_path, caches["sd"], teacher_check=True)
    with pytest.raises(ValueError, match="does not denoise these images"):  # its weights are random
        trainer.check_teacher()


def test_samples_need_prompts(tmp_path, caches, caplog):
    trainer = make_trainer(tmp_path, caches["sd"])
    assert "samples are drawn without a prompt. Set `sample_prompts`" in caplog.text
    draw = drawing(trainer.pipeline(), trainer.config, trainer.text, trainer.prompts)
    assert draw([0, 1], 1).shape == (2, 16, 16, 3)
    caplog.clear()
    make_trainer(tmp_path, caches["sd"], sample_prompts=["a dog"])
    assert "sample_prompts" not in caplog.text


@pytest.mark.parametrize("from_cache", [True, False])
def test_the_doctor_knows_caches(tmp_path, caches, captioned, from_cache):
    options = {"dataset": str(caches["sd"])} if from_cache else {}
    config = ConsistencyConfig(
        method="lcm", batch_size=4, teacher_check=False, output_dir=str(tmp_path / "out"), **options
    )
    found = doctor.examine(config, make_stable_diffusion(), None if from_cache else captioned)
    given = "latent_mean of 4 x 8 x 8, latent_std of 4 x 8 x 8, prompt_embeds of 77 x 8, sizes of 4"
    assert f"24 images, given as {given if from_cache else 'images of 3 x 16 x 16'}" in str(found)
    assert found.warnings == [] and found.seconds_per_step > 0


@pytest.mark.parametrize("from_cache", [True, False])
def test_a_bad_step_leaves_what_led_to_it(tmp_path, caches, captioned, from_cache):
    trainer = make_trainer(tmp_path, caches["sd"] if from_cache else captioned, max_train_steps=2, conversion_steps=0)
    of_objective = trainer.stepper.losses

    def poisoned(*arguments):
        found = of_objective(*arguments)
        return found._replace(values=found.values * float("nan")) if trainer.step == 1 else found

    trainer.stepper.losses = poisoned
    trainer.train()
    dumped = load_file(tmp_path / "bad-steps" / "step-00000001-rank-0.safetensors")
    assert ("latent_mean.0" if from_cache else "images.0") in dumped
    report = json.loads((tmp_path / "bad-steps" / "step-00000001-rank-0.json").read_text())
    assert report["images_are_finite"] == [True]
    assert [len(captions) for captions in report["captions"]] == ([] if from_cache else [4])


def test_a_run_takes_an_open_cache(tmp_path, caches):
    cache = CachedLatents(caches["sd"], verify=False)
    trainer = ConsistencyTrainer(
        ConsistencyConfig(method="lcm", batch_size=4, tracker="none", output_dir=str(tmp_path)),
        make_stable_diffusion(), cache,
    )  # fmt: skip
    assert trainer.dataset is cache and isinstance(trainer.batches, Batches)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"resolution": 32},
            "`resolution` must be that of the cache .*, whose pictures are 16 x 16; the run's are 32",
        ),
        ({"random_flip": True}, "`random_flip` was False when the cache"),
        ({"center_crop": False}, "`center_crop` was True when the cache"),
        ({"image_column": "jpg"}, "`image_column` was 'image' when the cache"),
        ({"caption_column": "words"}, "`caption_column` was 'text' when the cache"),
        ({"streaming": True}, "`streaming` needs pictures.* leave it at False"),
        ({"data_files": ["a.tar"]}, "`data_files` needs pictures"),
        ({"eval_steps": 2}, "`eval_steps` needs pictures, and .* is a cache of latents: leave it at 0, got 2"),
    ],
)
def test_what_a_cache_cannot_give_is_refused(tmp_path, caches, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, caches["sd"], **changes)


def test_what_agrees_with_the_cache_is_taken(tmp_path, caches):
    make_trainer(tmp_path, caches["sd"], resolution=16, image_column="image", caption_column="text")


def test_another_teachers_cache_is_refused(tmp_path, caches):
    with pytest.raises(ValueError, match="made by other encoders than the run's: .*text_encoder_2 was None"):
        make_trainer(tmp_path, caches["sd"], "sdxl")
    pipe = make_stable_diffusion()
    pipe.vae.encoder.conv_in.bias.data += 1
    with pytest.raises(ValueError, match="other encoders than the run's: the teacher's vae was '.*' and is '[^;]*'.$"):
        make_trainer(tmp_path, caches["sd"], pipe)


def test_a_damaged_cache_is_refused(tmp_path, captioned):
    folder = make_cache(tmp_path / "cache", captioned)
    shard = folder / "latents-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheError, match="latents-00000.safetensors is corrupt"):
        make_trainer(tmp_path / "run", folder)


def test_networks_without_text_do_not_take_a_cache(tmp_path, caches):
    import diffusers
    from conftest import build_unet

    with pytest.raises(ValueError, match="it needs a text-to-image teacher"):
        make_trainer(tmp_path, caches["sd"], (build_unet(), diffusers.DDPMScheduler()), method="cd")


def test_what_cannot_be_cached_is_refused(tmp_path, captioned, caches):
    with pytest.raises(ValueError, match="cannot be made of a stream: `train_dataset` must have a length"):
        make_cache(tmp_path, captioned.to_iterable_dataset())
    with pytest.raises(ValueError, match="cannot be made of a stream: leave `streaming` off"):
        make_cache(tmp_path, None, streaming=True, dataset="pictures")
    with pytest.raises(ValueError, match="`dataset` is a cache already"):
        make_cache(tmp_path, None, dataset=str(caches["sd"]))
    with pytest.raises(ValueError, match="`cache_dtype` must be one of float32, float16, bfloat16, got 'int8'"):
        make_cache(tmp_path, captioned, cache_dtype="int8")
    with pytest.raises(ValueError, match="`teacher`.*: set it"):
        precompute(ConsistencyConfig(output_dir=str(tmp_path)), None, captioned)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_without_text_has_no_cache(tmp_path, captioned):
    import diffusers
    from conftest import build_unet

    with pytest.raises(ValueError, match="`teacher` must make images of text, and UNet2DModel does not"):
        precompute(ConsistencyConfig(output_dir=str(tmp_path)), (build_unet(), diffusers.DDPMScheduler()), captioned)


def test_rows_that_are_not_finite_are_named(tmp_path, captioned, monkeypatch):
    encode = TextToImage.encode_prompts

    def overflows(self, prompts):
        found = encode(self, prompts)
        for index, prompt in enumerate(prompts):
            if prompt.startswith("cat 13"):
                found["prompt_embeds"][index] = 1e6
        return found

    monkeypatch.setattr(TextToImage, "encode_prompts", overflows)
    with pytest.raises(FloatingPointError, match="The prompt_embeds of row 13 is not finite.*`cache_dtype`"):
        make_cache(tmp_path, captioned, cache_dtype="float16")
    make_cache(tmp_path / "wide", captioned)
