"""From a diffusion model to a one-step student in minutes, offline, on two CPU cores.

Trains a small epsilon-predicting diffusion model on scikit-learn's handwritten digits (the teacher), distils it, loads
the student back from disk, and compares the two:

    python examples/quickstart.py [--output_dir outputs/quickstart] [--seed 0]

It writes `samples.png` (real | teacher | student, 1 step | student, 2 steps), `results.json` and the student itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from small_images import load_digits, make_unet, train_teacher
from torch import Tensor, nn
from tqdm import tqdm

from cm_diffusers import ConsistencyConfig, ConsistencyPipeline, ConsistencyTrainer
from cm_diffusers.evaluation import frechet_distance
from cm_diffusers.noise_levels import karras_grid
from cm_diffusers.solvers import euler_step, heun_step, integrate
from cm_diffusers.training.teacher import Teacher

NUM_SAMPLES = 2000
TEACHER_STEPS = 1800
TEACHER_SAMPLERS = [("euler", 20), ("euler", 40), ("heun", 6), ("heun", 12), ("heun", 18), ("heun", 40)]
CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/quickstart", help="where the results go")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    options = parser.parse_args()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    torch.manual_seed(options.seed)

    images, labels = load_digits()
    features = train_classifier(images, labels)
    # An ordinary diffusers model: UNet2DModel and DDPMScheduler, predicting epsilon.
    teacher = train_teacher(make_unet(8, channels=(32, 64)), images, TEACHER_STEPS)

    config = ConsistencyConfig.from_yaml(CONFIG, output_dir=str(folder / "student"), seed=options.seed)
    ConsistencyTrainer(config, teacher=(teacher.unet, teacher.scheduler), train_dataset=images).train()
    student = ConsistencyPipeline.from_pretrained(folder / "student")
    student.set_progress_bar_config(disable=True)

    real = features(images)
    teacher_rows, teacher_images = evaluate_teacher(teacher, student.scheduler.config, features, real)
    student_rows, student_images = evaluate_student(student, features, real)
    save_picture(folder / "samples.png", images, teacher_images, teacher_rows, student_images)
    seconds = time.perf_counter() - start
    results = {"teacher": teacher_rows, "student": student_rows, "seconds": round(seconds, 1)}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results, folder)


# Features ------------------------------------------------------------------------------------------------------------


def train_classifier(images: Tensor, labels: Tensor, steps: int = 600) -> Callable[[Tensor], Tensor]:
    """A small convolutional classifier of the digits; returns its 64 penultimate features, the space FID is taken in.

    The features are bounded: unbounded ones are heavy-tailed, and a few of them would decide the distance by chance.
    The same for every seed, so that figures of several seeds can be compared.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.Tanh(),
        )  # fmt: skip
        head = nn.Linear(64, 10)
        parameters = [*body.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
        for _ in tqdm(range(steps), desc="classifier"):
            batch = torch.randint(len(images), (128,))
            noisy = images[batch] + 0.1 * torch.randn(128, 1, 8, 8)
            loss = nn.functional.cross_entropy(head(body(noisy)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    body.eval()
    return torch.no_grad()(lambda batch: body(batch.clamp(-1, 1)))


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluate_teacher(
    teacher: Teacher, config: dict, features: Callable, real: Tensor
) -> tuple[list[dict], list[Tensor]]:
    """FID and time of the teacher under DDIM (Euler) and Heun sampling on a Karras grid."""
    rows, pictures = [], []
    for name, count in tqdm(TEACHER_SAMPLERS, desc="sampling the teacher"):
        sigmas = karras_grid(count, config["sigma_min"], config["sigma_max"]).flip(0)
        solver = {"euler": euler_step, "heun": heun_step}[name]
        start = time.perf_counter()
        with torch.no_grad():
            batches = noise_batches(sigmas[0])
            samples = torch.cat([integrate(teacher.denoiser, noise, sigmas, solver) for noise in batches]).clamp(-1, 1)
        seconds = (time.perf_counter() - start) * 1000 / NUM_SAMPLES
        nfe = count if name == "euler" else 2 * count - 1
        rows.append(row(nfe, features(samples), real, seconds) | {"solver": name})
        pictures.append(samples)
    return rows, pictures


def evaluate_student(
    student: ConsistencyPipeline, features: Callable, real: Tensor
) -> tuple[list[dict], list[Tensor]]:
    """FID and time of the student in one step and two."""
    rows, pictures = [], []
    for nfe in (1, 2):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(1)
        samples = [
            student(len(noise), num_inference_steps=nfe, latents=noise, generator=generator, output_type="pt").images
            for noise in noise_batches(1.0)
        ]
        seconds = (time.perf_counter() - start) * 1000 / NUM_SAMPLES
        pictures.append(torch.cat(samples) * 2 - 1)
        rows.append(row(nfe, features(pictures[-1]), real, seconds))
    return rows, pictures


def noise_batches(scale: float) -> tuple[Tensor, ...]:
    """The same noise for everyone."""
    noise = torch.randn(NUM_SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return (noise * scale).split(500)


def row(nfe: int, features: Tensor, real: Tensor, seconds: float) -> dict:
    return {"nfe": nfe, "fid": round(frechet_distance(features, real), 4), "seconds_per_1000": round(seconds, 3)}


# Output --------------------------------------------------------------------------------------------------------------


def save_picture(path: Path, real: Tensor, teacher: list[Tensor], rows: list[dict], student: list[Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cm_diffusers.image_grid import image_grid

    best = min(range(len(rows)), key=lambda i: rows[i]["fid"])
    panels = [
        ("real", real[torch.linspace(0, len(real) - 1, 64).long()]),
        (f"teacher, {rows[best]['nfe']} evaluations", teacher[best]),
        ("student, 1 step", student[0]),
        ("student, 2 steps", student[1]),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(16, 4.4))
    for axis, (title, images) in zip(axes, panels, strict=True):
        enlarged = nn.functional.interpolate(images[:64].clamp(-1, 1), scale_factor=6, mode="bicubic").clamp(-1, 1)
        framed = nn.functional.pad(enlarged, (2, 2, 2, 2), value=1.0)
        pixels = (framed / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        axis.imshow(image_grid(pixels, columns=8), cmap="gray")
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def print_table(results: dict, folder: Path) -> None:
    best = min(entry["fid"] for entry in results["teacher"])
    print(
        "\nFID of 2,000 samples against all 1,797 digits, on features of a small digits classifier (not Inception)\n"
    )
    print(f"{'':<18}{'NFE':>5}{'FID':>9}{'/ best teacher':>16}{'s per 1,000':>13}")
    for name in ("teacher", "student"):
        for entry in results[name]:
            label = f"{name} {entry.get('solver', '')}"
            ratio = entry["fid"] / best
            print(f"{label:<18}{entry['nfe']:>5}{entry['fid']:>9.3f}{ratio:>16.2f}{entry['seconds_per_1000']:>13.2f}")
    print(f"\n{results['seconds']:.0f} seconds in all. Look at {folder / 'samples.png'}; sample more with")
    print(f"  cm-diffusers sample {folder / 'student'}")


if __name__ == "__main__":
    main()
