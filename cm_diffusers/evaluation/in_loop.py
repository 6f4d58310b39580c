"""Evaluation while a run trains, and the student that was best."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cm_diffusers.evaluation.evaluate import Evaluator
from cm_diffusers.evaluation.features import load_features
from cm_diffusers.evaluation.reference import Reference
from cm_diffusers.evaluation.sampling import student_sampler
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.training.config import ConsistencyConfig

logger = logging.getLogger(__name__)

HISTORY = "evaluation.jsonl"
BEST = "best"


class TrainingEvaluation:
    """Measures the student every so often, on the training images, and keeps the one with the lowest FID.

    Writes a line for each figure to `evaluation.jsonl`; the best student, by the first of `eval_nfes`, is in `best/`.
    Called by all processes.

    Args:
        config ([`ConsistencyConfig`]): the run's.
        dataset: the run's, prepared.
        accelerator (`Accelerator`): the run's.
        first_step (`int`): where the run starts or resumes; what was measured after it is forgotten.
    """

    def __init__(self, config: ConsistencyConfig, dataset: Any, accelerator: Accelerator, first_step: int = 0) -> None:
        self.config, self.dataset, self.accelerator = config, dataset, accelerator
        self.folder = Path(config.output_dir)
        self.history = [entry for entry in read_history(self.folder / HISTORY) if entry["step"] <= first_step]
        if accelerator.is_main_process and self.history:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
            (self.folder / HISTORY).write_text(lines)

    @cached_property
    def evaluator(self) -> Evaluator:
        config = self.config
        reference = Reference.from_dataset(
            without_augmentation(self.dataset), config.dataset or "training data", config.eval_num_reference
        )
        features = load_features(config.eval_features, self.accelerator.device)
        return Evaluator(features, reference, config.eval_num_images, batch_size=config.batch_size)

    @property
    def best(self) -> float:
        """The lowest FID so far."""
        nfe = self.config.eval_nfes[0]
        return min((entry["fid"] for entry in self.history if entry["nfe"] == nfe), default=math.inf)

    def __call__(self, pipeline: ConsistencyPipeline, step: int) -> None:
        """Measure the student after `step` steps; save it if it is the best so far."""
        pipeline.set_progress_bar_config(disable=True)
        best, first = self.best, None
        for nfe in self.config.eval_nfes:
            result = self.evaluator.measure(student_sampler(pipeline, nfe))
            entry = {"step": step, "nfe": nfe, **result.metrics, "protocol": dataclasses.asdict(result.protocol)}
            self.history.append(entry)
            first = first or result
            self.accelerator.log({f"eval/{name}_nfe_{nfe}": v for name, v in result.metrics.items()}, step=step)
            if self.accelerator.is_main_process:
                with (self.folder / HISTORY).open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        if first is not None and first.metrics["fid"] < best and self.accelerator.is_main_process:
            pipeline.save_pretrained(self.folder / BEST)
            logger.info("Step %d: FID %.4g at %d NFE, the best so far.", step, first.metrics["fid"], first.nfe)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of `evaluation.jsonl`; one that was cut off when its run was killed is left out."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("A line of %s is torn, and is left out.", path)
    return found


def without_augmentation(dataset: Any) -> Any:
    """The same images, cropped in the middle and never flipped."""
    plain = copy.copy(dataset)
    spec = dataclasses.replace(dataset.transform.spec, center_crop=True, random_flip=False)
    plain.transform = dataclasses.replace(dataset.transform, spec=spec)
    if not dataset.transform.spec.center_crop and getattr(plain, "_cache", None) is not None:
        plain._cache = None  # of images that are still to be cropped at random
    return plain
