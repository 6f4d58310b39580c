"""Consistency models for diffusers: distil any pretrained UNet into a one-step generator, and sample from it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "ConsistencyScheduler": "cm_diffusers.schedulers",
    "ConsistencySchedulerOutput": "cm_diffusers.schedulers",
    "ConsistencyPipeline": "cm_diffusers.pipelines",
    "ConsistencyColorizePipeline": "cm_diffusers.pipelines",
    "ConsistencyDenoisePipeline": "cm_diffusers.pipelines",
    "ConsistencyImg2ImgPipeline": "cm_diffusers.pipelines",
    "ConsistencyInpaintPipeline": "cm_diffusers.pipelines",
    "ConsistencyInterpolationPipeline": "cm_diffusers.pipelines",
    "ConsistencyRestorationPipeline": "cm_diffusers.pipelines",
    "ConsistencySuperResolutionPipeline": "cm_diffusers.pipelines",
    "Known": "cm_diffusers.pipelines",
    "load_pipeline": "cm_diffusers.pipelines",
    "ConsistencyConfig": "cm_diffusers.training",
    "ConsistencyTrainer": "cm_diffusers.training",
}
__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from cm_diffusers.pipelines import ConsistencyColorizePipeline as ConsistencyColorizePipeline
    from cm_diffusers.pipelines import ConsistencyDenoisePipeline as ConsistencyDenoisePipeline
    from cm_diffusers.pipelines import ConsistencyImg2ImgPipeline as ConsistencyImg2ImgPipeline
    from cm_diffusers.pipelines import ConsistencyInpaintPipeline as ConsistencyInpaintPipeline
    from cm_diffusers.pipelines import ConsistencyInterpolationPipeline as ConsistencyInterpolationPipeline
    from cm_diffusers.pipelines import ConsistencyPipeline as ConsistencyPipeline
    from cm_diffusers.pipelines import ConsistencyRestorationPipeline as ConsistencyRestorationPipeline
    from cm_diffusers.pipelines import ConsistencySuperResolutionPipeline as ConsistencySuperResolutionPipeline
    from cm_diffusers.pipelines import Known as Known
    from cm_diffusers.pipelines import load_pipeline as load_pipeline
    from cm_diffusers.schedulers import ConsistencyScheduler as ConsistencyScheduler
    from cm_diffusers.schedulers import ConsistencySchedulerOutput as ConsistencySchedulerOutput
    from cm_diffusers.training import ConsistencyConfig as ConsistencyConfig
    from cm_diffusers.training import ConsistencyTrainer as ConsistencyTrainer


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import cm_diffusers` itself costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
