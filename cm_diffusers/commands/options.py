"""How the commands read their command lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

USAGE = {
    "distill": "Distil a pretrained diffusers UNet into a one-step student (consistency distillation).",
    "train": "Train a one-step network on data alone (consistency training).",
    "precompute": "Compute the latents and prompt embeddings of a captioned dataset once, for runs on them.",
    "sample": "Draw images from a student.",
    "edit": "Edit pictures with a student: repaint, colour, enlarge, vary, denoise, interpolate.",
    "evaluate": "Measure a student and its teacher: FID, KID and others over the number of network evaluations.",
    "timesteps": "Search the noise levels at which a student's few-step samples have the lowest FID, and store them.",
    "push": "Publish a student on the Hub, with a model card made of its run and its evaluation.",
    "export": "Write a student for stock diffusers or as ONNX.",
    "demo": "Open a page in the browser: sample, edit, and see the teacher beside the student.",
    "import": "Turn a published checkpoint of OpenAI (.pt) or NVlabs (.pkl) into a diffusers pipeline.",
    "doctor": "Say what a run would meet on this machine: versions, teacher, dataset, memory, speed.",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    Args:
        command (`str`): one of [`USAGE`], or another one with a description.
        description (`str`, *optional*): what it does.
    """

    def __init__(self, command: str, description: str | None = None) -> None:
        description = description or USAGE[command]
        super().__init__(prog=f"cm-diffusers {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.prog}: error: {message} (--help lists the options)")


def add_guidance(parser: Parser, of_text: bool = False) -> None:
    """The student's guidance scale: 1 by default, or `None` where images of text are made, too."""
    told = "; of text, where it is told the scale, the middle of those of its training" if of_text else ""
    parser.add_argument(
        "--guidance_scale", type=float, default=None if of_text else 1.0,
        help=f"the student's guidance (default: 1, off{told})",
    )  # fmt: skip


def add_student(parser: Parser) -> None:
    """The student, and which of its revisions."""
    parser.add_argument("model", metavar="PATH", help="folder or Hub id of the student")
    parser.add_argument("--revision", help="the student's branch, tag or commit on the Hub")


def add_model_options(parser: Parser) -> None:
    """How a student computes."""
    parser.add_argument("--device", help="cpu, cuda, mps ...; by default the best there is")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")


def load_student(options: argparse.Namespace, load: Callable[..., Any]) -> Any:
    """The student of [`add_student`] as a pipeline, by what loads it, where and as [`add_model_options`] say."""
    import torch

    device = choose_device(options.device)
    return load(options.model, revision=options.revision, dtype=getattr(torch, options.dtype)).to(device)


def choose_device(name: str | None) -> str:
    """The device that is asked for, or else the best there is: the accelerator, or the CPU.

    Raises:
        `ValueError`: if this machine has no such device; those that it has are named.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    there = [*kinds, *(f"{kinds[-1]}:{index}" for index in range(torch.accelerator.device_count()))]
    if name and name not in (*there, "cpu:0"):
        raise ValueError(f"`--device` must be one of {', '.join(there)} on this machine, got {name!r}.")
    return name or kinds[-1]
