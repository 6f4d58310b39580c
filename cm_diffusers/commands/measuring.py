"""What commands that measure a student have in common: the student, the images to resemble, and features."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from cm_diffusers.commands.options import Parser, add_student


def measuring_parser(command: str) -> Parser:
    """A parser of the options that say what is measured, and against what.

    Args:
        command (`str`): one of [`~cm_diffusers.commands.options.USAGE`].
    """
    parser = Parser(command)
    some, several = at_least(1), at_least(2)
    add_student(parser)
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
    parser.add_argument("--batch_size", type=some, default=64, help="images at once, on each process (default: 64)")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return read


def process_state() -> Any:
    """What accelerate knows of the processes, of which there may be several on CPUs, too."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def load_student(options: argparse.Namespace, base: str | None = None) -> Any:
    """The student, on the device of this process.

    Args:
        base (`str`, *optional*): for adapters, folder or Hub id of the pipeline that they belong to.
    """
    from cm_diffusers import load_pipeline

    student = load_pipeline(options.model, base, options.revision).to(process_state().device)
    student.set_progress_bar_config(disable=True)
    return student


def load_evaluator(options: argparse.Namespace, student: Any, repeats: int = 1) -> Any:
    """An [`~cm_diffusers.evaluation.Evaluator`] on the features and the images that the options name."""
    from cm_diffusers.evaluation import Evaluator, Reference, load_features

    features = load_features(options.features, process_state().device)
    images, name = load_images(options, student), data_name(options)
    reference = Reference.from_dataset(images, name, options.num_reference, features)
    return Evaluator(features, reference, options.num_images, repeats, options.batch_size)


def data_name(options: argparse.Namespace) -> str:
    """What the images that the options name are called in a report."""
    from cm_diffusers.training.record import public_name

    return f"{public_name(options.dataset)}/{options.dataset_split}"


def load_images(options: argparse.Namespace, student: Any, **captions: Any) -> Any:
    """The images that the options name, prepared as the student draws them.

    Args:
        captions: `captioned` and `caption_column` of [`~cm_diffusers.training.data.prepare_dataset`].
    """
    from cm_diffusers.network_config import height_and_width
    from cm_diffusers.pipelines.text import takes_prompts
    from cm_diffusers.training.data import load_image_dataset, prepare_dataset
    from cm_diffusers.training.images import ImageSpec

    with process_state().main_process_first():
        dataset = load_image_dataset(
            options.dataset, name=options.dataset_name, split=options.dataset_split, streaming=options.streaming,
            data_files=options.data_files,
        )  # fmt: skip
    (height, width), channels = height_and_width(student.unet.config.sample_size), student.unet.config.in_channels
    if takes_prompts(student):  # whose network draws latents
        factor, channels = student.vae_scale_factor, student.vae.config.out_channels
        height, width = height * factor, width * factor
    spec = ImageSpec(channels, height, width)
    return prepare_dataset(dataset, spec, image_column=options.image_column, on_bad_image="skip", **captions)
