"""A page in the browser: images from a student and its teacher, and images to paint over. Needs `gradio`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from cm_diffusers.evaluation.sampling import Sampler, student_sampler, teacher_sampler
from cm_diffusers.pipelines import ConsistencyInpaintPipeline, ConsistencyPipeline
from cm_diffusers.pipelines.loading import refuse_prompts
from cm_diffusers.pipelines.weights import load_weights
from cm_diffusers.training.teacher import Teacher, load_teacher

if TYPE_CHECKING:
    import gradio

MOST_STEPS = 16
MOST_SEED = 2**31 - 1
MOST_IMAGES = 16
TEACHER_NFES = 35
# Visitors share the models, and a scheduler knows of one run only.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
SHOWN_PIXELS = 256  # small images are enlarged by a whole factor up to about this


def load_models(
    student: str | os.PathLike, teacher: str | os.PathLike | None = None, device: str = "cpu"
) -> tuple[ConsistencyPipeline, Teacher | None]:
    """A student and, if given, its teacher, from folders or the Hub, on a device.

    Raises:
        `ValueError`: if the student makes images of text.
    """
    refuse_prompts(student)
    pipeline = load_weights(ConsistencyPipeline, str(student)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if teacher is None:
        return pipeline, None
    loaded = load_teacher(teacher)
    loaded.unet.to(device).eval()
    return pipeline, loaded


def build_demo(student: ConsistencyPipeline, teacher: Teacher | None = None) -> gradio.Blocks:
    """The page.

    Args:
        student ([`ConsistencyPipeline`]): on its device.
        teacher ([`~cm_diffusers.training.teacher.Teacher`], *optional*): shown beside it.

    Returns:
        `gradio.Blocks`: call `launch()` on it.

    Raises:
        `ImportError`: if gradio is not installed.
        `ValueError`: if the page could not draw from the models.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The demo needs gradio: pip install gradio") from error
    _check_models(student, teacher)
    classes = student.classes
    most_steps = min(MOST_STEPS, student.scheduler.grid_length)
    with gradio.Blocks(title="Consistency model") as page:
        gradio.Markdown("# Consistency model\nOne network evaluation makes an image; a few make a better one.")
        with gradio.Tab("Sample"):
            _sampling(gradio, student, teacher, classes, most_steps)
        with gradio.Tab("Edit"):
            _editing(gradio, student, classes, most_steps)
    return page


def _sampling(
    gradio: Any, student: ConsistencyPipeline, teacher: Teacher | None, classes: Sequence[int], most_steps: int
) -> None:
    with gradio.Row():
        steps = gradio.Slider(1, most_steps, value=1, step=1, label="Steps", elem_id="steps")
        evaluations = gradio.Slider(
            1, 79, value=TEACHER_NFES, step=2, label="Teacher's evaluations", elem_id="teacher-nfe",
            visible=teacher is not None,
        )  # fmt: skip
        count = gradio.Slider(1, MOST_IMAGES, value=4, step=1, label="Images", elem_id="count")
        seed = gradio.Number(0, precision=0, minimum=0, maximum=MOST_SEED, label="Seed", elem_id="seed")
        label = gradio.Dropdown(classes, value=None, label="Class", visible=bool(classes), elem_id="class")
    draw = gradio.Button("Draw", variant="primary", elem_id="draw")
    with gradio.Row():
        with gradio.Column():
            ours = gradio.Gallery(label="Student", elem_id="student", columns=2, height="auto")
            our_time = gradio.Markdown(elem_id="student-time")
        with gradio.Column(visible=teacher is not None):
            theirs = gradio.Gallery(label="Teacher", elem_id="teacher", columns=2, height="auto")
            their_time = gradio.Markdown(elem_id="teacher-time")

    def of_student(steps: float, count: float, seed: float, label: int | None) -> tuple[list[Image.Image], str]:
        return draw_timed(student_sampler(student, int(steps), class_label=label), int(seed), int(count))

    def of_teacher(nfe: float, count: float, seed: float, label: int | None) -> tuple[list[Image.Image], str]:
        assert teacher is not None
        null = student.config.null_class_label
        sampler = teacher_sampler(teacher, int(nfe), null_class_label=null, class_label=label)
        return draw_timed(sampler, int(seed), int(count))

    shown = draw.click(of_student, [steps, count, seed, label], [ours, our_time], api_name="sample", **ONE_AT_A_TIME)
    if teacher is not None:
        shown.then(
            of_teacher, [evaluations, count, seed, label], [theirs, their_time], api_name="teacher", **ONE_AT_A_TIME
        )


def _editing(gradio: Any, student: ConsistencyPipeline, classes: Sequence[int], most_steps: int) -> None:
    pipeline = ConsistencyInpaintPipeline.from_pipe(student)
    pipeline.set_progress_bar_config(disable=True)
    gradio.Markdown("Load a picture or draw one, paint over what shall change, and repaint.")
    with gradio.Row():
        steps = gradio.Slider(1, most_steps, value=min(8, most_steps), step=1, label="Steps", elem_id="edit-steps")
        seed = gradio.Number(0, precision=0, minimum=0, maximum=MOST_SEED, label="Seed", elem_id="edit-seed")
        label = gradio.Dropdown(classes, value=None, label="Class", visible=bool(classes), elem_id="edit-class")
    with gradio.Row():
        brush = gradio.Brush(default_size="auto", colors=["#ff7a00"], color_mode="fixed")
        canvas = gradio.ImageMask(
            label="Paint what to repaint", type="pil", format="png", brush=brush, elem_id="canvas"
        )
        result = gradio.Image(label="Result", type="pil", format="png", elem_id="result")
    with gradio.Row():
        sample = gradio.Button("Draw a picture", elem_id="edit-draw")
        repaint = gradio.Button("Repaint", variant="primary", elem_id="repaint")

    def draw_one(seed: float, label: int | None) -> Image.Image:
        return enlarge(draw_images(student_sampler(student, 1, class_label=label), [int(seed)])[0])

    def edit(canvas: dict[str, Any] | None, steps: float, seed: float, label: int | None) -> Image.Image:
        if canvas is None or canvas["background"] is None:
            raise gradio.Error("Load a picture first, or draw one.")
        height, width = pipeline.image_size()
        assert height is not None and width is not None
        image, mask = read_canvas(canvas, (width, height))
        if mask.getbbox() is None:
            raise gradio.Error("Paint over what shall change first.")
        generator = torch.Generator().manual_seed(int(seed))
        repainted = pipeline(
            image, mask, num_inference_steps=int(steps), class_labels=label, generator=generator
        ).images  # fmt: skip
        return enlarge(repainted[0])

    sample.click(draw_one, [seed, label], canvas, api_name="draw_one", **ONE_AT_A_TIME)
    repaint.click(edit, [canvas, steps, seed, label], result, api_name="edit", **ONE_AT_A_TIME)


def _check_models(student: ConsistencyPipeline, teacher: Teacher | None) -> None:
    """Refuse at the start what every visitor would meet."""
    if teacher is not None and teacher.text is not None:
        raise ValueError(f"The teacher {teacher.name} makes images of text, and the student does not.")
    configs: dict[str, Any] = {"student": student.unet.config}
    if teacher is not None:
        configs["teacher"] = teacher.unet.config
    for name, config in configs.items():
        if getattr(config, "sample_size", None) is None:
            raise ValueError(f"The config of the {name}'s UNet has no `sample_size`, so what size to draw is unknown.")
    if teacher is not None and len(student.classes) > (configs["teacher"].num_class_embeds or 0):
        raise ValueError("The student has classes that the teacher has not.")


def draw_images(sampler: Sampler, seeds: Sequence[int]) -> list[Image.Image]:
    """The images of some seeds."""
    arrays = sampler.draw(seeds).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def draw_timed(sampler: Sampler, seed: int, count: int) -> tuple[list[Image.Image], str]:
    """The images of `count` seeds from `seed` on, enlarged, and what they took."""
    start = time.perf_counter()
    images = draw_images(sampler, range(seed, seed + count))
    milliseconds = (time.perf_counter() - start) * 1000 / count
    evaluations = f"{sampler.nfe} evaluation{'s' * (sampler.nfe > 1)}"
    return [enlarge(image) for image in images], f"{evaluations}, {milliseconds:.1f} ms per image"


def enlarge(image: Image.Image) -> Image.Image:
    """A small image with every pixel as a square."""
    factor = max(1, SHOWN_PIXELS // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def read_canvas(canvas: dict[str, Any], size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The picture under the paint, and the paint as a mask: white where there is some.

    Args:
        canvas (`dict`): the value of a `gradio.ImageMask` of PIL images: `background` and `layers`.
        size (`tuple[int, int]`): width and height of the two, cut to that shape. A picture that was enlarged by
            [`enlarge`] gets back its own pixels; every pixel that is touched counts as painted.
    """
    picture: Image.Image = canvas["background"].convert("RGB")
    painted = np.zeros(picture.size[::-1], dtype=bool)
    for layer in canvas["layers"]:
        painted |= np.asarray(layer.convert("RGBA"))[..., 3] > 0
    share = np.asarray(ImageOps.fit(Image.fromarray(painted.astype(np.float32)), size, Image.Resampling.BOX))
    mask = Image.fromarray((share > 0).astype(np.uint8) * 255)
    return ImageOps.fit(picture, size, Image.Resampling.BOX), mask


# As a Space ----------------------------------------------------------------------------------------------------------

APP = '''"""Images from {student}."""

import torch

from cm_diffusers.demo import build_demo, load_models

device = "cuda" if torch.cuda.is_available() else "cpu"
build_demo(*load_models({student!r}, {teacher!r}, device)).launch()
'''
CARD = """---
title: {title}
emoji: ⚡
colorFrom: indigo
colorTo: yellow
sdk: gradio
sdk_version: {version}
app_file: app.py
models:
{models}
---

Images from [{student}](https://huggingface.co/{student}), a consistency model, in one step or a few.
"""


def write_space(folder: str | os.PathLike, student: str, teacher: str | None = None) -> None:
    """Write the page as a Space: `app.py`, `requirements.txt`, `README.md`, and this package as it is installed.

    Args:
        folder (`str` or `os.PathLike`): made if there is none.
        student, teacher (`str`): Hub ids, since a Space cannot see folders of this machine.

    Raises:
        `ValueError`: if they are none.
    """
    import gradio
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    models = [name for name in (student, teacher) if name is not None]
    for name in models:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"A Space loads from the Hub, and {name!r} is no name there.") from error
        if Path(name).is_dir():
            raise ValueError(
                f"A Space loads from the Hub, and cannot see the folder {name}: push it, and give its id."
            )
    files = {
        "app.py": APP.format(student=student, teacher=teacher),
        "requirements.txt": "\n".join([*_requirements(), f"gradio=={gradio.__version__}"]) + "\n",
        "README.md": CARD.format(
            title=student.split("/")[-1], student=student, version=gradio.__version__,
            models="\n".join(f"  - {name}" for name in models),
        ),
    }  # fmt: skip
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (Path(folder) / name).write_text(text, encoding="utf-8")
    package = Path(__file__).parent
    shutil.copytree(
        package, Path(folder) / package.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
    )


def _requirements() -> list[str]:
    """What this package needs without its extras."""
    return [line for line in importlib.metadata.requires("cm_diffusers") or [] if "extra ==" not in line]
