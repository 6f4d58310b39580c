"""What `cm-diffusers evaluate` does for students that make images of text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from cm_diffusers.commands import measuring
from cm_diffusers.commands.options import Parser

OPTIONS = ("caption_column", "prompts_file", "clip")
TEACHER_STEPS, TEACHER_GUIDANCE = [25, 50], 7.5


def add_options(parser: Parser) -> None:
    """The options that mean nothing without text."""
    add = parser.add_argument_group("students that make images of text").add_argument
    add("--base", help="for adapters: folder or Hub id of the pipeline they belong to; the teacher's, if they know it")
    add("--caption_column", help="column of captions, the prompts; found by itself when there is one")
    add("--prompts_file", metavar="FILE", help="prompts instead of captions, one a line")
    add("--clip", help="folder or Hub id of a CLIP model, whose score is measured, too: openai/clip-vit-base-patch16")


def refuse_options(options: argparse.Namespace) -> None:
    """See that a student without text is not asked for what needs it.

    Raises:
        `ValueError`: if it is.
    """
    for name in OPTIONS:
        if getattr(options, name) is not None:
            raise ValueError(f"`{name}` is for students that make images of text, and {options.model!r} makes none.")


def load_evaluator(options: argparse.Namespace, student: Any) -> Any:
    """An [`~cm_diffusers.evaluation.Evaluator`] with prompts: captions of the images, or the lines of a file.

    Raises:
        `ValueError`: if both are asked for, or a solver, which a teacher with its own scheduler does not have.
    """
    from cm_diffusers.evaluation import Evaluator, Prompts, Reference, load_clip, load_features

    if options.prompts_file is not None and options.caption_column is not None:
        raise ValueError("`prompts_file` and `caption_column`: prompts are taken from one of them, not both.")
    if options.teacher_solver is not None:
        raise ValueError("`teacher_solver` is for images without text: with it, a teacher has its own scheduler.")
    captioned, name = options.prompts_file is None, measuring.data_name(options)
    device = measuring.process_state().device
    clip = None if options.clip is None else load_clip(options.clip, device)
    features = load_features(options.features, device)
    captions = {"captioned": captioned, "caption_column": options.caption_column}
    images = measuring.load_images(options, student, **captions)
    if captioned:
        prompts = Prompts.from_dataset(images, name, options.num_images)
    else:
        prompts = Prompts.from_file(options.prompts_file)
    reference = Reference.from_dataset(images, name, options.num_reference, features)
    return Evaluator(features, reference, options.num_images, options.repeats, options.batch_size, prompts, clip)


def make_samplers(options: argparse.Namespace, student: Any, prompts: Sequence[str]) -> list[Any]:
    """Those of the student and, if it is named, its teacher.

    Raises:
        `ValueError`: for a teacher that makes no images of text.
    """
    from cm_diffusers.evaluation import text_student_sampler, text_teacher_sampler
    from cm_diffusers.training.teacher import load_teacher

    samplers = [text_student_sampler(student, nfe, prompts, options.guidance_scale) for nfe in options.nfes]
    if options.teacher:
        teacher = load_teacher(options.teacher, options.teacher_revision, options.teacher_prediction_type)
        if teacher.text is None:
            raise ValueError(f"`teacher` must make images of text, as the student does; {options.teacher!r} does not.")
        pipeline = teacher.text.with_network(teacher.unet, teacher.scheduler).to(measuring.process_state().device)
        pipeline.set_progress_bar_config(disable=True)
        guidance = TEACHER_GUIDANCE if options.teacher_guidance_scale is None else options.teacher_guidance_scale
        steps = options.teacher_nfes or TEACHER_STEPS
        samplers += [text_teacher_sampler(pipeline, nfe, prompts, guidance) for nfe in steps]
    return samplers
