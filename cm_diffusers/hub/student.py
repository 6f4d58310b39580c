"""What is in a student's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from cm_diffusers.evaluation.digests import student_digest
from cm_diffusers.evaluation.in_loop import FIGURES, HISTORY, read_history
from cm_diffusers.evaluation.results import Report
from cm_diffusers.network_config import height_and_width
from cm_diffusers.pipelines.loading import ADAPTERS
from cm_diffusers.pipelines.weights import HALF, load_weights, only_in_half
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.schedulers.origins import LCM_CLASS
from cm_diffusers.training.record import HUB_ID, TrainingRecord

logger = logging.getLogger(__name__)

INDEX = "model_index.json"


@dataclass(frozen=True)
class Student:
    """What is in a student's folder.

    Args:
        folder (`Path`): as a run or the `save_pretrained` of its pipeline wrote it.
        repo_id (`str`): its name on the Hub.
    """

    folder: Path
    repo_id: str

    def _json(self, *place: str) -> dict[str, Any]:
        path = self.folder.joinpath(*place)
        try:
            values: dict[str, Any] = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.folder} holds no student: {error}") from error
        return values

    # What it is ------------------------------------------------------------------------------------------------------

    @property
    def is_adapters(self) -> bool:
        """Whether it is adapters alone, to a pipeline that is elsewhere."""
        return not (self.folder / INDEX).exists() and (self.folder / ADAPTERS).exists()

    @property
    def index(self) -> dict[str, Any]:
        """Of the pipeline; empty for adapters."""
        return {} if self.is_adapters else self._json(INDEX)

    @property
    def unet(self) -> dict[str, Any]:
        """The config of the network; empty for adapters."""
        return {} if self.is_adapters else self._json("unet", "config.json")

    @property
    def takes_prompts(self) -> bool:
        """Whether it makes images of text."""
        return self.is_adapters or "text_encoder" in self.index

    @property
    def is_told_guidance(self) -> bool:
        """Whether its network is told the guidance scale."""
        return self.unet.get("time_cond_proj_dim") is not None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels, as far as the folder says."""
        if self.is_adapters and self.record is not None and self.record.resolution is not None:
            return self.record.resolution, self.record.resolution
        size = self.unet.get("sample_size")
        if size is None:
            return None
        # A VAE halves pictures between its blocks.
        factor = 2 ** (len(self._json("vae", "config.json")["block_out_channels"]) - 1) if self.takes_prompts else 1
        height, width = height_and_width(size)
        return height * factor, width * factor

    @property
    def scheduler(self) -> ConsistencyScheduler:
        scheduler: ConsistencyScheduler = ConsistencyScheduler.from_config(self._stored_scheduler)
        return scheduler

    @property
    def _stored_scheduler(self) -> dict[str, Any]:
        return self._json("scheduler", "scheduler_config.json")

    @property
    def is_stock(self) -> bool:
        """Whether stock diffusers classes represent it exactly."""
        if self.takes_prompts:
            return self._stored_scheduler.get("_class_name") == LCM_CLASS
        return self.index.get("_class_name") == "ConsistencyModelPipeline" or self.is_lcm_export

    @property
    def is_lcm_export(self) -> bool:
        """Whether it is an export to diffusers' `LCMScheduler`, which stock diffusers alone loads."""
        is_lcm = self._stored_scheduler.get("_class_name") == LCM_CLASS
        return is_lcm and self.index.get("_class_name") == "DDPMPipeline"

    @property
    def variant(self) -> str | None:
        """The name of its weights as diffusers has it, where there are none in full precision."""
        return HALF if only_in_half(str(self.folder), {}) else None

    # What is known of it ---------------------------------------------------------------------------------------------

    @cached_property
    def record(self) -> TrainingRecord | None:
        return TrainingRecord.load(self.folder)

    @property
    def teacher_id(self) -> str | None:
        """The Hub id of its teacher, if the record knows one."""
        name = (self.record.teacher or {}).get("name", "") if self.record is not None else ""
        return name if HUB_ID.fullmatch(name) else None

    @cached_property
    def report(self) -> Report | None:
        """Its evaluation; none if that is of other weights, or of the levels before others were stored."""
        path = self.folder / "evaluation" / "report.json"
        if not path.exists():
            return None
        report = Report.load(path)
        if self._is_measured_by(report):
            return report
        logger.warning("%s is of other weights, precision or noise levels, and left out: evaluate anew.", path)
        return None

    def _is_measured_by(self, report: Report) -> bool:
        """Whether the report's figures are this student's, as far as it says whose they are."""
        measured = {result.weights for result in report.of("student")} - {""}
        return not measured or measured == {student_digest(self._weights(), self.scheduler.config)}

    def _weights(self) -> Mapping[str, Tensor]:
        """Those of its network, or its adapters."""
        if self.is_adapters:
            return {name.removeprefix("unet."): value for name, value in load_file(self.folder / ADAPTERS).items()}
        kind = UNet2DConditionModel if self.takes_prompts else UNet2DModel
        weights: Mapping[str, Tensor] = load_weights(kind, str(self.folder), subfolder="unet").state_dict()
        return weights

    @property
    def measured_in(self) -> Path:
        """Where the figures are from while it trained: those that the best student is kept with, or a run's."""
        best = self.folder / FIGURES
        return best if best.exists() else self.folder / HISTORY

    @property
    def last_measured(self) -> list[dict[str, Any]]:
        """The figures of the last evaluation while it trained; empty if there was none."""
        history = [self._json(FIGURES)] if self.measured_in.name == FIGURES else read_history(self.measured_in)
        return [entry for entry in history if entry["step"] == history[-1]["step"]]
