"""`cm-diffusers evaluate`: a student and its teacher, measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
        teacher = load_teacher(options.teacher)
        teacher.unet.to(state.device)
        config, guidance = student.scheduler.config, options.teacher_guidance_scale
        how = (options.teacher_solver, config.sigma_min, config.sigma_max, guidance, student.config.null_class_label)
        samplers += [teacher_sampler(teacher, nfe, *how) for nfe in options.teacher_nfes]
    folder = Path(options.output_dir)
    report = Report.load(folder / "report.json") if (folder / "report.json").exists() else Report()
    for sampler in samplers:
        report.add(evaluator.measure(sampler))
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            report.save(folder / "report.json")
    write_artefacts(folder, report, evaluator, samplers)
    if state.is_main_process:
        print(f"\n{report.table()}\n\nPlots and pictures are in {folder}.")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("evaluate")
    parser.add_argument("model", metavar="PATH", help="folder or Hub id of the student")
    parser.add_argument("--dataset", required=True, help="the images to resemble: Hub id, folder or file")
    parser.add_argument("--dataset_name", help="configuration of the dataset")
    parser.add_argument("--dataset_split", default="train", help="split of the dataset (default: train)")
    parser.add_argument("--data_files", nargs="+", help="files or URLs of the dataset, with wildcards")
    parser.add_argument("--image_column", help="column of images; found by itself when there is one")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as it comes; needs --num_reference")
    parser.add_argument("--num_reference", type=int, help="how many of its images, the first (default: all)")
    parser.add_argument(
        "--features", default="inception",
        help="inception (default), the folder of a classifier, or package.module:function that returns a network",
    )  # fmt: skip
    parser.add_argument("--num_images", type=int, default=10_000, help="images drawn for a figure (default: 10000)")
    parser.add_argument("--repeats", type=int, default=1, help="figures with other seeds, for a spread (default: 1)")
    parser.add_argument("--nfes", type=int, nargs="+", default=[1, 2, 4], help="the student's steps (default: 1 2 4)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="the student's guidance (default: 1, off)")
    parser.add_argument("--teacher", help="folder or Hub id of the teacher, to be measured, too")
    parser.add_argument(
        "--teacher_nfes", type=int, nargs="+", default=[19, 35, 79], help="its evaluations (default: 19 35 79)"
    )
    parser.add_argument(
        "--teacher_solver", choices=("heun", "euler"), default="heun", help="its sampler; euler is DDIM"
    )
    parser.add_argument("--teacher_guidance_scale", type=float, default=1.0, help="its guidance (default: 1, off)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once, on each process (default: 64)")
    parser.add_argument(
        "--output_dir", default="outputs/evaluation", help="where the report goes; added to if it is there"
    )
    return parser


def _reference(options: argparse.Namespace, student: Any) -> Any:
    from accelerate import PartialState

    from cm_diffusers.evaluation import Reference
    from cm_diffusers.training.data import load_image_dataset, prepare_dataset
    from cm_diffusers.training.images import ImageSpec

    with PartialState().main_process_first():
        dataset = load_image_dataset(
            options.dataset, name=options.dataset_name, split=options.dataset_split, streaming=options.streaming,
            data_files=options.data_files,
        )  # fmt: skip
    config = student.unet.config
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    prepared = prepare_dataset(
        dataset, ImageSpec(config.in_channels, height, width), image_column=options.image_column, on_bad_image="skip"
    )
    name = (
        f"{Path(options.dataset).name if Path(options.dataset).exists() else options.dataset}/{options.dataset_split}"
    )
    return Reference.from_dataset(prepared, name, options.num_reference)
