"""What a run says of itself: numbers and sample images, to the console and to accelerate's tracker."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.image_grid import save_grid
from cm_diffusers.networks import send
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.objectives import Losses
from cm_diffusers.training.samples import Draw

logger = logging.getLogger(__name__)


def start_tracker(accelerator: Accelerator, config: ConsistencyConfig) -> None:
    """Open the tracker, with the config as its hyper-parameters."""
    if config.tracker == "none":
        return
    values = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.to_dict().items()}
    accelerator.init_trackers("cm_diffusers", config=values)


class Clock:
    """The time that each part of a step takes, on the device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        end = self._now()
        if self.on_gpu:
            self._events.append((part, start, end))
        else:
            self._seconds[part] += end - start

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        for part, start, end in self._events:
            end.synchronize()
            self._seconds[part] += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return seconds


class Meter:
    """Collects the numbers of each step on the device, and reads them only when they are logged.

    Args:
        accelerator (`Accelerator`): averages over ranks, and logs.
        batch_size (`int`): images per step over all devices.
        sigma_range (`tuple[float, float]`): the noise levels of the run, which the loss is binned over.
        num_bins (`int`): as many, of equal width in ln sigma.
    """

    def __init__(
        self, accelerator: Accelerator, batch_size: int, sigma_range: tuple[float, float], num_bins: int = 8
    ) -> None:
        self.accelerator, self.batch_size, self.num_bins = accelerator, batch_size, num_bins
        self.clock = Clock(accelerator.device)
        low, high = map(math.log, sigma_range)
        self._edges = torch.linspace(low, high, num_bins + 1).exp()
        self._restart()

    def _restart(self) -> None:
        # Sums of the finite losses of every bin, and how many there are; the same of norms, and of each term.
        self._losses = torch.zeros(2, self.num_bins, device=self.accelerator.device)
        self._norms = torch.zeros(2, device=self.accelerator.device)
        self._terms: dict[str, Tensor] = {}
        self._steps = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what took time since the last step: it was not training."""
        self._start = time.perf_counter()

    def add_losses(self, losses: Losses) -> None:
        """Take in a micro-step."""
        values = losses.values.detach().float()
        bins = send(torch.bucketize(losses.sigma.float(), self._edges[1:-1]), values.device)
        self._losses.index_add_(1, bins, _countable(values))
        for name, term in losses.terms.items():
            self._terms[name] = self._terms.get(name, 0) + _countable(term.detach().float()).sum(1)

    def add_step(self, norm: Tensor) -> None:
        """Take in the gradient's norm, at the end of a step."""
        self._norms += _countable(norm.float())
        self._steps += 1

    def log(self, phase: str, step: int, values: dict[str, float], bar: tqdm) -> None:
        """Log the means since the last call, and start again. Called by all processes."""
        sums, counts = self.accelerator.reduce(self._losses, "sum").tolist()
        terms = {name: self.accelerator.reduce(sums, "sum").tolist() for name, sums in self._terms.items()}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        everything = {
            "loss": _mean(sum(sums), sum(counts)),
            **{f"loss_of/{name}": _mean(*both) for name, both in terms.items()},
            "grad_norm": _mean(*self._norms.tolist()),
            "images_per_second": self._steps * self.batch_size / seconds,
            "memory_gib": _memory(self.accelerator.device) / 2**30,
            **values,
        }
        edges = [f"{edge:.3g}" for edge in self._edges.tolist()]
        for index, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                everything[f"loss_at_sigma/{edges[index]}-{edges[index + 1]}"] = total / count
        parts = self.clock.read()
        for part, spent in {**parts, "rest": seconds - sum(parts.values())}.items():
            everything[f"milliseconds/{part}"] = 1000 * spent / max(self._steps, 1)
        self.accelerator.log({f"{phase}/{name}": value for name, value in everything.items()}, step=step)
        shown = {
            "loss": f"{everything['loss']:.4g}",
            "N": values.get("num_levels"),
            "lr": f"{values['lr']:.2g}",
            "img/s": f"{everything['images_per_second']:.0f}",
        }
        if values.get("skipped_steps"):
            shown["skipped"] = values["skipped_steps"]
        bar.set_postfix({name: value for name, value in shown.items() if value is not None})
        self._restart()


def _countable(values: Tensor) -> Tensor:
    """The finite values, with 0 for the others, and 1 and 0 to count them."""
    finite = values.isfinite()
    return torch.stack([torch.where(finite, values, 0.0), finite.float()])


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def _memory(device: torch.device) -> int:
    """The most bytes in use so far on a GPU, or those of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def log_samples(accelerator: Accelerator, draw: Draw, config: ConsistencyConfig, step: int, folder: Path) -> None:
    """Sample a grid of images for each number of steps, from the same noise every time. All processes draw a share.

    Every image has its own generator: the run's random numbers stay as they are, and the number of processes does not
    matter.
    """
    mine = range(accelerator.process_index, config.num_samples, accelerator.num_processes)
    for nfe in config.sample_nfes:
        pairs = gather_object(list(zip(mine, _draw_all(draw, config, mine, nfe), strict=True)))
        if accelerator.is_main_process:
            images = np.stack([image for _, image in sorted(pairs, key=lambda pair: pair[0])])
            save_grid(images, folder / f"step-{step:08d}-nfe-{nfe}.png")
            _log_images(accelerator, f"samples/nfe_{nfe}", images, step)


def save_samples(draw: Draw, config: ConsistencyConfig, file: Path) -> None:
    """One grid of images in one step, drawn by this process alone, from the noise of [`log_samples`]."""
    save_grid(np.stack(_draw_all(draw, config, range(config.num_samples), 1)), file)


def _draw_all(draw: Draw, config: ConsistencyConfig, indices: range, nfe: int) -> list[np.ndarray]:
    """The images of some of the indices, no more at once than a step trains on."""
    parts = (indices[start : start + config.batch_size] for start in range(0, len(indices), config.batch_size))
    return [image for part in parts for image in draw(part, nfe)]


def _log_images(accelerator: Accelerator, name: str, images: np.ndarray, step: int) -> None:
    for tracker in accelerator.trackers:
        arguments: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images") and images.shape[-1] in (1, 3, 4):
            tracker.log_images({name: images if arguments else list(images)}, step=step, **arguments)
