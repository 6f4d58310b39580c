"""`cm-diffusers evaluate`: a student and its teacher, measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cm_diffusers.commands.measuring import at_least, load_evaluator, load_student, measuring_parser, process_state
from cm_diffusers.commands.options import Parser


def evaluate(arguments: Sequence[str]) -> None:
    """`cm-diffusers evaluate`: writes `report.json`, `report.md`, plots and pictures."""
    options = _parser().parse_args(arguments)
    from cm_diffusers.evaluation import Report, student_sampler, teacher_sampler
    from cm_diffusers.evaluation.artefacts import write_artefacts
    from cm_diffusers.evaluation.in_loop import HISTORY, read_history
    from cm_diffusers.training.runtime import on_main
    from cm_diffusers.training.teacher import load_teacher

    state = process_state()
    student = load_student(options)
    evaluator = load_evaluator(options, student, options.repeats)
    samplers = [student_sampler(student, nfe, options.guidance_scale) for nfe in options.nfes]
    if options.teacher:
        teacher = load_teacher(options.teacher, options.teacher_revision, options.teacher_prediction_type)
        teacher.unet.to(state.device)
        config, guidance = student.scheduler.config, options.teacher_guidance_scale
        how = (options.teacher_solver, config.sigma_min, config.sigma_max, guidance, student.config.null_class_label)
        samplers += [teacher_sampler(teacher, nfe, *how) for nfe in options.teacher_nfes]
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


def _parser() -> Parser:
    parser, some = measuring_parser("evaluate"), at_least(1)
    parser.add_argument("--repeats", type=some, default=1, help="figures with other seeds, for a spread (default: 1)")
    parser.add_argument("--nfes", type=some, nargs="+", default=[1, 2, 4], help="the student's steps (default: 1 2 4)")
    parser.add_argument("--teacher", help="folder or Hub id of the teacher, to be measured, too")
    parser.add_argument("--teacher_revision", help="its branch, tag or commit on the Hub")
    parser.add_argument(
        "--teacher_prediction_type", help="what its network predicts, where its scheduler's config is wrong"
    )
    parser.add_argument(
        "--teacher_nfes", type=some, nargs="+", default=[19, 35, 79], help="its evaluations (default: 19 35 79)"
    )
    parser.add_argument(
        "--teacher_solver", choices=("heun", "euler"), default="heun", help="its sampler; euler is DDIM"
    )
    parser.add_argument("--teacher_guidance_scale", type=float, default=1.0, help="its guidance (default: 1, off)")
    parser.add_argument(
        "--output_dir", default="outputs/evaluation", help="where the report goes; added to if it is there"
    )
    return parser
