"""Which choice is better? A grid of them, each trained on the same compute, measured, and shown in a table and plots.

    python examples/ablation.py --study methods --dataset fashion16 --seeds 0 1 2 --jobs 2
    python examples/ablation.py --runs my-runs.yaml --dataset digits --budget 1

Studies, after the ablations of Song et al. 2023:

    methods       every method of the package but `lcm`, with its own defaults
    metric        the distance of consistency distillation: l1, l2, pseudo_huber (lpips: see below)
    solver        the teacher's step, Euler's or Heun's, on 18 and on 40 noise levels
    num_levels    the number of noise levels N
    mu            the decay of the target's average; 0 is the student itself
    data_terms    what distillation gains by real images: a part of the batch, or an adversarial term

or runs of your own: a YAML file of names, each with fields of ConsistencyConfig (`cm-diffusers distill --help`):

    heun: {method: cd, num_levels: 18, distance: pseudo_huber, weighting: inverse_gap}
    euler: {method: cd, num_levels: 18, distance: pseudo_huber, weighting: inverse_gap, solver: euler}

**Compute.** The teacher, a small diffusion model, is trained here, one for each seed. `--budget` counts in such
trainings: a run may take as many steps as fit into so many of them, counted in forward passes of one image: 3 for the
student with its gradient, 1 for the target (2 for the derivative that takes its place in continuous time), 1 or 2 for
the teacher's Euler or Heun step. The student's conversion counts, too; measuring does not. So all runs of a table cost
the same, and take more steps where steps are cheap.

**Measure.** FID of 2,000 samples in 1, 2 and 4 steps against all training images, on features of a small classifier of
the dataset, the same for all seeds; along the training in 1 step. Four steps take sigma_max and the levels of the
student's grid next to 8, 2 and 1/2 times the second of the two-step levels that the package stores. What is not
finite, or ends at more than twice its best FID, is marked in the table.

**LPIPS** enlarges images to 224 pixels for a VGG network: it says nothing of images of 8 or 16 pixels, and takes more
compute than these students by far. The methods that have it by default get the pseudo-Huber distance with
c = 0.03 sqrt(d) and the weight 1 / (sigma - sigma_lower) instead. The study `metric` takes it for `fashion28`, only
where there is an accelerator.

**Time.** All methods on `fashion16` with three seeds take nearly two hours on two cores with `--jobs 2`: a thread for
each run, as two threads of one small network spend their time waiting for each other. `digits` takes a third of
that, and `fashion28` three times as much: take a smaller budget. `fashion28-medium`, with four times its weights and
in bf16, takes two hours for one seed with `--budget 1`, if the processor knows bf16. `fashion28-large`, with sixteen
times the weights, is for a GPU, which several jobs share.

A study that was killed goes on where it was when it is started again: finished runs are read from their result files,
and one under way from its last checkpoint. Everything is in `--output_dir`: the classifier and the teachers of a
dataset, and for each study `report.md`, `training.png`, `steps.png`, `samples.png`, `results/` and `runs/`, with the
students.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from ablation_budget import passes_text
from ablation_report import best_of, write_report
from ablation_runs import Run, Setting, changed, measure_run, measure_teacher, plan, prepare, read_result
from processes import parallel
from small_images import FASHION_MNIST

from cm_diffusers.training.config_values import read_yaml
from cm_diffusers.training.health import EXIT_CODE_PREEMPTED
from cm_diffusers.training.methods import METHODS

FAILED = "failed"

SETTINGS = {
    "digits": Setting("digits", 8, (16, 32), teacher_steps=1500, teacher_batch=64, sigma_max=20.0, huber_c=0.24),
    "fashion16": Setting("fashion16", 16, (16, 32, 32), 1000, 64, sigma_max=80.0, huber_c=0.48),
    "fashion28": Setting("fashion28", 28, (16, 32, 32), 1000, 64, sigma_max=80.0, huber_c=0.84),
    "fashion28-medium": Setting(
        "fashion28-medium", 28, (32, 64, 64), 1000, 96, sigma_max=80.0, huber_c=0.84, teacher_rate=1e-3,
        students={"mixed_precision": "bf16"},
    ),
    "fashion28-large": Setting(
        "fashion28-large", 28, (64, 128, 128), 1000, 256, sigma_max=80.0, huber_c=0.84, teacher_rate=5e-4,
        students={"batch_size": 256, "mixed_precision": "bf16", "channels_last": True, "num_workers": 2},
    ),
}  # fmt: skip
STUDIES = ("methods", "metric", "solver", "num_levels", "mu", "data_terms")


# What is compared ---------------------------------------------------------------------------------------------------


def study_runs(study: str, setting: Setting) -> dict[str, dict[str, Any]]:
    """The runs of a study, as names and fields of the config."""
    lpips_instead = {"distance": "pseudo_huber", "huber_c": setting.huber_c, "weighting": "inverse_gap"}
    if study == "methods":
        perceptual = {name for name, choices in METHODS.items() if choices.get("distance") == "lpips"}
        # Not `lcm`, whose noise levels are the teacher's own timesteps: it is for latents, see text_to_image.py.
        names = [name for name in METHODS if name != "lcm"]
        return {name: {"method": name, **(lpips_instead if name in perceptual else {})} for name in names}
    if study == "data_terms":
        base = {"method": "scd", "real_data": 0.0, "adversarial_weight": 0.0}
        shares = {f"real-{share:g}": {**base, "real_data": share} for share in (0.1, 0.25, 0.5)}
        weights = {f"adversarial-{weight:g}": {**base, "adversarial_weight": weight} for weight in (0.03, 0.1, 0.3)}
        return {"none": base, **shares, **weights}
    base = {"method": "cd", "num_levels": 18, "solver": "heun", "mu": 0.0, **lpips_instead}
    changes: dict[str, dict[str, Any]] = {
        "metric": {
            name: {"distance": name, **({} if name == "pseudo_huber" else {"huber_c": None})}
            for name in metrics(setting)
        },
        "solver": {f"{s}-{n}": {"solver": s, "num_levels": n} for s in ("euler", "heun") for n in (18, 40)},
        "num_levels": {f"N-{n}": {"num_levels": n} for n in (6, 10, 18, 40, 80)},
        "mu": {f"mu-{mu:g}": {"mu": mu} for mu in (0.0, 0.9, 0.95, 0.99, 0.999)},
    }[study]
    return {name: {**base, **change} for name, change in changes.items()}


def metrics(setting: Setting) -> list[str]:
    """The distances that can be compared on a dataset."""
    always = ["l1", "l2", "pseudo_huber"]
    return [*always, "lpips"] if setting.size >= 28 and torch.accelerator.is_available() else always


def own_runs(path: str) -> dict[str, dict[str, Any]]:
    """The runs of a YAML file.

    Raises:
        `ValueError`: if it is not made of names with fields.
    """
    runs = read_yaml(path)
    for name, fields in runs.items():
        if not isinstance(fields, dict):
            raise ValueError(f"The run {name!r} in {path} must be a mapping of fields, got {fields!r}.")
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ValueError(f"{name!r} in {path} cannot be a run's name: letters, digits, '.', '-' and '_' can.")
    return {str(name): fields for name, fields in runs.items()}


def plan_runs(options: argparse.Namespace, setting: Setting) -> list[Run]:
    """All runs, seed by seed: after a third of the time, the whole table is there for a third of the seeds.

    Raises:
        `ValueError`: for a run that cannot work, naming it.
    """
    study = Path(options.runs).stem if options.runs else options.study
    wanted = own_runs(options.runs) if options.runs else study_runs(options.study, setting)
    folder = Path(options.output_dir) / setting.name
    found = []
    for name, fields in wanted.items():
        try:
            config = plan(setting, fields, options.budget)
        except ValueError as error:
            raise ValueError(f"The run {name!r}: {error}") from error
        run = Run(name, 0, config, setting, folder, study)
        print(f"{name}: {config.max_train_steps:,} steps of {passes_text(config)} passes")
        for seed in options.seeds:
            of_seed = dataclasses.replace(run, seed=seed)
            config = changed(config, seed=seed, output_dir=str(of_seed.output_dir))
            found.append(dataclasses.replace(of_seed, config=config))
    return sorted(found, key=lambda run: options.seeds.index(run.seed))


# How it is done -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--study", choices=STUDIES)
    what.add_argument("--runs", metavar="FILE", help="YAML file of your own runs")
    parser.add_argument("--dataset", choices=SETTINGS, default="digits", help="default: digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--budget", type=float, default=3.0, help="of a run, in trainings of the teacher (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; they share torch's threads")
    parser.add_argument("--data_dir", default=FASHION_MNIST, help=f"the IDX files (default: {FASHION_MNIST})")
    parser.add_argument("--output_dir", default="outputs/ablation", help="default: outputs/ablation")
    options = parser.parse_args()
    options.seeds = list(dict.fromkeys(options.seeds))
    setting = dataclasses.replace(SETTINGS[options.dataset], data_dir=options.data_dir)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_CODE_PREEMPTED))
    try:
        runs = plan_runs(options, setting)
        prepare(setting, runs[0].folder)
        results = {run.title: result for run in runs if (result := read_result(run)) is not None}
        carry_out(runs, results, options)
    except ValueError as error:
        parser.error(str(error))
    except BrokenProcessPool:
        sys.exit("A process was killed, perhaps for its memory. Start again: the study goes on where it was.")
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"The table is in {runs[0].report_folder / 'report.md'}.")
    if failed := [title for title, result in results.items() if result["status"].startswith(FAILED)]:
        sys.exit(f"{', '.join(failed)} failed. Start again to try them again.")


def carry_out(runs: Sequence[Run], results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Train and measure teachers, then those of the runs that are not among the results, and add them."""
    setting, folder, place = runs[0].setting, runs[0].folder, runs[0].report_folder
    teachers = {}
    for seed, figures in parallel(
        do_teacher, [(setting, folder, seed) for seed in options.seeds], options.jobs, place
    ):
        print(f"teacher, seed {seed}: FID {best_of(figures):.3f} at best", flush=True)
        teachers[seed] = figures
    left = [run for run in runs if run.title not in results]
    for run, result in parallel(do_run, left, options.jobs, place):
        print(f"{run.name}, seed {run.seed}: {summary(result)}", flush=True)
        results[run.title] = result
        write_report(runs, results, teachers, options.budget)
    if not left:
        write_report(runs, results, teachers, options.budget)


def do_teacher(task: tuple[Setting, Path, int]) -> tuple[int, list[dict[str, Any]]]:
    """The seed of a teacher, and its figures."""
    return task[2], measure_teacher(*task)


def do_run(run: Run) -> tuple[Run, dict[str, Any]]:
    """A run and its result; or what went wrong, so that the others can go on. It is tried again the next time."""
    try:
        return run, measure_run(run)
    except Exception as error:
        traceback.print_exc()
        return run, {"status": f"{FAILED} ({type(error).__name__})", "error": str(error), "fid": {}, "curve": []}


def summary(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{result['status']}: {result['error']}"
    figures = ", ".join("-" if fid is None else f"{fid:.3f}" for fid in result["fid"].values())
    return (
        f"{result['status']}, {result['seconds']:.0f} s"
        + f", FID {figures} in {', '.join(result['fid'])} steps" * bool(figures)
    )


if __name__ == "__main__":
    main()
