"""Bad steps and requests to stop: seen on every process alike, and without making the device wait."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

EXIT_CODE_PREEMPTED = getattr(os, "EX_TEMPFAIL", 75)
# Each halves the loss scale of fp16; more overflows in a row are not a scale that is still too high.
SCALER_GRACE = 24
MOST_DUMPS = 20


class Preempted(SystemExit):
    """The run was told to end, and has written a checkpoint: exit code 75, "try again later"."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE_PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass
class StepRecord:
    """What a step was made of, until it is known that it went well.

    Args:
        step (`int`): its number.
        inputs (`list`): the batch of every micro-step.
        losses (`Tensor` of shape `(micro-steps,)`): their mean losses on this process.
        norm (`Tensor` of shape `()`): the gradient's norm over all processes.
        bad (`Tensor` of shape `()`): 1 if the norm is not finite, else 0.
        values (`dict`): the step's learning rate, number of levels and the like.
    """

    step: int
    inputs: list[dict[str, Tensor]]
    losses: Tensor
    norm: Tensor
    bad: Tensor
    values: dict[str, Any]


# Of this process, and of the one that launched it, if torchrun or `accelerate launch` did: read before a teacher is.
LAUNCHED, LAUNCHER = os.getpid(), os.getppid()
IS_LAUNCHED = bool(os.environ.keys() & {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_MODE"})


def is_orphan() -> bool:
    """Whether the launcher of this process has ended. On Windows nobody says so."""
    return IS_LAUNCHED and os.getpid() == LAUNCHED and os.getppid() != LAUNCHER


class Watch:
    """Reads how each step went when the next has been handed to the device.

    Args:
        accelerator (`Accelerator`): the run's.
        folder (`Path`): where the inputs of bad steps are written to.
        limit (`int`): so many bad steps in a row end the run.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.limit = limit if accelerator.scaler is None else limit + SCALER_GRACE
        self.skipped = self.in_a_row = self._dumped = 0
        self._asked_to_stop = False
        self._pending: tuple[StepRecord, Tensor, Any] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a request to stop after the current step, as long as the context lasts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_asked_to_stop", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def after(self, record: StepRecord) -> bool:
        """Take in a step that was just handed to the device, and look at the one before.

        Returns:
            `bool`: whether a process was asked to stop, or left by its launcher (with one process, `accelerate launch`
            does not pass SIGTERM on); the same on all of them.

        Raises:
            `FloatingPointError`: when too many steps in a row were bad. The weights are the last good ones.
        """
        # Filled on the device: a copy from the host would wait for all that is under way.
        asked = torch.full((), float(self._asked_to_stop or is_orphan()), device=record.bad.device)
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.reduce(asked, "sum")
        flags = torch.stack([record.bad.float(), asked])
        event = None
        if flags.device.type == "cuda":
            flags = flags.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        before, self._pending = self._pending, (record, flags, event)
        return self._read(before)

    def settle(self) -> bool:
        """Look at the last step, too. Returns whether a process was asked to stop."""
        before, self._pending = self._pending, None
        return self._read(before)

    def _read(self, pending: tuple[StepRecord, Tensor, Any] | None) -> bool:
        if pending is None:
            return False
        record, flags, event = pending
        if event is not None:
            event.synchronize()
        bad, asked = flags.tolist()
        if not bad:
            self.in_a_row = 0
            return bool(asked)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.accelerator.scaler is None or not bool(record.losses.isfinite().all()):
            place = self._dump(record)
            logger.warning("Step %d is skipped: its gradient is not finite. See %s.", record.step, place)
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row had a gradient that is not finite. The weights are those of the last "
                f"good step, and checkpoints are whole. What led to it is in {self.folder}; lower the learning rate, "
                "or look at the images."
            )
        return bool(asked)

    def _dump(self, record: StepRecord) -> Path:
        """The images, labels, captions and seeds of a bad step, from which it can be taken again, and its numbers."""
        if self.in_a_row > 3 or self._dumped >= MOST_DUMPS:
            return self.folder  # more of the same
        self._dumped += 1
        place = self.folder / f"step-{record.step:08d}-rank-{self.accelerator.process_index}"
        try:
            self._write_dump(place, record)
        except (OSError, SafetensorError) as error:
            logger.warning("What led to it cannot be written: %s", error)
        return place.with_suffix(".json")

    def _write_dump(self, place: Path, record: StepRecord) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        batches = [
            {name: value for name, value in batch.items() if isinstance(value, Tensor)} for batch in record.inputs
        ]
        tensors = {
            f"{name}.{index}": value.detach().cpu().contiguous()
            for index, batch in enumerate(batches)
            for name, value in batch.items()
        }
        save_file(tensors, place.with_suffix(".safetensors"))
        finite = [all(bool(value.isfinite().all()) for value in batch.values()) for batch in batches]
        report = {
            "step": record.step,
            "losses": [str(loss) for loss in record.losses.tolist()],
            "gradient_norm": str(float(record.norm)),
            "images_are_finite": finite,
            "captions": [batch["captions"] for batch in record.inputs if "captions" in batch],
            **record.values,
        }
        place.with_suffix(".json").write_text(json.dumps(report, indent=2))
