"""Pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cm_diffusers.evaluation.neighbours import Neighbours
from cm_diffusers.evaluation.results import TITLES, Report
from cm_diffusers.image_grid import save_grid


def plot_nfe(report: Report, path: str | Path, metric: str = "fid") -> None:
    """A metric over the number of network evaluations, a line for every model and sampler, with its spread."""
    figure, axis = _figure()
    for model, sampler in dict.fromkeys((r.model, r.sampler) for r in report.results):
        line = [r for r in report.of(model) if r.sampler == sampler]
        axis.errorbar(
            [r.nfe for r in line], [r.metrics[metric] for r in line],
            yerr=[r.spread.get(metric, 0.0) for r in line] if any(r.spread for r in line) else None,
            marker="o", capsize=3, label=f"{model}, {sampler}",
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xticks(sorted({r.nfe for r in report.results}))
    axis.set_xlabel("network evaluations per image")
    axis.set_ylabel(TITLES.get(metric, metric))
    axis.legend()
    _save(figure, path)


def plot_training(history: Sequence[Mapping[str, Any]], path: str | Path, metric: str = "fid") -> None:
    """A metric over training, a line for every number of evaluations, under the protocol of the last figure.

    Args:
        history (`Sequence[Mapping]`): of `step`, `nfe` and metrics, as a run writes them to `evaluation.jsonl`.
    """
    figure, axis = _figure()
    history = [entry for entry in history if entry.get("protocol") == history[-1].get("protocol")]
    for nfe in sorted({entry["nfe"] for entry in history}):
        line = sorted((entry["step"], entry[metric]) for entry in history if entry["nfe"] == nfe)
        axis.plot(*zip(*line, strict=True), marker="o", label=f"{nfe} NFE")
    if all(entry[metric] > 0 for entry in history):
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel(TITLES.get(metric, metric))
    axis.legend()
    _save(figure, path)


def save_neighbours(samples: Tensor, reference: Tensor, found: Neighbours, path: str | Path) -> None:
    """A row for every sample: the sample, then the reference images nearest to it.

    Args:
        samples (`Tensor` of shape `(n, channels, height, width)`): in uint8.
        reference (`Tensor` of shape `(m, channels, height, width)`): in uint8.
        found ([`~cm_diffusers.evaluation.neighbours.Neighbours`]): of those samples.
    """
    rows = [
        picture
        for sample, nearest in zip(samples, found.rows, strict=True)
        for picture in (sample, *reference[nearest])
    ]
    save_pictures(rows, path, columns=1 + found.rows.shape[1])


def save_pictures(images: Sequence[Tensor] | Tensor, path: str | Path, columns: int | None = None) -> None:
    """A grid of images in uint8."""
    save_grid([image.permute(1, 2, 0).numpy() / 255 for image in images], Path(path), columns)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.grid(alpha=0.3)
    return figure, axis


def _save(figure: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
