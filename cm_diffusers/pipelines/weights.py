"""Pipelines of weights as they are stored, in the precision that is asked for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import list_repo_files
from packaging.version import Version

from cm_diffusers.pipelines.stored import TRANSPORT_ERRORS, pop_dtype

logger = logging.getLogger(__name__)

DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40.0") else "torch_dtype"  # as diffusers calls it
HALF = "fp16"


def load_weights(loader: Any, place: str, **options: Any) -> Any:
    """`loader.from_pretrained(place)` in one precision, and of weights in `fp16` where there are no others.

    Left to themselves, diffusers takes float32, and transformers what was stored: they do not fit together.

    Args:
        loader (`type`): a class of pipelines.
        place (`str`): folder or Hub id.
        options: of `from_pretrained`. The precision, float32 by default, goes by `dtype` or by `torch_dtype`.

    Raises:
        `OSError`, `ValueError`: as from `from_pretrained`.
    """
    options[DTYPE] = pop_dtype(options) or torch.float32
    try:
        return loader.from_pretrained(place, **options)
    except OSError:
        if options.pop("variant", None) is not None or not only_in_half(place, options):
            raise
    logger.warning("%r has weights in %s alone, which are taken.", place, HALF)
    return loader.from_pretrained(place, variant=HALF, **options)


def only_in_half(place: str, options: Mapping[str, Any]) -> bool:
    """Whether all parts of a pipeline, in a folder or on the Hub, have weights in `fp16` and no others."""
    if Path(place).is_dir():
        names = [file.relative_to(place).as_posix() for file in Path(place).glob("*/*")]
    else:
        names = []
        with contextlib.suppress(ValueError, *TRANSPORT_ERRORS):
            names = list_repo_files(place, revision=options.get("revision"), token=options.get("token"))
    weights = [name for name in names if name.count("/") == 1 and name.endswith(".safetensors")]
    return bool(weights) and all(f".{HALF}" in name for name in weights)
