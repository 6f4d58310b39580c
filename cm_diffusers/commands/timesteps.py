"""`cm-diffusers timesteps`: the noise levels of few-step sampling, searched on FID and stored with the student."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cm_diffusers.commands.measuring import at_least, load_evaluator, load_student, measuring_parser, process_state
from cm_diffusers.commands.options import Parser, add_guidance


def timesteps(arguments: Sequence[str]) -> None:
    """`cm-diffusers timesteps`: prints every measurement and a table; levels are stored as soon as they are found."""
    options = _parser().parse_args(arguments)
    from cm_diffusers.evaluation.timestep_search import levels_text, search_levels, store_levels
    from cm_diffusers.pipelines.loading import refuse_prompts
    from cm_diffusers.training.runtime import disconnect, on_main

    state, folder = process_state(), Path(options.model)
    if not options.dry_run:
        on_main(state, functools.partial(_check_storable, folder))
    refuse_prompts(folder, options.revision)
    student = load_student(options)
    for steps in options.nfes:
        student.scheduler.levels_for(steps)  # what its grid does not have is refused before the images are read

    def watch(sigmas: Sequence[float], fid: float) -> None:
        if state.is_main_process:
            print(f"{len(sigmas)} steps at σ = {levels_text(sigmas)}: FID {fid:.4g}", flush=True)

    evaluator, found = load_evaluator(options, student), {}
    for steps, levels in search_levels(student, evaluator, options.nfes, options.guidance_scale, watch):
        found[steps] = levels
        if levels.is_better and not options.dry_run:
            on_main(state, functools.partial(store_levels, folder, {steps: levels.sigmas}))
    if state.is_main_process:
        print(f"\n{_table(found)}\n\n{_outcome(folder, found, options.dry_run)}")
    disconnect(state)


def _parser() -> Parser:
    parser = measuring_parser("timesteps")
    add_guidance(parser)
    parser.add_argument(
        "--nfes", type=at_least(2), nargs="+", default=[2, 4],
        help="numbers of steps to search for; the way to 4 leads over 2 and 3 (default: 2 4)",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="store nothing; PATH may then be a Hub id")
    return parser


def _check_storable(folder: Path) -> None:
    """See that levels can be stored, before hours are spent on finding them.

    Raises:
        `ValueError`: if there is no folder of a student.
        `OSError`: if it cannot be written to.
    """
    place = folder / "scheduler"
    if not place.is_dir():
        raise ValueError(
            f"{folder} is no folder of a student, in which levels could be stored. One of the Hub comes to this "
            f"machine by `hf download {folder} --local-dir FOLDER`; --dry_run searches without storing."
        )
    with tempfile.TemporaryFile(dir=place):
        pass


def _table(found: Mapping[int, Any]) -> str:
    from cm_diffusers.evaluation.timestep_search import levels_text

    rows = [["steps", "σ before", "FID", "σ now", "FID"], ["---"] * 5]
    for steps, levels in found.items():
        unchanged = "the same" if levels.tried > 1 else "the same: the grid has no level to add"
        now = [levels_text(levels.sigmas), f"{levels.fid:.4g}"] if levels.is_better else [unchanged, ""]
        rows.append([str(steps), levels_text(levels.sigmas_before), f"{levels.fid_before:.4g}", *now])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _outcome(folder: Path, found: Mapping[int, Any], dry_run: bool) -> str:
    better = [str(steps) for steps, levels in found.items() if levels.is_better]
    if not better:
        return f"Nothing better was found: {folder} is as it was."
    if dry_run:
        return "Nothing was stored (--dry_run)."
    return (
        f"Stored in {folder}: with {' and '.join(better)} steps it is sampled at these levels from now on. What was "
        "measured before was another student: evaluate it anew, into a folder without a report."
    )
