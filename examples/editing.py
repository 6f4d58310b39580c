"""Every edit, on real images that no training has seen: pictures and figures in minutes, offline, on two CPU cores.

    python examples/editing.py [--output_dir outputs/editing]

Two small students are made first, each of a diffusion model that is trained here:

- of Fashion-MNIST at 16 x 16 pixels, for edits of shapes (Debian's package dataset-fashion-mnist, MIT licence);
- of 1,400 emoji at 16 x 16, for colours (Debian's package fonts-noto-color-emoji; Noto Color Emoji is Google's, under
  the SIL Open Font License 1.1). A tenth of them is held out.

Then `editing.png` shows, for each edit, what was given, what came out in one step and in several, and the original;
`report.md` says what it is worth beside an obvious baseline: PSNR against the originals, in decibels, and FID of the
edited images to the originals, on features of a small classifier of Fashion-MNIST (not Inception's; emoji have none).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from processes import parallel
from small_images import load_emoji, load_fashion_mnist, make_unet, train_teacher
from torch import Tensor
from torch.nn import functional as F

from cm_diffusers import (
    ConsistencyColorizePipeline,
    ConsistencyConfig,
    ConsistencyDenoisePipeline,
    ConsistencyImg2ImgPipeline,
    ConsistencyInpaintPipeline,
    ConsistencyInterpolationPipeline,
    ConsistencyPipeline,
    ConsistencySuperResolutionPipeline,
    ConsistencyTrainer,
)
from cm_diffusers.evaluation import frechet_distance
from cm_diffusers.evaluation.classifier import DomainClassifier
from cm_diffusers.evaluation.metrics import evenly_spread
from cm_diffusers.evaluation.sampling import eight_bits
from cm_diffusers.pipelines.known import luma
from cm_diffusers.training.teacher import Teacher, load_teacher

SIZE, SHOWN = 16, 10
STEPS = (1, 2, 4, 40)
NOISE_LEVEL = 0.2
FACTOR = 4
FASHION, EMOJI = "fashion", "emoji"


# The students -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How long the models of a dataset are trained."""

    name: str
    folder: Path
    teacher_steps: int
    student_steps: int


def load(name: str) -> tuple[Tensor, Tensor]:
    """The images that models are trained on, and those that are edited, in [-1, 1]."""
    if name == FASHION:
        return load_fashion_mnist(size=SIZE)[0], load_fashion_mnist(size=SIZE, part="t10k")[0]
    images = load_emoji(size=SIZE)
    held_out = torch.arange(len(images)) % 10 == 0
    return images[~held_out], images[held_out]


def teacher_folder(folder: Path, name: str) -> Path:
    return folder / f"{name}-teacher"


def train(task: Training) -> str:
    """Train a teacher and its student, unless they are there."""
    place = task.folder / task.name
    if not (place / "model_index.json").exists():
        images, _ = load(task.name)
        torch.manual_seed(0)
        unet = make_unet(SIZE, (16, 32, 32), images.shape[1])
        teacher = train_teacher(unet, images, task.teacher_steps, batch_size=64)
        diffusers.DDPMPipeline(teacher.unet, teacher.scheduler).save_pretrained(teacher_folder(task.folder, task.name))
        config = ConsistencyConfig(
            method="ect", sigma_min=0.02, max_train_steps=task.student_steps, batch_size=64, sample_steps=0,
            teacher_check=False, tracker="none", output_dir=str(place), resume="auto",
        )  # fmt: skip
        ConsistencyTrainer(config, (teacher.unet, teacher.scheduler), images).train()
    return task.name


# Edits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """An edit of images with values in [0, 1].

    Args:
        name (`str`): for the table.
        given (`Callable`): what is left of images.
        baseline (`Callable`): what one would do of that without a model.
        baseline_name (`str`): what that is.
        run (`Callable`): what the student makes of it, in a number of steps.
    """

    name: str
    given: Callable[[Tensor], Tensor]
    baseline: Callable[[Tensor], Tensor]
    baseline_name: str
    run: Callable[[ConsistencyPipeline, Tensor, int], Tensor]


def edited(kind: type, student: ConsistencyPipeline, *given: Any, **options: Any) -> Tensor:
    """What a pipeline makes of its inputs."""
    pipe: Any = kind.from_pipe(student)
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(*given, generator=torch.Generator().manual_seed(0), output_type="pt", **options).images
    return images


def box() -> Tensor:
    """White, to be repainted, in the middle."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 4:12, 4:12] = 1
    return mask


def without_box(images: Tensor) -> Tensor:
    return images * (1 - box())


def mean_fill(given: Tensor) -> Tensor:
    """The mean of what is known, where nothing is."""
    known = 1 - box()
    means = (given * known).sum((2, 3), keepdim=True) / known.sum()
    return torch.where(box().bool(), means, given)


def shrink(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, FACTOR)


def bicubic(given: Tensor) -> Tensor:
    return F.interpolate(given, scale_factor=FACTOR, mode="bicubic").clamp(0, 1)


def with_noise(images: Tensor) -> Tensor:
    return images + NOISE_LEVEL * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


SHAPES = (
    Edit(
        "inpainting, the middle quarter", without_box, mean_fill, "mean of the known",
        lambda student, given, n: edited(ConsistencyInpaintPipeline, student, given, box(), num_inference_steps=n),
    ),
    Edit(
        f"super-resolution, {FACTOR} x", shrink, bicubic, "bicubic",
        lambda student, given, n: edited(
            ConsistencySuperResolutionPipeline, student, given, FACTOR, num_inference_steps=n
        ),
    ),
    Edit(
        f"denoising, deviation {NOISE_LEVEL}", with_noise, lambda given: given.clamp(0, 1), "as it is",
        lambda student, given, n: edited(
            ConsistencyDenoisePipeline, student, given, NOISE_LEVEL, num_inference_steps=n
        ),
    ),
)  # fmt: skip
COLOURS = Edit(
    "colouring", luma, lambda given: given.expand(-1, 3, -1, -1), "grey",
    lambda student, given, n: edited(ConsistencyColorizePipeline, student, given, num_inference_steps=n),
)  # fmt: skip


# Figures ------------------------------------------------------------------------------------------------------------


def psnr(images: Tensor, originals: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, of all images together."""
    return -10 * math.log10(float(F.mse_loss(images, originals)))


def measure(
    edit: Edit, student: ConsistencyPipeline, originals: Tensor, distance: Callable[[Tensor], float] | None
) -> dict[str, Any]:
    """PSNR and, if there is a distance, FID, of the baseline and of the student in several numbers of steps."""
    given = edit.given(originals)

    def figures(images: Tensor) -> dict[str, float]:
        found = {"psnr": round(psnr(images, originals), 2)}
        return found if distance is None else {**found, "fid": round(distance(images), 3)}

    by_steps = {str(steps): figures(edit.run(student, given, steps)) for steps in STEPS}
    return {"edit": edit.name, "baseline": figures(edit.baseline(given)), "by": edit.baseline_name, "steps": by_steps}


def feature_distance(folder: Path, originals: Tensor) -> Callable[[Tensor], float]:
    """FID to the originals, on features of a classifier that is trained if it is not there."""
    place = folder / "classifier"
    if not place.exists():
        images, labels = load_fashion_mnist(size=SIZE)
        DomainClassifier.fit(eight_bits(images, (-1.0, 1.0)), labels, width=16).save(place)
    classifier = DomainClassifier.load(place)
    features = lambda images: classifier(eight_bits(images, (0.0, 1.0)))[0]  # noqa: E731
    reference = features(originals)
    return lambda images: frechet_distance(features(images), reference)


def report(rows: list[dict[str, Any]], counts: dict[str, int]) -> str:
    """A table of `PSNR in dB / FID`."""

    def cell(figures: dict[str, float]) -> str:
        return " / ".join(f"{value:.1f}" if name == "psnr" else f"{value:.2f}" for name, value in figures.items())

    lines = [
        "| edit (PSNR in dB / FID) | without a model | "
        + " | ".join(f"{n} step{'s' * (n > 1)}" for n in STEPS)
        + " |",
        "|---|---|" + "---|" * len(STEPS),
    ]
    for row in rows:
        cells = [f"{row['by']}: {cell(row['baseline'])}", *map(cell, row["steps"].values())]
        lines.append(f"| {row['edit']} | {' | '.join(cells)} |")
    of = f"Of {counts[FASHION]:,} images of Fashion-MNIST's test set, and {counts[EMOJI]} emoji for colours."
    return "\n".join([*lines, "", f"{of} FID to the originals, on features of a small classifier."]) + "\n"


# Pictures -----------------------------------------------------------------------------------------------------------


def rows_of(edit: Edit, student: ConsistencyPipeline, originals: Tensor) -> list[tuple[str, Tensor]]:
    given = edit.given(originals)
    shown = F.interpolate(given, originals.shape[-2:], mode="nearest").clamp(0, 1)
    results = [(f"{steps} step{'s' * (steps > 1)}", edit.run(student, given, steps)) for steps in (1, 4, 40)]
    return [("given", shown), *results, ("original", originals)]


def strokes(images: Tensor) -> Tensor:
    """Patches of three shades."""
    return F.interpolate((shrink(images) * 2).round() / 2, images.shape[-2:], mode="nearest")


def stroke_rows(student: ConsistencyPipeline, originals: Tensor) -> list[tuple[str, Tensor]]:
    given = strokes(originals)
    rows = [
        (f"strength {strength}", edited(ConsistencyImg2ImgPipeline, student, given, strength, num_inference_steps=2))
        for strength in (0.4, 0.5, 0.6)
    ]
    return [("strokes", given), *rows, ("original", originals)]


def walk_rows(student: ConsistencyPipeline, teacher: Teacher, originals: Tensor) -> list[tuple[str, Tensor]]:
    """Walks between two originals each, which stand at their ends."""
    pairs, between = originals[:6].split(2), len(originals) - 2
    walks = [edited(ConsistencyInterpolationPipeline, student, pair, teacher, between) for pair in pairs]
    rows = [torch.cat([pair[:1], walk, pair[1:]]) for pair, walk in zip(pairs, walks, strict=True)]
    return [(f"walk {index + 1}", row) for index, row in enumerate(rows)]


def draw(panels: dict[str, list[tuple[str, Tensor]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cm_diffusers.image_grid import image_grid

    heights = [len(rows) for rows in panels.values()]
    figure, axes = plt.subplots(
        math.ceil(len(panels) / 2), 2, figsize=(13, 2.6 * math.ceil(len(panels) / 2) + 1), squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[len(heights) :]:
        axis.axis("off")
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        images = torch.cat([row.expand(-1, 3, -1, -1) for _, row in rows])
        grid = image_grid(images.permute(0, 2, 3, 1).numpy(), columns=len(rows[0][1]))
        axis.imshow(grid)
        step = grid.height / len(rows)
        axis.set_yticks([step * (i + 0.5) for i in range(len(rows))], [name for name, _ in rows])
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.set_frame_on(False)
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/editing", help="where everything goes")
    parser.add_argument("--teacher_steps", type=int, default=1000)
    parser.add_argument("--student_steps", type=int, default=1000)
    parser.add_argument("--num_images", type=int, default=1000, help="that are measured, at most")
    given = parser.parse_args()
    if given.num_images < 6:
        parser.error("--num_images must be at least 6, for walks between three pairs.")
    folder = Path(given.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [Training(name, folder, given.teacher_steps, given.student_steps) for name in (FASHION, EMOJI)]
    for name in parallel(train, tasks, 2, folder):
        print(f"trained: {name}", flush=True)
    students, originals = {}, {}
    for name in (FASHION, EMOJI):
        students[name] = ConsistencyPipeline.from_pretrained(folder / name)
        images = load(name)[1]
        kept = evenly_spread(len(images), given.num_images)
        originals[name] = (images[kept] / 2 + 0.5).clamp(0, 1)
    fashion, emoji = students[FASHION], students[EMOJI]
    shown = {name: images[evenly_spread(len(images), SHOWN)] for name, images in originals.items()}
    panels = {edit.name: rows_of(edit, fashion, shown[FASHION]) for edit in SHAPES}
    panels[COLOURS.name] = rows_of(COLOURS, emoji, shown[EMOJI])
    panels["strokes to images, 2 steps"] = stroke_rows(fashion, shown[FASHION])
    teacher = load_teacher(teacher_folder(folder, FASHION))
    panels["from one image to another"] = walk_rows(fashion, teacher, shown[FASHION])
    draw(panels, folder / "editing.png")

    distance = feature_distance(folder, originals[FASHION])
    rows = [measure(edit, fashion, originals[FASHION], distance) for edit in SHAPES]
    rows.append(measure(COLOURS, emoji, originals[EMOJI], None))
    text = report(rows, {name: len(images) for name, images in originals.items()})
    (folder / "report.md").write_text(text)
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(text + f"\nLook at {folder / 'editing.png'}.")


if __name__ == "__main__":
    main()
