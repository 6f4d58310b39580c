"""Students of any kind from one function, and what takes no text says so."""

import diffusers
import pytest
import torch
from conftest import build_unet
from stable_diffusion import make_stable_diffusion
from text_students import make_text_student, save_text_student

from cm_diffusers import ConsistencyPipeline, ConsistencyScheduler, load_pipeline
from cm_diffusers.networks import copy_in
from cm_diffusers.pipelines.loading import refuse_prompts
from cm_diffusers.pipelines.text import draw_prompts
from cm_diffusers.training.randomness import generators
from cm_diffusers.training.saving import save_student
from cm_diffusers.training.teacher import load_teacher


@pytest.fixture
def pixels(tmp_path):
    ConsistencyPipeline(build_unet(), ConsistencyScheduler()).save_pretrained(tmp_path / "pixels")
    return tmp_path / "pixels"


@pytest.mark.parametrize("kind", ["full", "adapters", "untold"])
def test_a_saved_student_is_what_it_was(tmp_path, kind):
    folder = save_text_student(tmp_path / "student", kind)
    loaded = load_pipeline(folder, base=make_stable_diffusion() if kind == "adapters" else None)
    assert isinstance(loaded.scheduler, ConsistencyScheduler)
    found, expected = (draw_prompts(p, ["a cat"], 2, 1.0, generators([0])) for p in (loaded, make_text_student(kind)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["untold", "adapters"])
def test_what_was_stored_in_half_precision_is_loaded_in_float32_or_as_asked(tmp_path, kind):
    base = make_stable_diffusion().to(dtype=torch.float16)
    folder = save_text_student(tmp_path / "student", kind)
    if kind == "adapters":
        base.save_pretrained(tmp_path / "base")
    else:
        make_text_student(kind).to(dtype=torch.float16).save_pretrained(folder)
    for asked in ({}, {"torch_dtype": torch.bfloat16}):
        loaded = load_pipeline(folder, base=tmp_path / "base" if kind == "adapters" else None, **asked)
        modules = loaded.text_encoder, loaded.unet, loaded.vae
        assert {m.dtype for m in modules} == {asked.get("torch_dtype", torch.float32)}
        draw_prompts(loaded, ["a cat"], 2, 1.0, generators([0]))


@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_damaged_weights_are_not_replaced_by_their_halves(tmp_path, damage):
    make_stable_diffusion().save_pretrained(tmp_path)
    make_stable_diffusion().to(dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "torn":
        weights.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"Cannot load a pipeline.*diffusion_pytorch_model"):
        load_teacher(tmp_path)


def test_a_copy_in_another_precision_is_a_copy():
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    network[1].weight = network[0].weight
    network.codes = torch.nn.Parameter(torch.arange(3, dtype=torch.int8), requires_grad=False)
    found = copy_in(network, torch.float16)
    assert found[0].weight is found[1].weight and found[0].weight.requires_grad
    assert {w.dtype for w in found.parameters()} == {torch.float16, torch.int8}
    assert (found[2].running_var.dtype, found[2].num_batches_tracked.dtype) == (torch.float16, torch.int64)
    assert network[0].weight.dtype == network[2].running_var.dtype == torch.float32
    same = copy_in(network, torch.float32)
    assert torch.equal(same[0].weight, network[0].weight) and same[0].weight is not network[0].weight
    assert same[0].weight.data_ptr() != network[0].weight.data_ptr()


def test_a_student_is_saved_in_one_precision(tmp_path):
    """Stock diffusers and transformers would load each part as they think best, and these would not fit."""
    pipe = make_text_student()
    encoder = pipe.text_encoder.to(torch.float16)
    save_student(pipe, tmp_path)
    assert pipe.text_encoder is encoder and encoder.dtype == torch.float16
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert stock.text_encoder.dtype == stock.unet.dtype == torch.float32
    assert torch.isfinite(draw_prompts(stock, ["a cat"], 1, 8.5, generators([0]))).all()


def test_a_base_is_for_adapters_alone(tmp_path, pixels):
    for folder in (pixels, save_text_student(tmp_path / "full")):
        with pytest.raises(ValueError, match="`base` is for adapters, and .* holds a whole pipeline"):
            load_pipeline(folder, base=make_stable_diffusion())


def test_students_without_text_are_told_from_those_with(tmp_path, pixels):
    refuse_prompts(pixels)
    refuse_prompts(tmp_path / "nothing")
    diffusers.DDPMPipeline(build_unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    refuse_prompts(tmp_path / "teacher")
    for kind in ("full", "adapters"):
        with pytest.raises(ValueError, match="makes images of text.*--prompts"):
            refuse_prompts(save_text_student(tmp_path / kind, kind))
