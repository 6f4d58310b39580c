"""Loading a student, whatever its images are made of."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline
from cm_diffusers.pipelines.stored import download_options
from cm_diffusers.pipelines.text import told_guidance
from cm_diffusers.pipelines.weights import HALF, load_weights
from cm_diffusers.schedulers import ConsistencyScheduler

LCM_STEPS = 50  # of the grid that LCM-LoRA was trained on
ADAPTERS = "pytorch_lora_weights.safetensors"  # the file that diffusers keeps them in
RECORD = "training.json"  # what a run says of itself
PARTS = ["*.json", "*.txt", "*.model", "*.safetensors"]


def load_pipeline(path: str | Path, base: Any = None, revision: str | None = None, **options: Any) -> Any:
    """A student's pipeline under [`ConsistencyScheduler`]: a [`ConsistencyPipeline`], or one of Stable Diffusion.

    Args:
        path (`str` or `Path`): folder or Hub id of a pipeline, or of adapters. Published latent consistency models
            and LCM-LoRA are students, too.
        base (*optional*): for adapters, the pipeline that they belong to, or its folder or Hub id; by default the
            teacher's, if the student's record knows it.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        options: of `DiffusionPipeline.from_pretrained`, such as `dtype`: float32 unless it is given. A `base` that
            is a pipeline already is in its own; it gets the adapters and their scheduler.

    Raises:
        `ValueError`: if there is no student at `path`, adapters without the pipeline that they belong to, or a `base`
            for something else.

    Example:
        ```py
        pipe = load_pipeline("my-lora", base="stable-diffusion-v1-5/stable-diffusion-v1-5")
        image = pipe("a photo of a cat", num_inference_steps=4, guidance_scale=1).images[0]
        ```
    """
    place = str(path)
    hub = download_options({**options, "revision": revision})
    index = _index(place, hub)
    if index is None:
        return _load_adapters(place, base, hub, options)
    if base is not None:
        raise ValueError(f"`base` is for adapters, and {place!r} holds a whole pipeline.")
    if "text_encoder" not in index:
        return load_weights(ConsistencyPipeline, place, revision=revision, **options)
    patterns = [f"*/{part}" for part in PARTS] + ["model_index.json", RECORD]
    folder = _fetch(place, patterns, hub, options.get("variant"))
    if not list(Path(folder).glob("*/*.safetensors")):
        folder = _fetch(place, patterns, hub, HALF)
    scheduler = ConsistencyScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = load_weights(DiffusionPipeline, folder, scheduler=scheduler, **options)
    pipeline.told_guidance_scale = told_guidance(_record(Path(folder)).get("choices", {}))
    return pipeline


def refuse_prompts(path: str | os.PathLike, revision: str | None = None) -> None:
    """See that a student makes no images of text, before it is loaded for what such students are not made for.

    Args:
        path (`str` or `os.PathLike`): as `load_pipeline` takes it. Where nothing is, nothing is refused.

    Raises:
        `ValueError`: if it does, or is a folder of adapters; it says what takes such a student.
    """
    index = _index(str(path), download_options({"revision": revision}))
    of_text = (Path(path) / ADAPTERS).exists() if index is None else "text_encoder" in index
    if of_text:
        raise ValueError(
            f"{str(path)!r} makes images of text. `cm-diffusers sample --prompts`, `evaluate` and `push` take such a "
            "student; `load_pipeline` loads it."
        )


def _index(place: str, hub: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The index of a pipeline; `None` where there is none."""
    try:
        index: Mapping[str, Any] = DiffusionPipeline.load_config(place, **hub)
    except (OSError, ValueError):
        return None
    return index


def _fetch(place: str, patterns: list[str], hub: Mapping[str, Any], variant: str | None) -> str:
    """The folder of a student: diffusers' own download refuses repositories whose scheduler is none of diffusers."""
    if Path(place).is_dir():
        return place
    from huggingface_hub import snapshot_download

    others = ["*.fp16.*", "*.non_ema.*", "*.bf16.*"]
    ignored = [pattern for pattern in others if variant is None or f".{variant}." not in pattern]
    return snapshot_download(place, allow_patterns=patterns, ignore_patterns=ignored, **hub)


def _load_adapters(place: str, base: Any, hub: Mapping[str, Any], options: dict[str, Any]) -> Any:
    try:
        folder = Path(_fetch(place, PARTS, hub, options.get("variant")))
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no pipeline, and there are no adapters, at {place!r}: {error}") from error
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"There is no pipeline, and there are no adapters, in {place!r}.")
    record = _record(folder)
    base = base or _teacher_of(record)
    if base is None:
        raise ValueError(f"{place!r} holds adapters: pass `base`, the pipeline that they belong to.")
    pipeline = load_weights(DiffusionPipeline, str(base), **options) if isinstance(base, str | Path) else base
    pipeline.load_lora_weights(folder)
    if resolution := record.get("resolution"):
        _draw_at(pipeline, resolution)
    if (folder / "scheduler").is_dir():
        pipeline.scheduler = ConsistencyScheduler.from_pretrained(folder, subfolder="scheduler")
    else:
        pipeline.scheduler = ConsistencyScheduler.from_teacher(
            pipeline.scheduler, boundary="lcm", clip_denoised=False, original_inference_steps=LCM_STEPS
        )
    return pipeline


def _draw_at(pipeline: Any, resolution: int) -> None:
    """Let a pipeline's images have so many pixels, in height and in width, unless others are asked for."""
    size = resolution // pipeline.vae_scale_factor
    pipeline.unet.register_to_config(sample_size=size)
    if hasattr(pipeline, "default_sample_size"):  # SDXL's, read from the config when the pipeline is made
        pipeline.default_sample_size = size


def _record(folder: Path) -> dict[str, Any]:
    """What a student's folder says of its training; empty if nothing."""
    file = folder / RECORD
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _teacher_of(record: Mapping[str, Any]) -> str | None:
    """The Hub id of the teacher that a student's record names."""
    name = (record.get("teacher") or {}).get("name")
    return name if name and "/" in name else None
