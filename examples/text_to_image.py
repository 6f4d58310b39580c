"""From text to images in a few steps: a small Stable Diffusion and its students, offline, on two CPU cores.

    python examples/text_to_image.py [--output_dir outputs/text_to_image] [--seed 0]

A VAE, a text encoder and a network, all of stock diffusers and transformers, are trained on Fashion-MNIST (Debian's
package dataset-fashion-mnist, MIT licence) with captions such as "a photo of a sneaker". That teacher is distilled
with its guidance: by `lcm` into a whole network that is told the guidance scale and into adapters (LoRA), and by `ecd`
in sigma space.

How often do the images show what the caption says? A classifier that was trained on the real images answers, of
images of the teacher in 50 guided steps of DDIM and of students in 1, 2 and 4. Its features give FID, too. Writes
`report.md`, `results.json` and `samples.png`. What is there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from processes import parallel
from small_text_model import KINDS, SIZE, CaptionedFashion, caption, make_pipeline, train_model, train_vae
from torch import Tensor

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer, load_pipeline
from cm_diffusers.evaluation import frechet_distance
from cm_diffusers.evaluation.classifier import DomainClassifier
from cm_diffusers.evaluation.sampling import eight_bits
from cm_diffusers.training.randomness import generators

GUIDANCE, TEACHER_STEPS, NFES = 3.0, 50, (1, 2, 4)
STUDENTS: dict[str, dict[str, Any]] = {
    "lcm": {"method": "lcm", "w_min": 1.0, "w_max": 3.0},
    "lcm, LoRA": {"method": "lcm", "guidance_scale": GUIDANCE, "lora_rank": 16},
    "ecd": {"method": "ecd", "guidance_scale": GUIDANCE},
}


@dataclass(frozen=True)
class Task:
    """A student to be trained."""

    name: str
    folder: Path
    steps: int
    seed: int

    @property
    def place(self) -> Path:
        return self.folder / self.name.replace(", ", "-").lower()


# Training -----------------------------------------------------------------------------------------------------------


def make_teacher(folder: Path, vae_steps: int, steps: int, seed: int) -> None:
    """Train the teacher and the classifier, unless they are there."""
    if (folder / "teacher" / "model_index.json").exists():
        return
    torch.manual_seed(seed)
    data = CaptionedFashion()
    DomainClassifier.fit(eight_bits(data.images, (-1.0, 1.0)), data.labels, width=16).save(folder / "classifier")
    pipe = make_pipeline(train_vae(data.images, vae_steps))
    train_model(pipe, data, steps)
    pipe.save_pretrained(folder / "teacher")


def train_student(task: Task) -> str:
    """Train a student, or go on where it was."""
    config = ConsistencyConfig(
        **STUDENTS[task.name], max_train_steps=task.steps, batch_size=64, sample_steps=0, tracker="none",
        teacher_check=False, resume="auto", seed=task.seed, output_dir=str(task.place),
    )  # fmt: skip
    if not (task.place / "training.json").exists():
        ConsistencyTrainer(config, task.folder / "teacher", CaptionedFashion()).train()
    return task.name


# Measuring ----------------------------------------------------------------------------------------------------------


def load(task: Task) -> Any:
    base = task.folder / "teacher" if "lora_rank" in STUDENTS[task.name] else None
    pipe = load_pipeline(task.place, base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, count: int, steps: int, guidance_scale: float) -> Tensor:
    """Images in eight bits, of all kinds in turn, each from its own seed."""
    parts = []
    for seeds in torch.arange(count).split(250):
        images = pipe(
            prompt=[caption(int(seed) % len(KINDS), int(seed)) for seed in seeds], num_inference_steps=steps,
            generator=generators(seeds.tolist()), guidance_scale=guidance_scale, output_type="pt",
        ).images  # fmt: skip
        parts.append(eight_bits(images, (0.0, 1.0)))
    return torch.cat(parts)


def measuring(folder: Path) -> Callable[[Tensor], dict[str, float]]:
    """From images of all kinds in turn to how many show what they should, and their FID to all training images."""
    classifier, data = DomainClassifier.load(folder / "classifier"), CaptionedFashion()
    pixels = eight_bits(data.images, (-1.0, 1.0))
    real = torch.cat([classifier(part)[0] for part in pixels.split(1000)])
    test = CaptionedFashion("t10k")
    accuracy = classifier.accuracy(eight_bits(test.images, (-1.0, 1.0)), test.labels)
    print(f"The classifier is right on {accuracy:.1%} of the test set.")

    def measure(images: Tensor) -> dict[str, float]:
        right = classifier.accuracy(images, torch.arange(len(images)) % len(KINDS))
        features = torch.cat([classifier(part)[0] for part in images.split(1000)])
        return {"right": round(right, 4), "fid": round(frechet_distance(features, real), 3)}

    return measure


def compare(tasks: Sequence[Task], count: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A row for the teacher and for each student and number of steps; and some of the images."""
    folder, measure = tasks[0].folder, measuring(tasks[0].folder)
    teacher = torch.no_grad()(load_teacher)(folder)
    images = draw(teacher, count, TEACHER_STEPS, GUIDANCE)
    rows = [{"model": "teacher", "steps": TEACHER_STEPS, "evaluations": 2 * TEACHER_STEPS, **measure(images)}]
    pictures = {f"teacher, {TEACHER_STEPS} steps": images[:20]}
    for task in tasks:
        pipe = load(task)
        told = GUIDANCE if pipe.unet.config.time_cond_proj_dim else 1.0
        for steps in NFES:
            images = draw(pipe, count, steps, told)
            rows.append({"model": task.name, "steps": steps, "evaluations": steps, **measure(images)})
            pictures[f"{task.name}, {steps} step{'s' * (steps > 1)}"] = images[:20]
    return rows, pictures


def load_teacher(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder / "teacher")
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Output -------------------------------------------------------------------------------------------------------------


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| | steps | evaluations | shows what the caption says | FID |",
        "|---|---|---|---|---|",
        *(f"| {r['model']} | {r['steps']} | {r['evaluations']} | {r['right']:.1%} | {r['fid']:.2f} |" for r in rows),
    ]
    return "\n".join(lines)


def save_picture(pictures: dict[str, Tensor], path: Path) -> None:
    """A row of twenty images for each model and number of steps, under their captions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cm_diffusers.image_grid import image_grid

    figure, axes = plt.subplots(len(pictures), 1, figsize=(13, 0.72 * len(pictures) + 0.6))
    for axis, (title, images) in zip(axes, pictures.items(), strict=True):
        grid = image_grid(images.permute(0, 2, 3, 1).numpy() / 255, columns=20)
        axis.imshow(grid, cmap="gray")
        axis.set_yticks([SIZE / 2], [title])
        axis.set_xticks([])
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    places = [(column + 0.5) * grid.width / 20 for column in range(20)]
    axes[0].set_xticks(places, [kind.removeprefix("pair of ") for kind in KINDS] * 2, fontsize=7)
    axes[0].xaxis.tick_top()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/text_to_image", help="where everything goes")
    parser.add_argument("--vae_steps", type=int, default=800)
    parser.add_argument("--teacher_steps", type=int, default=3000)
    parser.add_argument("--student_steps", type=int, default=1500)
    parser.add_argument("--num_images", type=int, default=1000, help="that are drawn for a figure")
    parser.add_argument("--jobs", type=int, default=2, help="students that are trained at the same time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    make_teacher(folder, options.vae_steps, options.teacher_steps, options.seed)
    tasks = [Task(name, folder, options.student_steps, options.seed) for name in STUDENTS]
    for name in parallel(train_student, tasks, options.jobs, folder):
        print(f"{name} is trained.", flush=True)
    rows, pictures = compare(tasks, options.num_images)
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    (folder / "report.md").write_text(report(rows) + "\n")
    save_picture(pictures, folder / "samples.png")
    print(f"\n{report(rows)}\n\nLook at {folder / 'samples.png'}.")


if __name__ == "__main__":
    main()
