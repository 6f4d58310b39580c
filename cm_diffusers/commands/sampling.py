"""`cm-diffusers sample`: images from a student."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cm_diffusers.commands.options import Parser, add_guidance, add_model_options, add_student, load_student


def sample(arguments: Sequence[str]) -> None:
    """`cm-diffusers sample`: images from a student, one PNG each and one grid of all."""
    parser = Parser("sample")
    add_student(parser)
    parser.add_argument(
        "--prompts", nargs="+", metavar="TEXT",
        help="texts, for students that make images of them; image i is made of prompt i mod n",
    )  # fmt: skip
    parser.add_argument(
        "--base", help="for adapters: folder or Hub id of the pipeline they belong to; the teacher's, if they know it"
    )
    parser.add_argument("--num_images", type=int, default=16, help="how many images (default: 16)")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations per image (default: 1)")
    parser.add_argument("--sigmas", type=float, nargs="+", help="noise levels to step through, instead of --steps")
    parser.add_argument("--class_labels", type=int, nargs="+", help="one label for all images, or one for each")
    parser.add_argument("--seed", type=int, default=0, help="image i is drawn with seed + i (default: 0)")
    parser.add_argument("--batch_size", type=int, help="images at once (default: 64, and 4 of --prompts)")
    add_guidance(parser, of_text=True)
    add_model_options(parser)
    parser.add_argument("--output_dir", default="outputs/samples", help="where the images go")
    options = parser.parse_args(arguments)
    if options.batch_size is None:
        options.batch_size = 64 if options.prompts is None else 4
    if options.num_images < 1 or options.batch_size < 1:
        parser.error("--num_images and --batch_size must be positive.")
    if options.prompts is None and options.base is not None:
        parser.error("--base is for adapters, which make images of --prompts.")
    if options.prompts is not None and (options.class_labels or options.sigmas):
        parser.error("--class_labels and --sigmas are for students without --prompts.")
    images = _draw_classes(options) if options.prompts is None else _draw_prompts(options)

    from cm_diffusers.image_grid import save_grid

    folder = Path(options.output_dir)
    for index, image in enumerate(images):
        save_image(image, folder / f"{index:05d}.png")
    save_grid(images, folder / "grid.png")
    print(f"{len(images)} images in {folder}, all of them in {folder / 'grid.png'}")


def _draw_classes(options: argparse.Namespace) -> Any:
    import numpy as np

    from cm_diffusers import ConsistencyPipeline
    from cm_diffusers.pipelines.loading import refuse_prompts
    from cm_diffusers.pipelines.weights import load_weights
    from cm_diffusers.training.randomness import generators

    refuse_prompts(options.model, options.revision)
    pipeline = load_student(options, functools.partial(load_weights, ConsistencyPipeline))
    labels = options.class_labels
    if labels is not None and len(labels) not in (1, options.num_images):
        raise ValueError(f"Got {len(labels)} class labels for {options.num_images} images.")
    batches = []
    for indices in _batches(options):
        batches.append(
            pipeline(
                batch_size=len(indices),
                class_labels=labels if labels is None or len(labels) == 1 else [labels[i] for i in indices],
                num_inference_steps=None if options.sigmas else options.steps,
                sigmas=options.sigmas,
                guidance_scale=1.0 if options.guidance_scale is None else options.guidance_scale,
                generator=generators([options.seed + i for i in indices]),
                output_type="np",
            ).images
        )
    return np.concatenate(batches)


def _draw_prompts(options: argparse.Namespace) -> Any:
    import numpy as np

    from cm_diffusers import load_pipeline
    from cm_diffusers.pipelines.text import prompts_in_turn, resolve_guidance, takes_prompts
    from cm_diffusers.training.randomness import generators

    pipeline = load_student(options, functools.partial(load_pipeline, base=options.base))
    if not takes_prompts(pipeline):
        raise ValueError(f"{options.model!r} makes no images of text: leave out --prompts.")
    pipeline.vae.enable_slicing()  # a VAE takes more memory for a picture than the network
    how = {
        "num_inference_steps": options.steps, "guidance_scale": resolve_guidance(pipeline, options.guidance_scale),
        "output_type": "np",
    }  # fmt: skip
    batches = []
    for indices in _batches(options):
        generator = generators([options.seed + i for i in indices])
        batches.append(pipeline(prompts_in_turn(options.prompts, indices), generator=generator, **how).images)
    return np.concatenate(batches)


def _batches(options: argparse.Namespace) -> list[range]:
    """The indices of the images, in parts that are drawn at once."""
    starts = range(0, options.num_images, options.batch_size)
    return [range(start, min(start + options.batch_size, options.num_images)) for start in starts]


def save_image(image: Any, path: Path) -> None:
    """Write an array of shape `(height, width, channels)`, with values in [0, 1], making its folder."""
    from diffusers import DiffusionPipeline

    path.parent.mkdir(parents=True, exist_ok=True)
    DiffusionPipeline.numpy_to_pil(image[None])[0].save(path)
