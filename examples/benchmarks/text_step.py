"""The time of a latent consistency step from text, over the sum of its bare parts.

    python examples/benchmarks/text_step.py [--batch_size 32] [--channels 128 256] [--rounds 20] [--lora_rank 16]
    python examples/benchmarks/text_step.py --sd15 512 --batch_size 8 --mixed_precision fp16 --lora_rank 64

The parts are the VAE's encoder, the text encoder, one pass of the teacher over a doubled batch (with the caption and
without), one of the target, the student forward and backward, and the optimiser; the step adds to them the draws, the
preconditioning, the DDIM jump, the distance, clipping, averages, the watch over bad steps and the loop.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from text_memory import make_pipeline as stable_diffusion
from timing import median_seconds

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_text_model import SIZE, caption, make_pipeline, make_vae  # noqa: E402

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer  # noqa: E402

DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs=2, default=[128, 256], help="of the network's two levels")
    parser.add_argument("--sd15", type=int, metavar="PIXELS", help="Stable Diffusion 1.5's sizes, on such pictures")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="of encoders, too")
    parser.add_argument("--lora_rank", type=int, help="train adapters only")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.sd15:
        pipe, shape = stable_diffusion(is_xl=False), (3, options.sd15, options.sd15)
    else:
        pipe, shape = make_pipeline(make_vae(), tuple(options.channels)), (1, SIZE, SIZE)
    images = torch.rand(4 * options.batch_size, *shape) * 2 - 1
    data = [{"image": image, "caption": caption(row % 10, row)} for row, image in enumerate(images)]
    with tempfile.TemporaryDirectory() as folder:
        told: dict[str, Any] = {"w_min": 1.0, "w_max": 3.0}
        if options.lora_rank:
            told = {"guidance_scale": 3.0, "lora_rank": options.lora_rank}
        config = ConsistencyConfig(
            method="lcm", batch_size=options.batch_size, teacher_check=False, tracker="none", sample_steps=0,
            num_workers=options.num_workers, mixed_precision=options.mixed_precision, resolution=options.sd15,
            teacher_dtype=DTYPES[options.mixed_precision], output_dir=folder, **told,
        )  # fmt: skip
        measure(ConsistencyTrainer(config, pipe, data), options)


def measure(trainer: ConsistencyTrainer, options: argparse.Namespace) -> None:
    phase, batches, text = trainer.phases[-1], iter(trainer.batches), trainer.text
    batch = trainer.stepper.to_device(next(batches))
    device, count = trainer.accelerator.device, options.batch_size
    hidden = text.encode_prompts(batch["captions"])["prompt_embeds"]
    x, time = torch.randn_like(text.posterior(batch["images"])[0]), torch.full((count,), 500.0, device=device)
    told = {} if options.lora_rank else {"timestep_cond": torch.randn(count, 256, device=device)}
    teacher, target = trainer.teacher.unet, trainer.averages.networks().get("target", trainer.unet)

    def step() -> None:
        trainer.watch.after(trainer.advance(phase, batches))

    def parts() -> None:
        text.posterior(batch["images"])
        text.encode_prompts(batch["captions"])
        with trainer.accelerator.autocast():
            with torch.no_grad():
                teacher(torch.cat([x] * 2), torch.cat([time] * 2), torch.cat([hidden] * 2), return_dict=False)
                target(x, time, hidden, return_dict=False, **told)
            loss = trainer.student(x, time, hidden, return_dict=False, **told)[0].square().mean()
        trainer.accelerator.backward(loss)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    seconds = median_seconds({"step": step, "parts": parts}, options.rounds, device)
    networks = f"Stable Diffusion 1.5 at {options.sd15}" if options.sd15 else f"channels {options.channels}"
    print(f"lcm step, batch {count}, {networks}, {device}, {torch.get_num_threads()} threads")
    print(f"step {seconds['step'] * 1000:.1f} ms, its parts {seconds['parts'] * 1000:.1f} ms")
    print(f"step / sum of parts: {seconds['step'] / seconds['parts']:.3f}")


if __name__ == "__main__":
    main()
