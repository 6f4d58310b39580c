"""One step of a run: its micro-steps, their losses, and the gradient that all of them make."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor

from cm_diffusers.training.companions import Companion
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.health import StepRecord
from cm_diffusers.training.inputs import Inputs
from cm_diffusers.training.objectives import Losses
from cm_diffusers.training.optimizers import set_learning_rate, take_step
from cm_diffusers.training.phases import Phase
from cm_diffusers.training.randomness import SampleRandom, mixed
from cm_diffusers.training.runtime import autocast
from cm_diffusers.training.tracking import Meter

DROPOUT = 3  # keeps the dropout masks apart from what else is drawn with the run's seed


class Stepper:
    """Takes the steps of a run, one at each call.

    Args:
        config ([`ConsistencyConfig`]): the run's.
        accelerator (`Accelerator`): the run's.
        student (`nn.Module`), optimizer (`AcceleratedOptimizer`): as accelerate prepared them.
        companions (`dict[str, Companion]`): what is trained beside the student.
        meter ([`~cm_diffusers.training.tracking.Meter`]): is told of losses, norms and times.
        inputs ([`~cm_diffusers.training.inputs.Inputs`]): how a batch is read.
    """

    def __init__(
        self, config: ConsistencyConfig, accelerator: Accelerator, student: Any, optimizer: Any,
        companions: dict[str, Companion], meter: Meter, inputs: Inputs,
    ) -> None:  # fmt: skip
        self.config, self.accelerator, self.student, self.optimizer = config, accelerator, student, optimizer
        self.companions, self.meter, self.inputs = companions, meter, inputs

    def __call__(self, phase: Phase, step: int, batches: Iterator[dict[str, Tensor]]) -> StepRecord:
        """The optimiser's step number `step` of the run, over all its micro-steps."""
        rate = phase.learning_rate_at(step - phase.start)
        set_learning_rate(self.optimizer, self.config, rate, step)
        inputs: list[dict[str, Tensor]] = []
        means = []
        norm = torch.zeros((), device=self.accelerator.device)
        for micro in range(self.config.gradient_accumulation_steps):
            with self.meter.clock("data"):
                inputs.append(self._next(batches, step))
            torch.manual_seed(mixed(DROPOUT, self.config.seed, step, micro, self.accelerator.process_index))
            with self.accelerator.accumulate(self.student):
                with self.meter.clock("forward"):
                    losses = self.losses(phase, step, inputs[-1])
                with self.meter.clock("backward"):
                    loss = losses.values.mean()
                    self.accelerator.backward(loss)
                self.meter.add_losses(losses)
                means.append(loss.detach())
                with self.meter.clock("optimizer"):
                    if self.accelerator.sync_gradients:
                        norm = self._gradient_norm()
                        for companion in self.companions.values():
                            companion.step(~norm.isfinite())
                            companion.zero_grad()
                        take_step(self.optimizer, ~norm.isfinite())
                    self.optimizer.zero_grad()
        self.meter.add_step(norm)
        values = {"phase": phase.name, "learning_rate": rate, "config": self.config.to_dict()}
        return StepRecord(step, inputs, torch.stack(means), norm, ~norm.isfinite(), values)

    def losses(self, phase: Phase, step: int, batch: dict[str, Tensor]) -> Losses:
        """The losses of one micro-step of the run's step number `step`, for a batch on the device."""
        random = SampleRandom(batch["seed"], self.accelerator.device)
        with autocast(self.accelerator):
            images, conditioning = self.inputs(batch, random)
            return phase.objective.losses(images, step - phase.start, random, **conditioning)

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as the networks take it; the seeds stay on the CPU."""
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True, skip_keys=["seed"])
        if self.config.channels_last:
            for name, value in batch.items():
                if isinstance(value, Tensor) and value.ndim == 4:  # images or latents
                    batch[name] = value.contiguous(memory_format=torch.channels_last)
        return batch

    def _next(self, batches: Iterator[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"The dataset ended at step {step}: it cannot be read again, or is below one batch.")
        return self.to_device(batch)

    def _gradient_norm(self) -> Tensor:
        """Clip the gradient; returns its norm before."""
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.as_tensor(norm, device=self.accelerator.device)
