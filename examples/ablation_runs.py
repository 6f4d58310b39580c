"""The runs of an ablation: how long each may take, how it is trained, and what is measured of it."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from ablation_budget import GRADIENT_PASSES, total_passes
from accelerate import PartialState
from safetensors.torch import load_file
from small_images import FASHION_MNIST, load_digits, load_fashion_mnist, make_unet, train_teacher
from torch import Tensor

from cm_diffusers import ConsistencyConfig, ConsistencyTrainer
from cm_diffusers.evaluation import Evaluator, Features, Reference, Sampler
from cm_diffusers.evaluation.classifier import CONFIG, DomainClassifier
from cm_diffusers.evaluation.results import write_whole
from cm_diffusers.evaluation.sampling import eight_bits, student_sampler, teacher_sampler
from cm_diffusers.image_grid import image_grid
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.training.phases import conversion_steps
from cm_diffusers.training.preparation import identify_scheduler, prepare_student
from cm_diffusers.training.teacher import Teacher, load_teacher

OK, DIVERGED, NOT_FINITE = "ok", "diverged", "not finite"
NFES = (1, 2, 4)
SHOWN, SAMPLES = 20, "samples.png"
CURVE_POINTS = 6  # of a run's training at which the student is measured
TEACHER_SAMPLERS = (("euler", 20), ("heun", 11), ("heun", 23), ("heun", 35), ("heun", 79))
FIXED = frozenset(
    "teacher dataset output_dir seed resume max_train_steps checkpoint_steps checkpoint_limit eval_steps push_to_hub "
    "tracker".split()
)  # what a study sets itself


@dataclass(frozen=True)
class Setting:
    """A dataset, the teacher that is trained on it, and how students are measured.

    Args:
        name (`str`): `digits`, or one that begins with `fashion`.
        size (`int`): of the images, in pixels.
        channels (`tuple[int, ...]`): of the UNet's levels.
        teacher_steps, teacher_batch, teacher_rate: of the teacher's training.
        sigma_max (`float`): where students start.
        huber_c (`float`): constant of the pseudo-Huber distance, where it stands in for LPIPS.
        students (`dict`): fields of [`ConsistencyConfig`] for all runs on it.
        num_images (`int`): that are drawn for a figure.
        data_dir (`str`): where the files of Fashion-MNIST are.
    """

    name: str
    size: int
    channels: tuple[int, ...]
    teacher_steps: int
    teacher_batch: int
    sigma_max: float
    huber_c: float
    teacher_rate: float = 2e-3
    students: dict[str, Any] = field(default_factory=dict, hash=False)
    num_images: int = 2000
    data_dir: str = FASHION_MNIST

    @property
    def teacher_passes(self) -> int:
        """Forward passes of one image that the teacher's training is worth."""
        return self.teacher_steps * self.teacher_batch * GRADIENT_PASSES

    def load(self) -> tuple[Tensor, Tensor]:
        """Its images in [-1, 1], and their labels."""
        return load_digits() if self.name == "digits" else load_fashion_mnist(self.data_dir, self.size)


@dataclass(frozen=True)
class Run:
    """A run with one seed, and where it leaves what."""

    name: str
    seed: int
    config: ConsistencyConfig
    setting: Setting
    folder: Path  # of the dataset
    study: str

    @property
    def title(self) -> str:
        return f"{self.name}-seed-{self.seed}"

    @property
    def report_folder(self) -> Path:
        return self.folder / self.study

    @property
    def output_dir(self) -> Path:
        return self.report_folder / "runs" / self.title

    @property
    def result_file(self) -> Path:
        return self.report_folder / "results" / f"{self.title}.json"

    @property
    def samples_file(self) -> Path:
        """A row of images for each number of steps."""
        return self.result_file.with_suffix(".png")


# How many steps a run may take ---------------------------------------------------------------------------------------


def plan(setting: Setting, overrides: dict[str, Any], budget: float) -> ConsistencyConfig:
    """The config of a run: the dataset's settings under its own, and as many steps as the budget allows.

    Args:
        overrides (`dict[str, Any]`): fields of [`ConsistencyConfig`].
        budget (`float`): in trainings of the teacher.

    Raises:
        `ValueError`: for fields that do not exist or that a study sets itself, values that cannot work, or a budget
            below one step.
    """
    if taken := sorted(FIXED & overrides.keys()):
        raise ValueError(f"`{taken[0]}` is set by the study.")
    config = ConsistencyConfig.from_dict({**common_settings(setting), **overrides}).resolve()
    teacher = stand_in(config, setting)
    config = with_steps(config, teacher, int(budget * setting.teacher_passes))
    if config.few_step_sigmas is None:
        config = changed(config, few_step_sigmas=few_step_levels(prepare_student(config, teacher)[1]))
    return config


def stand_in(config: ConsistencyConfig, setting: Setting) -> Teacher | None:
    """A teacher for where only its scheduler counts, and a network of any size will do."""
    return None if config.unet_config else Teacher(make_unet(setting.size, (8,)), diffusers.DDPMScheduler(), "")


def with_steps(config: ConsistencyConfig, teacher: Teacher | None, passes: int) -> ConsistencyConfig:
    """The config with the most steps that so many forward passes allow, and checkpoints to measure.

    Raises:
        `ValueError`: if they do not allow one.
    """
    student = prepare_student(config, teacher)[1]

    def converting(steps: int) -> int:
        return conversion_steps(changed(config, max_train_steps=steps), teacher, student)

    def cost(steps: int) -> int:
        return total_passes(changed(config, max_train_steps=steps), converting(steps), steps)

    steps = bisect.bisect_right(range(1, passes + 1), passes, key=cost)
    if steps < 1:
        raise ValueError(f"A budget of {passes:,} forward passes is less than one step, which takes {cost(1):,}.")
    total = steps + converting(steps)
    return changed(config, max_train_steps=steps, checkpoint_steps=math.ceil(total / CURVE_POINTS))


def changed(config: ConsistencyConfig, **values: Any) -> ConsistencyConfig:
    """A copy with other values, which are known to be good."""
    found = copy.copy(config)
    for name, value in values.items():
        setattr(found, name, value)
    return found


def common_settings(setting: Setting) -> dict[str, Any]:
    """What all runs on a dataset have in common unless they say otherwise; the rest are the package's defaults."""
    return {
        "sigma_min": 0.02, "sigma_max": setting.sigma_max, "batch_size": 64, "sample_steps": 0, "num_samples": 64,
        "teacher_check": False, "resume": "auto", "tracker": "none", "checkpoint_limit": 1000, **setting.students,
    }  # fmt: skip


def few_step_levels(scheduler: ConsistencyScheduler) -> dict[str, list[float]] | None:
    """Noise levels for two and four steps, out of the grid that a student ends its training on.

    For two steps those of the package; for four sigma_max, and below it the levels nearest to 8, 2 and 1/2 times the
    second of two steps. Without four where the grid has too few; `None` where it has no second.
    """
    stored = scheduler.config.few_step_sigmas
    if stored is None:
        return None
    highest, second = stored["2"]
    left = [sigma for sigma in scheduler.grid[1:-1].tolist() if sigma >= (scheduler.config.sigma_lowest or 0)]
    if len(left) < 3:
        return stored
    levels: list[float] = []
    for factor in (0.5, 2, 8):  # upwards, and each leaves levels for those above it
        levels.insert(0, nearest(left[2 - len(levels) :], factor * second))
        left = [sigma for sigma in left if sigma > levels[0]]
    return {**stored, "4": [highest, *levels]}


def nearest(levels: list[float], wanted: float) -> float:
    """The level with the smallest ratio to the wanted one."""
    return min(levels, key=lambda sigma: abs(math.log(sigma / wanted)))


# What all runs on a dataset share -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def prepare(setting: Setting, folder: Path) -> tuple[Tensor, Evaluator]:
    """The images, and what measures: a classifier that is trained once, the same for all seeds."""
    images, labels = setting.load()
    pixels = eight_bits(images, (-1.0, 1.0))
    place, device = folder / "classifier", PartialState().device
    if not (place / CONFIG).exists():
        DomainClassifier.fit(pixels.to(device), labels, width=16).save(place)
    classifier = DomainClassifier.load(place).to(device)
    features = Features(classifier, f"64 of a small classifier of {setting.name}, not Inception's")
    reference = Reference(pixels, f"the images that {setting.name} is trained on")
    return images, Evaluator(features, reference, setting.num_images, batch_size=250)


def fid(evaluator: Evaluator, sampler: Sampler) -> float | None:
    """FID of a sampler; `None` if its images are not finite."""
    try:
        return round(evaluator.fid(sampler), 4)
    except FloatingPointError:
        return None


def teacher_folder(folder: Path, seed: int) -> Path:
    return folder / f"teacher-{seed}"


def make_teacher(setting: Setting, folder: Path, seed: int) -> Teacher:
    """The teacher of a seed: the one in its folder, or else it is trained now."""
    place = teacher_folder(folder, seed)
    settings = {
        "channels": list(setting.channels),
        "steps": setting.teacher_steps,
        "batch_size": setting.teacher_batch,
        "learning_rate": setting.teacher_rate,
    }
    if (place / "training.json").exists():
        found = json.loads((place / "training.json").read_text())
        compare(place, found["settings"], settings)
        return load_teacher(place)
    images, _ = prepare(setting, folder)
    torch.manual_seed(seed)
    unet = make_unet(setting.size, setting.channels).to(PartialState().device)
    start = time.perf_counter()
    teacher = train_teacher(unet, images, setting.teacher_steps, setting.teacher_batch, setting.teacher_rate)
    seconds = round(time.perf_counter() - start, 1)
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    diffusers.DDPMPipeline(teacher.unet, teacher.scheduler).save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps({"settings": settings, "seconds": seconds}, indent=2) + "\n")
    os.replace(partial, place)
    return teacher


def compare(place: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """See that what was kept is what would be made now.

    Raises:
        `ValueError`: if it is not, naming each difference.
    """
    differences = [f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in now if was.get(name) != now[name]]
    if differences:
        raise ValueError(
            f"{place} is of another study: {'; '.join(differences)}. Delete it, or take another `--output_dir`."
        )


def measure_teacher(setting: Setting, folder: Path, seed: int) -> list[dict[str, Any]]:
    """FID of the teacher of a seed over solvers and numbers of evaluations, each kept beside it once it is known."""
    file = teacher_folder(folder, seed) / "figures.json"
    teacher, (_, evaluator) = make_teacher(setting, folder, seed), prepare(setting, folder)
    protocol = dataclasses.asdict(evaluator.protocol)
    found = json.loads(file.read_text()) if file.exists() else {"figures": [], "protocol": protocol}
    compare(file, found["protocol"], protocol)
    figures: list[dict[str, Any]] = found["figures"]
    teacher.unet.to(PartialState().device)
    low, high = common_settings(setting)["sigma_min"], setting.sigma_max
    for solver, nfe in TEACHER_SAMPLERS[len(figures) :]:
        sampler = teacher_sampler(teacher, nfe, solver, low, high)
        figures.append({"solver": solver, "nfe": nfe, "fid": fid(evaluator, sampler)})
        if (solver, nfe) == TEACHER_SAMPLERS[-1]:  # that with the most evaluations
            save_samples([sampler], file.with_name(SAMPLES))
        write_whole(file, json.dumps(found, indent=2) + "\n")
    return figures


def save_samples(samplers: Iterable[Sampler], file: Path) -> None:
    """A row of images of each sampler, from the same noise."""
    rows = [sampler.draw(range(SHOWN)) for sampler in samplers]
    image_grid(torch.cat(rows).cpu().permute(0, 2, 3, 1).numpy() / 255, columns=SHOWN, smallest=0).save(file)


# A run ---------------------------------------------------------------------------------------------------------------


def identity(run: Run, evaluator: Evaluator) -> dict[str, Any]:
    """What a result depends on."""
    config = {name: value for name, value in run.config.to_dict().items() if name not in ("output_dir", "resume")}
    scheduler = prepare_student(run.config, stand_in(run.config, run.setting))[1]
    return {**config, "scheduler": identify_scheduler(scheduler), "protocol": dataclasses.asdict(evaluator.protocol)}


def read_result(run: Run) -> dict[str, Any] | None:
    """What was found of a run when it ended; `None` if it has not ended.

    Raises:
        `ValueError`: if the file is of a run with other settings, naming each difference, or is none of ours.
    """
    if not run.result_file.exists():
        return None
    try:
        found = json.loads(run.result_file.read_text())
        was = found["identity"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{run.result_file} holds no result: {error}. Delete it.") from error
    # A field that is younger than the result had its default.
    defaults = {name: value for name, value in ConsistencyConfig().to_dict().items() if name not in was}
    compare(run.result_file, {**defaults, **was}, identity(run, prepare(run.setting, run.folder)[1]))
    return found


def measure_run(run: Run) -> dict[str, Any]:
    """Train a student, or go on where it was, and measure it: along its training in one step, at its end in several.

    Returns:
        `dict[str, Any]`: also written to the result's file. `status` is `ok`, `diverged` (its one-step FID ended at
        more than twice its best) or `not finite`.
    """
    images, evaluator = prepare(run.setting, run.folder)
    teacher = None if run.config.unet_config else make_teacher(run.setting, run.folder, run.seed)
    trainer = ConsistencyTrainer(run.config, teacher and (teacher.unet, teacher.scheduler), images)
    try:
        trainer.train()
        finite = True
    except FloatingPointError:
        finite = False
    curve = measure_curve(trainer, evaluator)
    pipeline = trainer.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    nfes = [nfe for nfe in NFES if nfe == 1 or nfe < pipeline.scheduler.grid_length]
    samplers = {str(nfe): student_sampler(pipeline, nfe) for nfe in nfes if finite}
    found = {nfe: fid(evaluator, sampler) for nfe, sampler in samplers.items()}
    start = method_start(trainer)
    result = {
        "status": status(curve, found), "fid": found, "curve": curve, "seconds": round(trainer.seconds, 1),
        "conversion_steps": start, "steps": trainer.step - start, "identity": identity(run, evaluator),
    }  # fmt: skip
    run.result_file.parent.mkdir(parents=True, exist_ok=True)
    if found and None not in found.values():
        save_samples(samplers.values(), run.samples_file)
    write_whole(run.result_file, json.dumps(result, indent=2) + "\n")
    shutil.rmtree(trainer.memory.folder)
    return result


def measure_curve(trainer: ConsistencyTrainer, evaluator: Evaluator) -> list[dict[str, Any]]:
    """One-step FID of the averages along the method: in checkpoints that are due, not in those of interruptions."""
    pipeline, curve, start = copy.deepcopy(trainer.pipeline()), [], method_start(trainer)
    pipeline.set_progress_bar_config(disable=True)
    for folder in sorted(trainer.memory.folder.glob("step-*")):
        step = int(folder.name.removeprefix("step-"))
        if step > start and (step % trainer.config.checkpoint_steps == 0 or step == trainer.step):
            pipeline.unet.load_state_dict(load_file(folder / "ema.safetensors"))
            passes = total_passes(trainer.config, start, step - start)
            curve.append({"step": step, "passes": passes, "fid": fid(evaluator, student_sampler(pipeline, 1))})
    return curve


def method_start(trainer: ConsistencyTrainer) -> int:
    """The step at which the conversion is over."""
    return next(phase.start for phase in trainer.phases if phase.is_method)


def status(curve: list[dict[str, Any]], found: dict[str, float | None]) -> str:
    last = found.get("1")
    if last is None or None in found.values():
        return NOT_FINITE
    best = min((point["fid"] for point in curve if point["fid"] is not None), default=last)
    return DIVERGED if last > 2 * best else OK
