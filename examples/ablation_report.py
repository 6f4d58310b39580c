"""The table and the plots of an ablation."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation_budget import passes_text
from ablation_runs import NFES, OK, SAMPLES, Run, Setting, prepare, teacher_folder

from cm_diffusers.evaluation.results import write_whole

SOLVERS = {"euler": "DDIM", "heun": "Heun"}


def write_report(
    runs: Sequence[Run], results: Mapping[str, dict[str, Any]], teachers: Mapping[int, list[dict[str, Any]]],
    budget: float,
) -> None:  # fmt: skip
    """`report.md`, and `training.png`, `steps.png` and `samples.png` when there is something to show.

    Args:
        runs (`Sequence[Run]`): of the study, done or not.
        results (`Mapping`): of those that are done, by their titles.
        teachers (`Mapping`): the figures of each seed's.
        budget (`float`): in trainings of the teacher.
    """
    folder, setting = runs[0].report_folder, runs[0].setting
    groups = group_results(runs, results)
    folder.mkdir(parents=True, exist_ok=True)
    if any(groups.values()):
        best = statistics.fmean(map(best_of, teachers.values()))
        plot_training(groups, setting, best, folder / "training.png")
        plot_steps(groups, teachers, folder / "steps.png")
        show_samples(runs, folder / SAMPLES)
    write_whole(folder / "report.md", report_text(runs, groups, teachers, budget))


def group_results(runs: Sequence[Run], results: Mapping[str, dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of each run's name, by seed."""
    groups: dict[str, dict[int, dict[str, Any]]] = {run.name: {} for run in runs}
    for run in runs:
        if run.title in results:
            groups[run.name][run.seed] = results[run.title]
    return groups


def best_of(figures: Iterable[Mapping[str, Any]]) -> float:
    """The lowest FID of a teacher."""
    return min(entry["fid"] for entry in figures)


# The table ----------------------------------------------------------------------------------------------------------


def report_text(
    runs: Sequence[Run], groups: Mapping[str, dict[int, dict[str, Any]]],
    teachers: Mapping[int, list[dict[str, Any]]], budget: float,
) -> str:  # fmt: skip
    setting, seeds = runs[0].setting, sorted({run.seed for run in runs})
    protocol = prepare(setting, runs[0].folder)[1].protocol
    lines = [
        f"# {runs[0].study}, {setting.name}", "",
        f"Every run has the compute of {plural(budget, 'training')} of the teacher: "
        f"{budget * setting.teacher_passes:,.0f} forward passes of one image. Seconds are of training alone.",
        f"FID of {protocol}: mean ± standard deviation over {plural(len(seeds), 'seed')}, teachers and students "
        f"alike. Ratios, in {', '.join(map(str, NFES))} steps, are to the best of each seed's own teacher.", "",
        table(["run", "passes a step", "steps", *(f"FID, {plural(nfe, 'step')}" for nfe in NFES),
               "over teacher's best", "seconds", "levels of 2 and 4 steps", "remarks"],
              [run_row(run, groups[run.name], teachers, seeds) for run in runs if run.seed == runs[0].seed]), "",
        table(["teacher", "evaluations", "FID"], teacher_rows(teachers)), "",
        "The best of each seed's teacher: " + figure([best_of(figures) for figures in teachers.values()]) + ".", "",
        "![FID over training](training.png)", "", "![FID over sampling steps](steps.png)", "",
        "![Samples in 1, 2 and 4 steps, and the teacher's](samples.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def plural(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'s' * (count != 1)}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def run_row(
    run: Run, found: Mapping[int, dict[str, Any]], teachers: Mapping[int, list[dict[str, Any]]], seeds: Sequence[int]
) -> list[str]:
    config = run.config
    levels = config.few_step_sigmas or {}
    final = [final_figures(found, nfe) for nfe in NFES]
    figures, ratios = [figure(list(fids.values())) for fids in final], [ratio_to_teacher(f, teachers) for f in final]
    seconds = figure([result["seconds"] for result in found.values() if "seconds" in result], "{:.0f}")
    shown = "; ".join(", ".join(f"{sigma:.3g}" for sigma in levels[nfe]) for nfe in ("2", "4") if nfe in levels)
    return [
        run.name, passes_text(config), f"{config.max_train_steps:,}", *figures, ", ".join(ratios), seconds,
        shown or "-", remarks(found, seeds),
    ]  # fmt: skip


def final_figures(found: Mapping[int, dict[str, Any]], nfe: int) -> dict[int, float]:
    """The FID of each seed that has one."""
    return {seed: fid for seed, result in found.items() if (fid := result["fid"].get(str(nfe))) is not None}


def ratio_to_teacher(figures: Mapping[int, float], teachers: Mapping[int, list[dict[str, Any]]]) -> str:
    """The mean ratio of students' figures to the best of their own teachers, as teachers differ from seed to seed."""
    ratios = [fid / best_of(teachers[seed]) for seed, fid in figures.items()]
    return f"{statistics.fmean(ratios):.2f} ×" if ratios else "-"


def figure(values: Sequence[float], form: str = "{:.3f}") -> str:
    """Mean and spread."""
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def remarks(found: Mapping[int, dict[str, Any]], seeds: Sequence[int]) -> str:
    """Which seeds did not go well, and which are still to come."""
    by_kind = defaultdict(list)
    for seed in seeds:
        by_kind[found[seed]["status"] if seed in found else "to come"].append(str(seed))
    return "; ".join(f"{kind}: seed {', '.join(which)}" for kind, which in by_kind.items() if kind != OK)


def teacher_rows(teachers: Mapping[int, list[dict[str, Any]]]) -> list[list[str]]:
    return [[SOLVERS[solver], str(nfe), figure(values)] for (solver, nfe), values in by_sampler(teachers).items()]


def by_sampler(teachers: Mapping[int, list[dict[str, Any]]]) -> dict[tuple[str, int], list[float]]:
    """FID of each seed's teacher, by solver and number of evaluations."""
    found = defaultdict(list)
    for figures in teachers.values():
        for entry in figures:
            found[entry["solver"], entry["nfe"]].append(entry["fid"])
    return found


# The plots ----------------------------------------------------------------------------------------------------------


def plot_training(
    groups: Mapping[str, dict[int, dict[str, Any]]], setting: Setting, teacher: float, path: Path
) -> None:
    """One-step FID over training steps (Song et al. 2023, figure 3), and over compute; means with their range."""
    figure_, axes = new_figure(2)
    for place, (name, found) in enumerate(groups.items()):
        for axis, unit, scale in ((axes[0], "step", 1), (axes[1], "passes", setting.teacher_passes)):
            series = defaultdict(list)
            for result in found.values():
                for point in result["curve"]:
                    if point["fid"] is not None:
                        series[point[unit] / scale].append(point["fid"])
            draw_line(axis, series, name, place)
    axes[0].set_xlabel("training step")
    axes[1].set_xlabel("compute, in trainings of the teacher")
    finish(figure_, axes, teacher, path)


def plot_steps(
    groups: Mapping[str, dict[int, dict[str, Any]]], teachers: Mapping[int, list[dict[str, Any]]], path: Path
) -> None:
    """FID over the number of evaluations, of students and teachers; means with their range."""
    figure_, axes = new_figure(1)
    for place, (name, found) in enumerate(groups.items()):
        series = {nfe: list(values.values()) for nfe in NFES if (values := final_figures(found, nfe))}
        draw_line(axes[0], series, name, place)
    for solver, marker in (("euler", "s"), ("heun", "D")):
        series = {nfe: values for (of, nfe), values in by_sampler(teachers).items() if of == solver}
        draw_line(axes[0], series, f"teacher, {SOLVERS[solver]}", None, marker)
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].set_xlabel("network evaluations per image")
    finish(figure_, axes, statistics.fmean(map(best_of, teachers.values())), path)


def new_figure(panels: int) -> tuple[Any, Sequence[Any]]:
    figure_ = empty_figure(2 + 5 * panels, 4.5)
    return figure_, figure_.subplots(1, panels, squeeze=False, sharey=True)[0]


def empty_figure(width: float, height: float) -> Any:
    """In inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure_ = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure_)
    return figure_


def draw_line(
    axis: Any, series: Mapping[float, list[float]], label: str, place: int | None, marker: str = "o"
) -> None:
    """Means over a band from the lowest to the highest seed; black where there is no `place` among the runs."""
    if not series:
        return
    where, style = sorted(series), {"color": "black", "linestyle": ":"}
    if place is not None:
        style = {"color": f"C{place % 10}", "linestyle": ("-", "--", "-.")[place // 10 % 3]}
    axis.plot(where, [statistics.fmean(series[x]) for x in where], marker=marker, label=label, markersize=4, **style)
    lowest, highest = ([choose(series[x]) for x in where] for choose in (min, max))
    axis.fill_between(where, lowest, highest, color=style["color"], alpha=0.15, linewidth=0)


def finish(figure_: Any, axes: Sequence[Any], teacher: float, path: Path) -> None:
    for axis in axes:
        axis.axhline(teacher, color="black", linewidth=0.8, label="teacher's best")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("FID")
    figure_.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure_.savefig(path, dpi=120)


def show_samples(runs: Sequence[Run], path: Path) -> None:
    """The images of the first seed's teacher and students, from the same noise; a row for each number of steps."""
    from PIL import Image

    first = runs[0]
    files = {"teacher": teacher_folder(first.folder, first.seed) / SAMPLES}
    files |= {run.name: run.samples_file for run in runs if run.seed == first.seed}
    pictures = {name: Image.open(file) for name, file in files.items() if file.exists()}
    height = sum(picture.height for picture in pictures.values())
    width = max((picture.width for picture in pictures.values()), default=0)
    if not height:
        return
    figure_ = empty_figure(12, 11 * height / width)
    ratios = [picture.height for picture in pictures.values()]
    axes = figure_.subplots(len(pictures), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture, cmap="gray", interpolation="nearest", aspect="equal")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure_.savefig(path, dpi=120)
