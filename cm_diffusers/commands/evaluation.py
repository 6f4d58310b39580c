"""`cm-diffusers evaluate`: a student and its teacher, measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cm_diffusers.commands import evaluation_of_text as of_text
from cm_diffusers.commands.measuring import at_least, load_evaluator, load_student, measuring_parser, process_state
from cm_diffusers.commands.options import Parser, add_guidance

TEACHER_NFES, TEACHER_SOLVER = [19, 35, 79], "heun"


def evaluate(arguments: Sequence[str]) -> None:
    """`cm-diffusers evaluate`: writes `report.json`, `report.md`, plots and pictures."""
    options = _parser().parse_args(arguments)
    from cm_diffusers.evaluation import Report
    from cm_diffusers.evaluation.artefacts import write_artefacts
    from cm_diffusers.evaluation.in_loop import HISTORY, read_history
    from cm_diffusers.pipelines.text import takes_prompts
    from cm_diffusers.training.runtime import disconnect, on_main

    state = process_state()
    student = load_student(options, options.base)
    if takes_prompts(student):
        evaluator = of_text.load_evaluator(options, student)
        samplers = of_text.make_samplers(options, student, evaluator.prompts.texts)
    else:
        of_text.refuse_options(options)
        samplers = _samplers(options, student)  # first, as what cannot be drawn is refused before images are read
        evaluator = load_evaluator(options, student, options.repeats)
    folder = Path(options.output_dir)
    file = folder / "report.json"

    def begin() -> Report:
        folder.mkdir(parents=True, exist_ok=True)
        report = Report.load(file) if file.exists() else Report()
        for sampler in samplers:
            report.check(evaluator.protocol, sampler.model, sampler.digest)
        return report

    report: Report = on_main(state, begin)
    for sampler in samplers:
        report.add(evaluator.measure(sampler))
        on_main(state, lambda: report.save(file))
    write_artefacts(folder, report, evaluator, samplers, read_history(Path(options.model) / HISTORY))
    if state.is_main_process:
        print(f"\n{report.table()}\n\nPlots and pictures are in {folder}.")
    disconnect(state)


def _samplers(options: argparse.Namespace, student: Any) -> list[Any]:
    from cm_diffusers.evaluation import student_sampler, teacher_sampler
    from cm_diffusers.training.teacher import load_teacher

    guidance = 1.0 if options.guidance_scale is None else options.guidance_scale
    samplers = [student_sampler(student, nfe, guidance) for nfe in options.nfes]
    if options.teacher:
        teacher = load_teacher(options.teacher, options.teacher_revision, options.teacher_prediction_type)
        teacher.unet.to(process_state().device)
        config, solver = student.scheduler.config, options.teacher_solver or TEACHER_SOLVER
        guidance = 1.0 if options.teacher_guidance_scale is None else options.teacher_guidance_scale
        how = (solver, config.sigma_min, config.sigma_max, guidance, student.config.null_class_label)
        samplers += [teacher_sampler(teacher, nfe, *how) for nfe in options.teacher_nfes or TEACHER_NFES]
    return samplers


def _parser() -> Parser:
    parser, some = measuring_parser("evaluate"), at_least(1)
    add_guidance(parser, of_text=True)
    parser.add_argument("--repeats", type=some, default=1, help="figures with other seeds, for a spread (default: 1)")
    parser.add_argument("--nfes", type=some, nargs="+", default=[1, 2, 4], help="the student's steps (default: 1 2 4)")
    parser.add_argument("--teacher", help="folder or Hub id of the teacher, to be measured, too")
    parser.add_argument("--teacher_revision", help="its branch, tag or commit on the Hub")
    parser.add_argument(
        "--teacher_prediction_type", help="what its network predicts, where its scheduler's config is wrong"
    )
    parser.add_argument(
        "--teacher_nfes", type=some, nargs="+",
        help="its evaluations (default: 19 35 79); of text, the steps of its own scheduler (default: 25 50)",
    )  # fmt: skip
    parser.add_argument(
        "--teacher_solver", choices=("heun", "euler"), help="its sampler (default: heun); euler is DDIM"
    )
    parser.add_argument("--teacher_guidance_scale", type=float, help="its guidance (default: 1, off; of text 7.5)")
    of_text.add_options(parser)
    parser.add_argument(
        "--output_dir", default="outputs/evaluation", help="where the report goes; added to if it is there"
    )
    return parser
