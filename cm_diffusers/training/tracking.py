"""What a run says of itself: numbers and sample images, to the console and to accelerate's tracker."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.image_grid import save_grid
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.training.config import ConsistencyConfig

logger = logging.getLogger(__name__)


def start_tracker(accelerator: Accelerator, config: ConsistencyConfig) -> None:
    """Open the tracker, with the config as its hyper-parameters."""
    if config.tracker == "none":
        return
    values = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.to_dict().items()}
    accelerator.init_trackers("cm_diffusers", config=values)


class Meter:
    """Collects the numbers of each step on the device, and reads them only when they are logged.

    Args:
        accelerator (`Accelerator`): averages over ranks, and logs.
        batch_size (`int`): images per step over all devices.
    """

    def __init__(self, accelerator: Accelerator, batch_size: int) -> None:
        self.accelerator, self.batch_size = accelerator, batch_size
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._seconds = 0.0
        self._clock = time.perf_counter()

    def update(self, loss: Tensor, norm: Tensor) -> None:
        """Take in a step."""
        self._losses.append(loss)
        self._norms.append(norm.detach())

    def restart_clock(self) -> None:
        """Leave out what took time since the last step: it was not training."""
        self._clock = time.perf_counter()

    def log(self, phase: str, step: int, values: dict[str, float], bar: tqdm) -> None:
        """Log the means since the last call, and start again."""
        loss = self.accelerator.reduce(torch.stack(self._losses).mean(), "mean").item()
        norm = torch.stack(self._norms).mean().item()
        seconds = time.perf_counter() - self._clock
        speed = len(self._losses) * self.batch_size / max(seconds, 1e-9)
        everything = {"loss": loss, "grad_norm": norm, "images_per_second": speed, **values}
        self.accelerator.log({f"{phase}/{name}": value for name, value in everything.items()}, step=step)
        shown = {
            "loss": f"{loss:.4g}",
            "N": values.get("num_levels"),
            "lr": f"{values['lr']:.2g}",
            "img/s": f"{speed:.0f}",
        }
        bar.set_postfix({name: value for name, value in shown.items() if value is not None})
        self._losses.clear()
        self._norms.clear()
        self.restart_clock()


def log_samples(
    accelerator: Accelerator, pipeline: ConsistencyPipeline, config: ConsistencyConfig, step: int, folder: Path
) -> None:
    """Sample a grid of images for each number of steps, from the same noise every time. On the main process."""
    if not accelerator.is_main_process:
        return
    pipeline.set_progress_bar_config(disable=True)
    # Every image has its own generator, so that the run's random numbers stay as they are.
    for nfe in config.sample_nfes:
        images = pipeline(
            batch_size=config.num_samples,
            class_labels=_labels(pipeline, config.num_samples),
            num_inference_steps=nfe,
            generator=[torch.Generator().manual_seed(seed) for seed in range(config.num_samples)],
            output_type="np",
        ).images
        save_grid(images, folder / f"step-{step:08d}-nfe-{nfe}.png")
        _log_images(accelerator, f"samples/nfe_{nfe}", images, step)


def _labels(pipeline: ConsistencyPipeline, count: int) -> list[int] | None:
    classes = pipeline.unet.config.num_class_embeds
    if classes is None:
        return None
    if pipeline.config.null_class_label == classes - 1:
        classes -= 1
    return [index % classes for index in range(count)]


def _log_images(accelerator: Accelerator, name: str, images: np.ndarray, step: int) -> None:
    for tracker in accelerator.trackers:
        arguments: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images") and images.shape[-1] in (1, 3, 4):
            tracker.log_images({name: images if arguments else list(images)}, step=step, **arguments)
