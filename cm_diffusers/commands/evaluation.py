"""`cm-diffusers evaluate`: a student and its teacher, measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cm_diffusers.commands.options import Parser


def evaluate(arguments: Sequence[str]) -> None:
    """`cm-diffusers evaluate`: writes `report.json`, `report.md`, plots and pictures."""
    options = _parser().parse_args(arguments)
    import torch
    from accelerate import PartialState

    from cm_diffusers import ConsistencyPipeline
    from cm_diffusers.evaluation import Evaluator, Report, load_features, student_sampler, teacher_sampler
    from cm_diffusers.evaluation.artefacts import write_artefacts
    from cm_diffusers.evaluation.in_loop import HISTORY, read_history
    from cm_diffusers.training.runtime import on_main
    from cm_diffusers.training.teacher import load_teacher

    state = PartialState(cpu=not torch.accelerator.is_available())
    student = ConsistencyPipeline.from_pretrained(options.model).to(state.device)
    student.set_progress_bar_config(disable=True)
    evaluator = Evaluator(
        load_features(options.features, state.device), _reference(options, student), options.num_images,
        options.repeats, options.batch_size,
    )  # fmt: skip
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser("evaluate")
    some, several = _at_least(1), _at_least(2)
    parser.add_argument("model", metavar="PATH", help="folder or Hub id of the student")
    parser.add_argument("--dataset", required=True, help="the images to resemble: Hub id, folder or file")
    parser.add_argument("--dataset_name", help="configuration of the dataset")
    parser.add_argument("--dataset_split", default="train", help="split of the dataset (default: train)")
    parser.add_argument("--data_files", nargs="+", help="files or URLs of the dataset, with wildcards")
    parser.add_argument("--image_column", help="column of images; found by itself when there is one")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as it comes; needs --num_reference")
    parser.add_argument("--num_reference", type=several, help="how many of its images (default: all)")
    parser.add_argument(
        "--features", default="inception",
        help="inception (default), the folder of a classifier, or package.module:function that returns a network",
    )  # fmt: skip
    parser.add_argument(
        "--num_images", type=several, default=10_000, help="images drawn for a figure (default: 10000)"
    )
    parser.add_argument("--repeats", type=some, default=1, help="figures with other seeds, for a spread (default: 1)")
    parser.add_argument("--nfes", type=some, nargs="+", default=[1, 2, 4], help="the student's steps (default: 1 2 4)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="the student's guidance (default: 1, off)")
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
    parser.add_argument("--batch_size", type=some, default=64, help="images at once, on each process (default: 64)")
    parser.add_argument(
        "--output_dir", default="outputs/evaluation", help="where the report goes; added to if it is there"
    )
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return read


def _reference(options: argparse.Namespace, student: Any) -> Any:
    from accelerate import PartialState

    from cm_diffusers.evaluation import Reference
    from cm_diffusers.network_config import height_and_width
    from cm_diffusers.training.data import load_image_dataset, prepare_dataset
    from cm_diffusers.training.images import ImageSpec
    from cm_diffusers.training.record import public_name

    with PartialState().main_process_first():
        dataset = load_image_dataset(
            options.dataset, name=options.dataset_name, split=options.dataset_split, streaming=options.streaming,
            data_files=options.data_files,
        )  # fmt: skip
    config = student.unet.config
    spec = ImageSpec(config.in_channels, *height_and_width(config.sample_size))
    prepared = prepare_dataset(dataset, spec, image_column=options.image_column, on_bad_image="skip")
    name = f"{public_name(options.dataset)}/{options.dataset_split}"
    return Reference.from_dataset(prepared, name, options.num_reference)
