"""The part of a model card that says how a student is loaded and sampled."""

from __future__ import annotations

from cm_diffusers.hub.student import Student
from cm_diffusers.pipelines.text import told_guidance
from cm_diffusers.pipelines.weights import DTYPE
from cm_diffusers.schedulers import ConsistencyScheduler

INSTALL = "# pip install cm_diffusers"
STEPS = 4  # of the snippets with text


def usage(student: Student) -> str:
    """The section "Use", with code for stock diffusers where that computes the student, and for this package."""
    parts = _with_text(student) if student.takes_prompts else _without_text(student)
    return "\n\n".join(["## Use", *parts])


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _loading(student: Student, kind: str, *options: str) -> str:
    """The call that loads the student, or a part of it, as a class of that name."""
    variant = [] if student.variant is None else [f'variant="{student.variant}"']
    arguments = ", ".join([f'"{student.repo_id}"', *options, *variant])
    return f"{kind}.from_pretrained({arguments})"


def _not_stock(student: Student, what: str) -> str:
    config = student.scheduler.config
    kind = f"family `{config.family}`, boundary `{config.boundary}`"
    if student.scheduler.is_stock:
        kind = f"`sample_size` {student.unet['sample_size']}, and not one number"
    return f"Stock diffusers has no {what} that computes this student ({kind})"


# Without text -------------------------------------------------------------------------------------------------------


def _without_text(student: Student) -> list[str]:
    if student.is_lcm_export:
        return _exported(student)
    label = "class_labels=0, " if student.unet.get("num_class_embeds") else ""
    ours = _python(
        INSTALL, "from cm_diffusers import ConsistencyPipeline", "",
        f"pipe = {_loading(student, 'ConsistencyPipeline')}",
        f"image = pipe({label}num_inference_steps=1).images[0]",
        f"image = pipe({label}num_inference_steps=2).images[0]",
    )  # fmt: skip
    if student.is_stock:
        stock = _python(
            "from diffusers import DiffusionPipeline", "",
            f"pipe = {_loading(student, 'DiffusionPipeline')}",
            f"image = pipe({label}num_inference_steps=1).images[0]",
        )  # fmt: skip
        same = "With stock diffusers, or with cm_diffusers for the same images:"
        return [same, stock, ours, *_stored_for_stock(student.scheduler)]
    not_stock = f"{_not_stock(student, 'pipeline')}: `DiffusionPipeline` does not load it. "
    return [ours, f"{not_stock}Its network alone loads there:", _network(student, "UNet2DModel")]


def _exported(student: Student) -> list[str]:
    """Of a student that this package has written for stock diffusers, and does not load itself."""
    code = _python(
        "from diffusers import DiffusionPipeline", "", f"pipe = {_loading(student, 'DiffusionPipeline')}",
        "image = pipe(num_inference_steps=1).images[0]",
    )  # fmt: skip
    most = student.scheduler.config.original_inference_steps
    return [
        "With stock diffusers:",
        code,
        f"Always pass `num_inference_steps`, at most {most}: without it `DDPMPipeline` takes 1000. This is an export: "
        "cm_diffusers loads the student that it was made of, and not this.",
    ]


def _network(student: Student, kind: str) -> str:
    loading = _loading(student, kind, 'subfolder="unet"')
    return _python(f"from diffusers import {kind}", "", f"unet = {loading}")


def _stored_for_stock(scheduler: ConsistencyScheduler) -> list[str]:
    """How stock diffusers takes the levels that are stored for a number of steps, of which it knows nothing."""
    texts = []
    for steps in sorted(map(int, scheduler.config.few_step_sigmas or {})):
        timesteps = scheduler.stock_timesteps(steps)
        other = f"pass it `timesteps={timesteps}` for the same images" if timesteps else "it draws other images"
        texts.append(f"In {steps} steps cm_diffusers takes stored levels, unknown to stock diffusers: {other}.")
    return texts


# With text ----------------------------------------------------------------------------------------------------------


def _with_text(student: Student) -> list[str]:
    base = student.teacher_id or "path/to/the/teacher"
    belonging = f', base="{base}"' if student.is_adapters else ""
    ours = _python(
        INSTALL, "from cm_diffusers import load_pipeline", "",
        f'pipe = load_pipeline("{student.repo_id}"{belonging})', _image(student),
    )  # fmt: skip
    parts = [ours]
    if student.is_stock:
        stock = _stock_adapters(student, base) if student.is_adapters else _stock_pipeline(student)
        parts = ["With stock diffusers, or with cm_diffusers for the same images:", stock, ours]
    else:
        parts.append(f"{_not_stock(student, 'scheduler')}.")
        if not student.is_adapters:
            parts += ["Its network alone loads there:", _network(student, "UNet2DConditionModel")]
    if student.is_told_guidance:
        parts.append("Its network is told `guidance_scale`, which costs no evaluations.")
    elif student.is_adapters and student.teacher_id is None:
        parts.append(f"Instead of `{base}`: the folder or Hub id of the teacher, to whose pipeline they belong.")
    return parts


def _stock_pipeline(student: Student) -> str:
    # Left to themselves, diffusers and transformers load half precision as different types.
    imports, dtype = ([], []) if student.variant is None else (["import torch"], [f"{DTYPE}=torch.float32"])
    return _python(
        *imports, "from diffusers import DiffusionPipeline", "",
        f"pipe = {_loading(student, 'DiffusionPipeline', *dtype)}", _image(student),
    )  # fmt: skip


def _stock_adapters(student: Student, base: str) -> str:
    return _python(
        "import torch", "from diffusers import DiffusionPipeline, LCMScheduler", "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}", {DTYPE}=torch.float32)',
        f'pipe.load_lora_weights("{student.repo_id}")',
        f'pipe.scheduler = LCMScheduler.from_pretrained("{student.repo_id}", subfolder="scheduler")',
        _image(student, at_size=True),
    )  # fmt: skip


def _image(student: Student, at_size: bool = False) -> str:
    """The call that draws; `at_size` says the size, where a pipeline has another of its own."""
    steps = min(STEPS, student.scheduler.grid_length)
    choices = {} if student.record is None else student.record.choices
    guidance = told_guidance(choices) if student.is_told_guidance else 1.0
    size = ", height={}, width={}".format(*student.image_size) if at_size and student.image_size else ""
    return f'image = pipe("a photo of a cat", num_inference_steps={steps}, guidance_scale={guidance}{size}).images[0]'
