"""Students that make images of text, of tiny Stable Diffusion and SDXL teachers."""

import warnings

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image
from safetensors.torch import load_file
from stable_diffusion import make_sdxl, make_stable_diffusion
from transformers import CLIPImageProcessor

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer, load_pipeline
from cm_diffusers.doctor import measure_footprint
from cm_diffusers.evaluation import text_student_sampler
from cm_diffusers.guidance import GuidedDenoiser
from cm_diffusers.hub import render_card
from cm_diffusers.networks import guidance_embedding, network_output
from cm_diffusers.training import text_to_image
from cm_diffusers.training.preparation import load_teacher_of
from cm_diffusers.training.randomness import SampleRandom
from cm_diffusers.training.text_to_image import TextToImage

BF16 = {torch.bfloat16}
TEACHERS = {"sd": make_stable_diffusion, "sdxl": make_sdxl}
LATENTS = {"output_type": "latent", "height": 16, "width": 16}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def captioned():
    pixels = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    rows = {"image": [Image.fromarray(image) for image in pixels], "text": [f"cat {i}, left" for i in range(24)]}
    return datasets.Dataset.from_dict(rows)


class ReadOnce(torch.utils.data.IterableDataset):
    """A stream that can be read only once."""

    def __init__(self, items):
        self.stream = iter(items)

    def __iter__(self):
        return self.stream


def train(folder, data, teacher="sd", **changes):
    return make_trainer(folder, data, teacher, **changes).train()


def make_trainer(folder, data, teacher="sd", **changes):
    values = {
        "method": "lcm", "batch_size": 4, "max_train_steps": 4, "teacher_check": False, "tracker": "none",
        "sample_steps": 0, "checkpoint_steps": 0, "logging_steps": 2, "num_samples": 2, "learning_rate": 1e-3,
        "conversion_learning_rate": 1e-3, "output_dir": str(folder),
    }  # fmt: skip
    teacher = TEACHERS[teacher]() if isinstance(teacher, str) else teacher
    return ConsistencyTrainer(ConsistencyConfig(**{**values, **changes}), teacher, data)


def latents(pipe, guidance_scale=1.0, steps=2):
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": guidance_scale, "num_inference_steps": steps, **LATENTS}
    return pipe("a dog", generator=torch.Generator().manual_seed(0), **options).images


def assert_same(found, expected):
    """But for the order of sums, which on some CPUs depends on where in memory weights lie."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Every path: train, save, load -------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_full_lcm_student_is_a_stock_pipeline(tmp_path, captioned, teacher):
    student = train(tmp_path, captioned, teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of a config that Stable Diffusion takes for outdated
        stock, ours = DiffusionPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)
    assert isinstance(stock.scheduler, LCMScheduler)
    assert stock.unet.config.time_cond_proj_dim == 256
    expected = latents(student, 8.5)
    assert_same(latents(ours, 8.5), expected)
    torch.testing.assert_close(latents(stock, 8.5), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(latents(ours, 3.0), expected)


@pytest.mark.parametrize(
    "changes", [{"few_step_sigmas": {"2": [10.0, 1.0]}}, {"method": "cd", "boundary": "lcm", "sigma_max": 10.0}]
)
def test_what_no_stock_scheduler_samples_alike_keeps_ours(tmp_path, captioned, changes):
    student = train(tmp_path, captioned, **changes)
    ours = load_pipeline(tmp_path)
    assert dict(ours.scheduler.config)["few_step_sigmas"] == dict(student.scheduler.config)["few_step_sigmas"]
    assert_same(latents(ours), latents(student))


def test_the_guidance_that_a_student_was_trained_on_is_its_default(tmp_path, captioned):
    train(tmp_path, captioned, w_min=1.0, w_max=3.0)
    assert text_student_sampler(load_pipeline(tmp_path), 1, ["a cat"]).description.endswith("guidance 3")
    assert str(render_card(tmp_path, "me/student")).count("guidance_scale=3.0") == 2


@pytest.mark.parametrize("teacher", TEACHERS)
def test_adapters_draw_at_the_size_of_their_training(tmp_path, captioned, teacher):
    train(tmp_path, captioned, teacher, lora_rank=2, resolution=32)
    loaded = load_pipeline(tmp_path, base=TEACHERS[teacher]())
    assert loaded("a cat", num_inference_steps=1, guidance_scale=1).images[0].size == (32, 32)
    assert str(render_card(tmp_path, "me/adapters")).count("height=32, width=32") == 1


def test_a_trained_pipeline_is_in_one_place_and_precision():
    text, student = TextToImage(make_stable_diffusion()), make_stable_diffusion(seed=1)
    text.pipeline.safety_checker = checker = torch.nn.Linear(1, 1)
    text.pipeline.feature_extractor = CLIPImageProcessor()
    ready = text.ready(student.to(dtype=torch.bfloat16))
    parts = [part for part in ready.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4 and {part.weight.dtype for part in (ready.unet.conv_in, ready.safety_checker)} == BF16
    assert ready.unet is student.unet and checker.weight.dtype == torch.float32
    assert {weight.dtype for part in parts for weight in part.parameters()} == BF16


def test_prompts_take_nothing_from_a_stream_that_is_read_once(tmp_path, captioned):
    """All 24 pictures are trained on: without one of them, the last batch would not come."""
    trainer = make_trainer(tmp_path, ReadOnce(captioned), max_train_steps=6, sample_steps=1)
    assert trainer.prompts == captioned["text"][:2]
    trainer.train()
    assert trainer.step == 6


def test_large_pictures_are_encoded_in_parts(monkeypatch):
    text, images = TextToImage(make_stable_diffusion()), torch.rand(5, 3, 16, 16) * 2 - 1
    whole = text.posterior(images)
    monkeypatch.setattr(text_to_image, "PIXELS_AT_ONCE", 2 * 16 * 16)
    for one, other in zip(text.posterior(images), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_load_into_a_stock_pipeline(tmp_path, captioned, teacher, dora):
    changes = {"lora_rank": 2, "lora_alpha": 4, "dora": dora, "max_train_steps": 6, "learning_rate": 0.01}
    student = train(tmp_path, captioned, teacher, **changes)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["pytorch_lora_weights.safetensors"]
    stock = TEACHERS[teacher]()
    stock.load_lora_weights(tmp_path)
    stock.scheduler = LCMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    expected = latents(student)
    torch.testing.assert_close(latents(stock), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        latents(load_pipeline(tmp_path, base=TEACHERS[teacher]())), expected, rtol=1e-5, atol=1e-5
    )
    plain = TEACHERS[teacher]()
    plain.scheduler = stock.scheduler
    assert (latents(plain) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("method", ["cd", "ecd", "scd", "ect"])
def test_methods_in_sigma_space_work_on_latents(tmp_path, captioned, teacher, method):
    student = train(tmp_path, captioned, teacher, method=method)
    expected = latents(student, steps=1)
    assert expected.isfinite().all()
    assert_same(latents(load_pipeline(tmp_path), steps=1), expected)


def test_methods_in_sigma_space_are_told_the_guidance(tmp_path, captioned):
    student = train(tmp_path, captioned, method="ecd", w_min=1.0, w_max=6.0)
    assert not torch.equal(latents(student, 2.0), latents(student, 7.0))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"method": "cd", "mu": 0.9}], ids=["full", "lora", "cd"])
def test_a_run_resumes_to_the_same_bits(tmp_path, captioned, changes):
    changes = {"caption_dropout": 0.3, "max_train_steps": 5, "conversion_steps": 0, **changes}
    train(tmp_path / "whole", captioned, **changes)
    trainer = make_trainer(tmp_path / "cut", captioned, checkpoint_steps=2, **changes)
    batches = iter(trainer.batches)
    for _ in range(3):
        trainer.advance(trainer.phases[0], batches)
        if trainer.step == 2:
            trainer.save_checkpoint()
    train(tmp_path / "cut", captioned, checkpoint_steps=2, resume="auto", **changes)
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        other = load_file(tmp_path / "cut" / file.relative_to(tmp_path / "whole"))
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())


def test_checkpoints_of_adapters_hold_nothing_else(tmp_path, captioned):
    train(tmp_path, captioned, lora_rank=2, checkpoint_steps=2)
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        assert all(".lora_" in name for name in load_file(file))


# Memory and cost ----------------------------------------------------------------------------------------------------


def test_adapters_hold_one_copy_of_the_frozen_network(tmp_path, captioned):
    trainer = make_trainer(tmp_path, captioned, lora_rank=2, mu=0.9, target="ema")
    networks = [trainer.teacher.unet, trainer.unet, *trainer.averages.networks().values()]
    assert len(networks) == 4
    frozen = {weight.data_ptr() for weight in trainer.teacher.unet.parameters()}
    for network in networks:
        own = [weight for weight in network.parameters() if weight.data_ptr() not in frozen]
        assert len(list(network.parameters())) - len(own) == len(frozen)
    assert all(".lora_" in name for name, weight in trainer.unet.named_parameters() if weight.requires_grad)


def test_the_doctor_counts_what_adapters_share_once(tmp_path, captioned):
    trainer = make_trainer(tmp_path, captioned, lora_rank=2)
    footprint, _ = measure_footprint(trainer)
    adapters = sum(weight.nbytes for weight in trainer.unet.parameters() if weight.requires_grad)
    assert footprint.student == footprint.gradients == footprint.optimizer // 2 == adapters
    assert footprint.averages == 2 * adapters
    assert footprint.teacher == sum(weight.nbytes for weight in trainer.teacher.unet.parameters())
    assert footprint.encoders > 0 and footprint.activations > 0


def test_adapters_on_a_half_precision_network_are_trained_in_float32(tmp_path, captioned):
    half = {"teacher_dtype": "bfloat16", "mixed_precision": "bf16"}
    trainer = make_trainer(tmp_path, captioned, lora_rank=2, **half)
    assert {weight.dtype for weight in trainer.teacher.unet.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in trainer.unet.parameters() if weight.requires_grad} == {torch.float32}
    pipe = trainer.train()
    assert latents(pipe).isfinite().all()  # in one precision, whatever the encoders had
    assert all(value.isfinite().all() for value in load_file(tmp_path / "pytorch_lora_weights.safetensors").values())


def test_the_guided_teacher_is_asked_once(tmp_path, captioned):
    trainer = make_trainer(tmp_path, captioned)
    sizes = []
    trainer.teacher.unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    trainer.advance(trainer.phases[0], iter(trainer.batches))
    assert sizes == [2 * trainer.config.batch_size]


def test_the_callers_pipeline_stays_as_it_is(tmp_path, captioned):
    pipe = make_sdxl()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    train(tmp_path, captioned, teacher=pipe, lora_rank=2, teacher_dtype="bfloat16", mixed_precision="bf16")
    assert pipe.vae.dtype == pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_adapters_take_their_network_from_a_folder_in_the_teachers_precision(stored, tmp_path, captioned):
    make_sdxl().to(dtype=stored).save_pretrained(tmp_path / "teacher")
    half = {"teacher_dtype": "bfloat16", "mixed_precision": "bf16"}
    config = ConsistencyConfig(method="lcm", lora_rank=2, **half)
    loaded = load_teacher_of(config, tmp_path / "teacher")
    assert loaded.unet.dtype == torch.bfloat16
    encoders = loaded.text.pipeline
    assert encoders.vae.dtype == encoders.text_encoder.dtype == encoders.text_encoder_2.dtype == torch.float32
    train(tmp_path / "run", captioned, teacher=tmp_path / "teacher", lora_rank=2, **half)


# The published algorithm --------------------------------------------------------------------------------------------


def published_lcm(pipe, student, target, z0, noise, start, w, hidden, empty):
    """One loss of latent consistency distillation, read off its publication: in discrete time and unit variance."""
    alpha_bar, epsilon = pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type == "epsilon"
    end = (start - 20).clamp(min=0)
    a, s = (x.view(-1, 1, 1, 1) for x in (alpha_bar[start].sqrt(), (1 - alpha_bar[start]).sqrt()))
    a_end, s_end = (x.view(-1, 1, 1, 1) for x in (alpha_bar[end].sqrt(), (1 - alpha_bar[end]).sqrt()))

    def both(z, t, output, a, s):
        return ((z - s * output) / a, output) if epsilon else (a * z - s * output, a * output + s * z)

    def boundary(z, t, x0):
        scaled = 10.0 * t.float().view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25) * z + scaled / (scaled**2 + 0.25).sqrt() * x0

    half = 128
    frequencies = torch.exp(torch.arange(half).float() * -(np.log(10000.0) / (half - 1)))
    told = (w[:, None] * 1000.0) * frequencies[None]
    told = torch.cat([told.sin(), told.cos()], dim=1)

    z = a * z0 + s * noise
    prediction = boundary(z, start, both(z, start, student(z, start, hidden, timestep_cond=told).sample, a, s)[0])
    with torch.no_grad():
        x_c, e_c = both(z, start, pipe.unet(z, start, hidden).sample, a, s)
        x_u, e_u = both(z, start, pipe.unet(z, start, empty.expand_as(hidden)).sample, a, s)
        weight = w.view(-1, 1, 1, 1)
        z_end = a_end * (x_c + weight * (x_c - x_u)) + s_end * (e_c + weight * (e_c - e_u))
        output = target(z_end, end, hidden, timestep_cond=told).sample
        wanted = boundary(z_end, end, both(z_end, end, output, a_end, s_end)[0])
    losses = ((prediction - wanted) ** 2 + 0.001**2).sqrt() - 0.001
    return losses.flatten(1).mean(1), wanted


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_lcm_is_the_published_algorithm(tmp_path, captioned, prediction_type):
    pipe = make_stable_diffusion(prediction_type)
    trainer = make_trainer(tmp_path, captioned, teacher=pipe, batch_size=96)
    torch.nn.init.normal_(trainer.unet.time_embedding.cond_proj.weight, std=0.1)
    target = trainer.averages.target.network
    objective, batch = trainer.phases[-1].objective, next(iter(trainer.batches))
    random = SampleRandom(batch["seed"], torch.device("cpu"))
    z0, conditioning = trainer.inputs(batch, random)
    losses = objective.losses(z0, 0, random, **conditioning)
    # The same draws, in the same order.
    random = SampleRandom(batch["seed"], torch.device("cpu"))
    trainer.inputs(batch, random)
    start = (random.uniform() * 50).long() * 20 + 19
    noise = random.normal_like(z0)
    w, hidden = conditioning["guidance_scale"] - 1, conditioning["encoder_hidden_states"]
    assert w.min() >= 5 and w.max() <= 15 and w.std() > 1
    empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    expected, _ = published_lcm(pipe, trainer.unet, target, z0, noise, start, w, hidden, empty)
    assert 19 in start
    torch.testing.assert_close(losses.values, expected, rtol=1e-5, atol=1e-5)


def test_the_guidance_embedding_is_that_of_stock_pipelines():
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 1.5, 7.5, 14.0])
    stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    torch.testing.assert_close(guidance_embedding(w), stock, rtol=1e-5, atol=1e-5)


# What the network is told -------------------------------------------------------------------------------------------


def test_guidance_is_each_samples_own():
    text = TextToImage(make_sdxl())
    embeddings = text.encode_prompts(["a cat", "the dog"])
    told = text.conditioning(embeddings, torch.tensor([[20, 30, 1, 2], [16, 16, 0, 0]]), (16, 16))
    from cm_diffusers.training.teacher import load_teacher

    denoiser = load_teacher(text.pipeline).denoiser
    sample, sigma = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 5.0])
    guided = GuidedDenoiser(denoiser, 1.0, text.without_text)
    scale = torch.tensor([3.0, 0.5])
    with torch.no_grad():
        found = guided(sample, sigma, guidance_scale=scale, **told)
        conditional, without = denoiser(sample, sigma, **told), denoiser(sample, sigma, **text.without_text(told))
    expected = without + scale.view(-1, 1, 1, 1) * (conditional - without)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sdxl_is_told_sizes_and_pooled_text():
    pipe = make_sdxl()
    text = TextToImage(pipe)
    embeddings = text.encode_prompts(["a cat"])
    told = text.conditioning(embeddings, torch.tensor([[20, 30, 1, 2]]), (16, 24))
    assert told["added_cond_kwargs"]["time_ids"].tolist() == [[20, 30, 1, 2, 16, 24]]
    hidden, _, pooled, _ = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(told["encoder_hidden_states"], hidden)
    assert torch.equal(told["added_cond_kwargs"]["text_embeds"], pooled)
    assert text.without_text(told)["encoder_hidden_states"].abs().sum() == 0  # as SDXL's base has it


def test_latents_are_scaled_draws_of_the_posterior():
    text = TextToImage(make_stable_diffusion())
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, std = text.posterior(images)
    found = text.scale(mean, std, SampleRandom(torch.arange(3), torch.device("cpu")))
    noise = SampleRandom(torch.arange(3), torch.device("cpu")).normal_like(mean)
    torch.testing.assert_close(found, (mean + std * noise) * text.pipeline.vae.config.scaling_factor)


def test_captions_are_left_out_as_often_as_asked(tmp_path, captioned):
    trainer = make_trainer(tmp_path, captioned, caption_dropout=0.5, batch_size=24)
    batch = next(iter(trainer.batches))
    random = SampleRandom(batch["seed"], torch.device("cpu"))
    _, told = trainer.inputs(batch, random)
    empty = trainer.text.encode_prompts([""])["prompt_embeds"]
    dropped = (told["encoder_hidden_states"] == empty).flatten(1).all(1)
    assert 4 <= dropped.sum() <= 20
    _, of_teacher = trainer.inputs.of_teacher(batch, random)
    assert not (of_teacher["encoder_hidden_states"] == empty).flatten(1).all(1).any()


def test_embeddings_are_told_in_the_networks_precision():
    pipe = make_stable_diffusion()
    unet = pipe.unet.to(torch.bfloat16)
    hidden = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    found = network_output(
        unet, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), torch.tensor([10.0]), encoder_hidden_states=hidden
    )
    assert found.dtype == torch.bfloat16


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 2, "w_min": 1.0, "w_max": 2.0}, "adapters cannot be told"),
        ({"w_min": 3.0, "w_max": 2.0}, "w_min <= w_max"),
        ({"w_min": 3.0, "guidance_scale": 2.0}, "set either"),
        ({"distance": "lpips", "huber_c": None}, "latents"),
        ({"method": "scd", "lora_rank": 2}, "continuous levels"),
        ({"lora_rank": 2, "conversion_steps": 3}, "conversion_steps"),
        ({"lora_rank": 2, "lora_targets": ["nothing"]}, "nothing"),
        ({"lora_alpha": 2}, "lora_rank"),
        ({"dora": True}, "lora_rank"),
        ({"label_dropout": 0.1, "null_class_label": 0}, "class-conditional"),
        ({"skip_interval": 7}, "divides"),
        ({"boundary": "euler"}, "boundary 'lcm'"),
        ({"resolution": 17}, "multiple of the VAE's 2"),
        ({"method": "meanflow"}, "without text"),
        ({"lora_rank": 2, "teacher_dtype": "float16"}, "mixed_precision"),
    ],
)
def test_what_does_not_go_with_text_is_refused(tmp_path, captioned, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, captioned, **changes)


@pytest.mark.parametrize("changes", [{"w_min": 1.0}, {"lora_rank": 2}, {"caption_dropout": 0.1}])
def test_what_needs_text_is_refused_without(tmp_path, changes):
    import diffusers
    from conftest import build_unet

    with pytest.raises(ValueError, match="text-to-image"):
        make_trainer(tmp_path, torch.zeros(8, 3, 8, 8), (build_unet(), diffusers.DDPMScheduler()), **changes)


def test_a_network_that_takes_text_needs_its_pipeline(tmp_path, captioned):
    pipe = make_stable_diffusion()
    with pytest.raises(TypeError, match="whole pipeline"):
        make_trainer(tmp_path, captioned, (pipe.unet, pipe.scheduler))


def test_a_student_that_is_told_its_guidance_is_no_teacher(tmp_path, captioned):
    with pytest.raises(ValueError, match="student already"):
        make_trainer(tmp_path, captioned, make_stable_diffusion(time_cond_proj_dim=256))


def test_adapters_without_their_pipeline_are_refused(tmp_path, captioned):
    train(tmp_path, captioned, lora_rank=2, max_train_steps=1)
    with pytest.raises(ValueError, match="base"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match="no adapters"):
        load_pipeline(tmp_path / "scheduler")
