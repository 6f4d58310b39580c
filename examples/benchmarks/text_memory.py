"""What a step of text-to-image distillation has to hold in memory, for networks of Stable Diffusion's sizes.

    python examples/benchmarks/text_memory.py examples/configs/sd15-lcm-lora.yaml [--xl] [--batch_size 8] [--steps 3]

The doctor's probe, on networks of zeros: weights are counted, activations measured on one picture and on two. Nothing
is downloaded. On a CPU, half precision is bfloat16, whatever the config says: it takes the same room. With `--steps`,
that many are taken, and the peak of a GPU's memory is told, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from timing import synchronize
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_text_model import make_tokenizer  # noqa: E402

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer  # noqa: E402
from cm_diffusers.doctor import measure_footprint  # noqa: E402

SMALL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def zeros(kind: Any, *arguments: Any, **config: Any) -> Any:
    """A network without the time that its initialisation takes."""
    with torch.device("meta"):
        network = kind(*arguments, **config)
    network = network.to_empty(device="cpu").to(torch.bfloat16).eval()
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data.zero_()
    return network


def words(kind: Any, sizes: dict[str, int]) -> Any:
    config = CLIPTextConfig(vocab_size=49408, projection_dim=sizes["hidden_size"], **sizes)
    return zeros(kind, config)


def make_pipeline(is_xl: bool) -> Any:
    """Stable Diffusion 1.5 or SDXL in size."""
    vae = zeros(
        AutoencoderKL, sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, force_upcast=is_xl,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    tokenizer, small = make_tokenizer(["a cat"], max_length=77), words(CLIPTextModel, SMALL)
    if not is_xl:
        unet = zeros(UNet2DConditionModel, sample_size=64, cross_attention_dim=768)
        return StableDiffusionPipeline(
            vae, small, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    unet = zeros(
        UNet2DConditionModel, sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP, "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20], use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    large = words(CLIPTextModelWithProjection, LARGE)
    return StableDiffusionXLPipeline(vae, small, large, tokenizer, tokenizer, unet, scheduler, add_watermarker=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("--xl", action="store_true", help="SDXL's sizes, not Stable Diffusion 1.5's")
    parser.add_argument("--batch_size", type=int, help="instead of the config's")
    parser.add_argument("--steps", type=int, default=0, help="to take on a GPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"output_dir": folder, "tracker": "none", "teacher_check": False, "sample_steps": 0}
        if not torch.cuda.is_available():
            changes |= {"teacher_dtype": "bfloat16", "mixed_precision": "bf16"}
        if options.batch_size:
            changes["batch_size"] = options.batch_size
        config = ConsistencyConfig.from_yaml(options.config, **changes, num_workers=0)
        size = config.resolution or 512
        data = [{"image": torch.zeros(3, size, size), "caption": "a cat"}] * config.batch_size
        trainer = ConsistencyTrainer(config, make_pipeline(options.xl), data)
        footprint, per_image = measure_footprint(trainer)
        peak, seconds = measure_steps(trainer, options.steps)
    for name, value in dataclasses.asdict(footprint).items():
        print(f"{name:<12}{value / 2**30:8.2f} GiB")
    print(f"{'total':<12}{footprint.total / 2**30:8.2f} GiB at batch {config.batch_size}")
    print(f"{'a picture':<12}{per_image / 2**30:8.3f} GiB")
    if peak:
        print(f"{'peak':<12}{peak / 2**30:8.2f} GiB in {options.steps} steps, the last {seconds:.2f} seconds")


def measure_steps(trainer: ConsistencyTrainer, steps: int) -> tuple[int, float]:
    """The most bytes in use at once on a GPU, and the time of the last step."""
    if not (steps and torch.cuda.is_available()):
        return 0, 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batches = iter(trainer.batches)
    for _ in range(steps):
        synchronize(trainer.accelerator.device)
        start = time.perf_counter()
        trainer.watch.after(trainer.advance(trainer.phases[-1], batches))
        synchronize(trainer.accelerator.device)
    return torch.cuda.max_memory_allocated(), time.perf_counter() - start


if __name__ == "__main__":
    main()
