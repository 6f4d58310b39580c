from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cm_diffusers.training.config import ConsistencyConfig

if TYPE_CHECKING:
    from cm_diffusers.training.trainer import ConsistencyTrainer

__all__ = ["ConsistencyConfig", "ConsistencyTrainer"]


def __getattr__(name: str) -> Any:
    """The trainer pulls in accelerate; the mathematics beside it does not."""
    if name != "ConsistencyTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cm_diffusers.training.trainer import ConsistencyTrainer

    return ConsistencyTrainer
