"""The noise levels of few-step sampling, searched one at a time for the lowest FID, and stored with the student."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cm_diffusers.evaluation.evaluate import Evaluator
from cm_diffusers.evaluation.metrics import evenly_spread
from cm_diffusers.evaluation.results import write_whole
from cm_diffusers.evaluation.sampling import student_sampler
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.schedulers import ConsistencyScheduler

T = TypeVar("T")
# Of finer grids so many levels may be tried; at sigma = 1 they are a tenth apart.
MOST_CANDIDATES = 100


@dataclass(frozen=True)
class FewStepLevels:
    """The best noise levels that were measured for a number of steps, and those that were in force before.

    Args:
        sigmas, sigmas_before (`tuple[float, ...]`): descending; the same if nothing better was found.
        fid, fid_before (`float`): of images from the same seeds.
        tried (`int`): how many lists of so many levels were measured: only those before where the grid has no more.
    """

    sigmas: tuple[float, ...]
    fid: float
    sigmas_before: tuple[float, ...]
    fid_before: float
    tried: int

    @property
    def is_better(self) -> bool:
        """Whether there is something to store."""
        return self.fid < self.fid_before


class Measurements:
    """What was measured, so that nothing is measured twice.

    Args:
        measure (`Callable`): from noise levels, descending, to a figure; less is better.
    """

    def __init__(self, measure: Callable[[Sequence[float]], float]) -> None:
        self._measure = measure
        self._known: dict[tuple[float, ...], tuple[float, tuple[float, ...]]] = {}

    def __call__(self, sigmas: Sequence[float]) -> float:
        # Sampling steps through float32: what is the same there is the same.
        key = tuple(np.asarray(sigmas, dtype=np.float32).tolist())
        if key not in self._known:
            self._known[key] = self._measure(sigmas), tuple(sigmas)
        return self._known[key][0]

    def of(self, steps: int) -> list[tuple[float, tuple[float, ...]]]:
        """Figures and levels for a number of steps, as they were measured."""
        return [entry for key, entry in self._known.items() if len(key) == steps]


def ternary_search(measure: Callable[[T], float], candidates: Sequence[T]) -> T:
    """The candidate whose figure is lowest, where figures first fall and then rise.

    Compares the two that divide the range that is left into thirds, and drops all from the worse one on: it measures 8
    of 16 candidates at most, and 16 of 100.

    Args:
        measure (`Callable`): from a candidate to a figure. Remembers what it was asked: some are compared again.
        candidates (`Sequence`): one at least, in an order that makes the figures fall and rise.
    """
    left, right = 0, len(candidates) - 1
    while right - left > 2:
        third = (right - left) // 3
        if measure(candidates[left + third]) <= measure(candidates[right - third]):
            right -= third + 1
        else:
            left += third + 1
    return min(candidates[left : right + 1], key=measure)


def greedy_search(
    measure: Callable[[Sequence[float]], float], grid: Sequence[float], before: Mapping[int, Sequence[float]]
) -> Iterator[tuple[int, FewStepLevels]]:
    """Song et al. 2023, section 3: the levels of multistep sampling, pinpointed one at a time by ternary search.

    The first level is the highest. The best levels for n - 1 steps are kept, and the one after them is searched below
    the last, which assumes that the figure, given the levels before, has one minimum. So the way to four steps leads
    over two and three. Below a level next to the end of the grid there is nothing to search: more steps then stay as
    they are.

    Args:
        measure (`Callable`): from noise levels, descending, to a figure; less is better. Nothing is measured twice.
        grid (`Sequence[float]`): the levels that the student knows, descending. Those between the ends are tried, all
            of up to 100, otherwise 100 spread evenly over their positions.
        before (`Mapping[int, Sequence[float]]`): the levels now in force for each number of steps, 2 at least, that is
            asked for. They are measured, too, so that what is found is never worse.

    Yields:
        `tuple[int, FewStepLevels]`: a number of steps asked for, ascending, and the best levels measured for it.
    """
    known = Measurements(measure)
    levels: tuple[float, ...] = (grid[0],)
    for steps in range(2, max(before) + 1):
        if steps in before:
            known(before[steps])
        extended = [(*levels, sigma) for sigma in _candidates(grid, levels[-1])]
        if extended:
            ternary_search(known, extended)
        measured = known.of(steps)
        if not measured:
            continue  # there is no level below, and so none for more steps either
        fid, levels = min(measured, key=lambda entry: entry[0])
        if steps in before:
            yield steps, FewStepLevels(levels, fid, tuple(before[steps]), known(before[steps]), len(measured))


def _candidates(grid: Sequence[float], above: float) -> list[float]:
    """Levels below `above` and above the last, at which a step does nothing."""
    inner = [sigma for sigma in grid[1:-1] if sigma * (1 + 1e-6) < above]
    return [inner[place] for place in evenly_spread(len(inner), MOST_CANDIDATES).tolist()]


def search_levels(
    pipeline: ConsistencyPipeline, evaluator: Evaluator, steps: Iterable[int], guidance_scale: float = 1.0,
    watch: Callable[[Sequence[float], float], None] = lambda sigmas, fid: None,
) -> Iterator[tuple[int, FewStepLevels]]:  # fmt: skip
    """The levels with the lowest FID for some numbers of steps, by [`greedy_search`] over the student's own grid.

    All candidates are drawn from the same seeds, so that their figures differ by the levels alone. The lowest of many
    figures flatters: what is found is to be measured again, on other seeds, before it is compared with anything else.
    The pipeline stays as it is. Called by all processes.

    Args:
        pipeline ([`ConsistencyPipeline`]): the student, on its device.
        evaluator ([`~cm_diffusers.evaluation.Evaluator`]): measures FID; only its first repetition is used.
        steps (`Iterable[int]`): numbers of steps, each 2 at least.
        guidance_scale (`float`): of a class-conditional student.
        watch (`Callable`): is told of every measurement, its levels and its FID.

    Returns:
        `Iterator[tuple[int, FewStepLevels]]`: what [`greedy_search`] yields, while it is measured.

    Raises:
        `ValueError`: for a number of steps that is less than 2, or more than the grid has levels.
    """
    scheduler = pipeline.scheduler
    before = {int(number): scheduler.levels_for(number).tolist() for number in sorted(steps)}
    if not before or min(before) < 2:
        raise ValueError(f"`steps` must be numbers of at least 2, got {list(before)}.")

    def measure(sigmas: Sequence[float]) -> float:
        stored = with_levels(scheduler, {len(sigmas): sigmas})
        candidate = ConsistencyPipeline(pipeline.unet, stored, pipeline.config.null_class_label)
        candidate.set_progress_bar_config(disable=True)
        fid = evaluator.fid(student_sampler(candidate, len(sigmas), guidance_scale))
        watch(sigmas, fid)
        return fid

    return greedy_search(measure, [scheduler.config.sigma_max, *scheduler.grid[1:].tolist()], before)


def with_levels(scheduler: ConsistencyScheduler, levels: Mapping[int, Sequence[float]]) -> ConsistencyScheduler:
    """The scheduler with other stored levels for some numbers of steps."""
    config = {**scheduler.config, "few_step_sigmas": _stored(scheduler.config, levels), "_use_default_values": []}
    changed: ConsistencyScheduler = ConsistencyScheduler.from_config(config)
    return changed


def store_levels(folder: Path, levels: Mapping[int, Sequence[float]]) -> None:
    """Write levels into the scheduler's config of a saved student, whole or not at all. Nothing else is touched.

    Args:
        folder (`Path`): as `ConsistencyPipeline.save_pretrained` wrote it, under whichever class's name.
        levels (`Mapping[int, Sequence[float]]`): for numbers of steps; those of others stay.

    Raises:
        `ValueError`: if the scheduler cannot have such levels.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["few_step_sigmas"] = _stored(config, levels)
    ConsistencyScheduler.from_config(config)  # refuses what would not load
    write_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _stored(config: Mapping[str, Any], levels: Mapping[int, Sequence[float]]) -> dict[str, list[float]]:
    """`few_step_sigmas` with `levels` in it."""
    kept = {str(steps): list(sigmas) for steps, sigmas in (config.get("few_step_sigmas") or {}).items()}
    return {**kept, **{str(steps): list(sigmas) for steps, sigmas in levels.items()}}


def levels_text(sigmas: Sequence[float]) -> str:
    """Noise levels as people read them."""
    return ", ".join(f"{sigma:.3g}" for sigma in sigmas)
