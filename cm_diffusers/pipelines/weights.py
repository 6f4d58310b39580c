"""Pipelines of weights as they are stored, in the precision that is asked for."""

from __future__ import annotations

import logging
from typing import Any

import diffusers
import torch
from packaging.version import Version

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
    asked = [options.pop(name) for name in ("dtype", "torch_dtype") if name in options]
    options[DTYPE] = asked[0] if asked else torch.float32
    try:
        return loader.from_pretrained(place, **options)
    except OSError as error:
        if options.pop("variant", None) is not None:
            raise
        try:
            pipeline = loader.from_pretrained(place, variant=HALF, **options)
        except (OSError, ValueError):
            raise error from None
    logger.info("%s has weights in %s alone, which are taken.", place, HALF)
    return pipeline
