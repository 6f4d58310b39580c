"""What an evaluation leaves in a folder, beside its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from cm_diffusers.evaluation.evaluate import Evaluator
from cm_diffusers.evaluation.neighbours import nearest
from cm_diffusers.evaluation.plots import plot_nfe, plot_training, save_neighbours, save_pictures
from cm_diffusers.evaluation.results import Report, write_whole
from cm_diffusers.evaluation.sampling import Sampler

SHOWN, SHOWN_NEIGHBOURS = 64, 8


def write_artefacts(
    folder: Path, report: Report, evaluator: Evaluator, samplers: Sequence[Sampler],
    history: Sequence[Mapping[str, Any]] = (),
) -> None:  # fmt: skip
    """`report.md`, `fid.png`, with CLIP scores `clip_score.png`, a grid of samples each, and `neighbours.png` of the
    first sampler's.

    Called by all processes; the main one writes.

    Args:
        history (`Sequence[Mapping]`): figures of the student's training, which make a `training.png`.
    """
    real = evaluator.real
    if not PartialState().is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    plot_nfe(report, folder / "fid.png")
    if evaluator.clip is not None:
        plot_nfe(report, folder / "clip_score.png", "clip_score")
    if history:
        plot_training(history, folder / "training.png")
    text = [report.table()]
    for sampler in samplers:
        images = draw(sampler, SHOWN, evaluator.batch_size)
        save_pictures(images, folder / f"samples-{sampler.model}-nfe-{sampler.nfe}.png")
        if sampler is samplers[0]:
            found = nearest(evaluator.features(images.to(PartialState().device))[0].cpu(), real)
            save_neighbours(
                images[:SHOWN_NEIGHBOURS], evaluator.reference.images, found.first(SHOWN_NEIGHBOURS),
                folder / "neighbours.png",
            )  # fmt: skip
            text.append(
                f"Nearest reference images of {len(images)} samples in {sampler.nfe} NFE: the median distance is "
                f"{found.distances[:, 0].median() / found.typical:.2f} of that between reference images; "
                f"{100 * found.share_of_copies:.0f} % are nearer than a third of it, as copies would be "
                "(neighbours.png)."
            )
    write_whole(folder / "report.md", "\n\n".join(text) + "\n")


@torch.no_grad()
def draw(sampler: Sampler, count: int, batch_size: int) -> Tensor:
    """The images of the seeds 0 to `count - 1`, on the CPU."""
    seeds = list(range(count))
    return torch.cat([sampler.draw(seeds[i : i + batch_size]).cpu() for i in range(0, count, batch_size)])
