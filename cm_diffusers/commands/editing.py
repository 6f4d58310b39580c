"""`cm-diffusers edit`: pictures edited by a student that was never trained for it."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cm_diffusers.commands.options import Parser, add_guidance, add_model_options, add_student, load_student
from cm_diffusers.commands.sampling import save_image

# The pipeline of each edit, and what it does.
EDITS = {
    "inpaint": ("ConsistencyInpaintPipeline", "Repaint what is white in a mask."),
    "colorize": ("ConsistencyColorizePipeline", "Colour grey pictures; their luma stays."),
    "superres": (
        "ConsistencySuperResolutionPipeline", "Enlarge pictures; each of their pixels stays as the mean of a patch."
    ),
    "img2img": ("ConsistencyImg2ImgPipeline", "Vary pictures, or turn strokes into images."),
    "denoise": ("ConsistencyDenoisePipeline", "Remove white noise."),
    "interpolate": (
        "ConsistencyInterpolationPipeline",
        "Walk from one image to another: from noise to noise, or between two pictures.",
    ),
}  # fmt: skip


def edit(arguments: Sequence[str]) -> None:
    """`cm-diffusers edit KIND`: one PNG for each result, and one grid of all beside what they were made from."""
    parser = Parser("edit")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="EDIT", parser_class=argparse.ArgumentParser)
    for name, (_, text) in EDITS.items():
        kinds.add_parser(name, help=text, add_help=False)
    kind = parser.parse_args(arguments[:1]).kind
    parser = _parser_of(kind)
    options = parser.parse_args(arguments[1:])
    if getattr(options, "num_images", 1) < 1:
        parser.error("--num_images must be positive.")
    names = [Path(file).stem for file in options.images or []]
    if kind != "interpolate" and len(set(names)) < len(names):
        parser.error("Results are named after their pictures: give these different names.")
    _save(_walk(options) if kind == "interpolate" else _edit_all(kind, options), Path(options.output_dir))


def _parser_of(kind: str) -> Parser:
    parser = Parser(f"edit {kind}", EDITS[kind][1])
    add_student(parser)
    add = parser.add_argument
    steps = {"img2img": 2, "denoise": 1, "interpolate": 1}.get(kind, 8)
    if kind == "interpolate":
        add("--images", nargs=2, metavar="FILE", help="the pictures to go from and to; noise when left out")
        add("--teacher", metavar="PATH", help="folder or Hub id of the diffusion model that inverts --images")
        add("--num_frames", type=int, default=8, help="images on the way, its ends among them (default: 8)")
    else:
        add("images", nargs="+", metavar="FILE", help="the pictures")
    if kind == "inpaint":
        add("--mask", required=True, metavar="FILE", help="white is repainted; of the size of the pictures")
    if kind == "superres":
        add("--factor", type=int, help="times as high and wide; by default what leads to the student's own size")
    if kind == "img2img":
        add("--strength", type=float, help="how far from the picture, above 0 and up to 1 (default: 0.6)")
    if kind == "denoise":
        add("--noise_level", type=float, help="deviation of the noise, where white is 1; estimated when left out")
    elif kind != "interpolate":
        add("--num_images", type=int, default=1, help="results for each picture (default: 1)")
    add("--steps", type=int, default=steps, help=f"network evaluations of each result (default: {steps})")
    add("--sigmas", type=float, nargs="+", help="noise levels to step through, instead of --steps")
    add("--class_label", type=int, help="of class-conditional students; none, or one that is drawn, when left out")
    add_guidance(parser)
    add_model_options(parser)
    add("--seed", type=int, default=0, help="result i of a picture is drawn with seed + i (default: 0)")
    add("--output_dir", default="outputs/edits", help="where the results go")
    return parser


class Row(NamedTuple):
    """Results, and what stands before and behind them in the grid; arrays of one shape."""

    name: str
    before: list[Any]
    results: list[Any]
    behind: list[Any]


def _edit_all(kind: str, options: argparse.Namespace) -> Iterator[Row]:
    from cm_diffusers.training.randomness import generators

    pipeline = _pipeline(kind, options)
    own = {name: getattr(options, name) for name in ("factor", "strength", "noise_level") if hasattr(options, name)}
    if kind == "inpaint":
        own["mask_image"] = _open(options.mask)
    count = getattr(options, "num_images", 1)
    if kind != "denoise":
        own["batch_size"] = count
    for file in options.images:
        picture = _open(file)
        results = pipeline(
            picture, **own, **_sampling(options), output_type="np",
            generator=generators([options.seed + i for i in range(count)]),
        ).images  # fmt: skip
        yield Row(Path(file).stem, [_beside(picture, results)], list(results), [])


def _walk(options: argparse.Namespace) -> Iterator[Row]:
    import torch

    from cm_diffusers.training.teacher import load_teacher

    pipeline = _pipeline("interpolate", options)
    ends: dict[str, Any] = {}
    if options.teacher is not None:
        ends["teacher"] = load_teacher(options.teacher)
        ends["teacher"].unet.to(pipeline.device).eval()
    if options.images is not None:
        ends["image"] = [_open(file) for file in options.images]
    frames = pipeline(
        **ends, num_frames=options.num_frames, **_sampling(options), output_type="np",
        generator=torch.Generator().manual_seed(options.seed),
    ).images  # fmt: skip
    shown = [_beside(picture, frames) for picture in ends.get("image", [])]
    yield Row("frame", shown[:1], list(frames), shown[1:])


def _pipeline(kind: str, options: argparse.Namespace) -> Any:
    import cm_diffusers
    from cm_diffusers.pipelines.loading import refuse_prompts
    from cm_diffusers.pipelines.weights import load_weights

    refuse_prompts(options.model, options.revision)
    return load_student(options, functools.partial(load_weights, getattr(cm_diffusers, EDITS[kind][0])))


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    steps = {"sigmas": options.sigmas} if options.sigmas else {"num_inference_steps": options.steps}
    return {**steps, "class_labels": options.class_label, "guidance_scale": options.guidance_scale}


def _open(file: str) -> Any:
    """A picture as it is meant to be seen, whichever way the camera was held."""
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(file))


def _beside(picture: Any, results: Any) -> Any:
    """A picture as an array of the size and the channels of results."""
    import numpy as np
    from PIL import Image

    from cm_diffusers.pipelines.inputs import MODES, to_mode

    height, width, channels = results.shape[1:]
    shown = to_mode(picture, channels if channels in MODES else 3)
    resized = shown.resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized, dtype=np.float32).reshape(height, width, -1) / 255


def _save(rows: Iterable[Row], folder: Path) -> None:
    """Write each row when it is there, and in the end a grid of all that have one size."""
    from cm_diffusers.image_grid import save_grid

    grids: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        for index, result in enumerate(row.results):
            save_image(result, folder / f"{row.name}-{index:02d}.png")
        grids.setdefault(row.results[0].shape, []).append(row)
    for (height, width, _), alike in grids.items():
        shown = [image for row in alike for image in (*row.before, *row.results, *row.behind)]
        name = "grid.png" if len(grids) == 1 else f"grid-{width}x{height}.png"
        save_grid(shown, folder / name, columns=len(shown) // len(alike))
    count = sum(len(row.results) for alike in grids.values() for row in alike)
    print(f"{count} images in {folder}, and side by side in grid*.png")
