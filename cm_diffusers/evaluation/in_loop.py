"""Evaluation while a run trains, and the student that was best."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from cm_diffusers.evaluation.clip_score import load_clip
from cm_diffusers.evaluation.evaluate import Evaluator
from cm_diffusers.evaluation.features import load_features
from cm_diffusers.evaluation.prompts import Prompts
from cm_diffusers.evaluation.reference import Reference
from cm_diffusers.evaluation.results import write_whole
from cm_diffusers.evaluation.sampling import Sampler, student_sampler
from cm_diffusers.evaluation.text_sampling import text_student_sampler
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.record import TrainingRecord, public_name
from cm_diffusers.training.runtime import on_main
from cm_diffusers.training.samples import run_guidance
from cm_diffusers.training.saving import save_student, workplace
from cm_diffusers.training.text_to_image import TextToImage

logger = logging.getLogger(__name__)

HISTORY = "evaluation.jsonl"
BEST, FIGURES = "best", "evaluation.json"


class TrainingEvaluation:
    """Measures the student every so often, on the training images, and keeps the one with the lowest FID.

    Writes a line for each figure to `evaluation.jsonl`; the best student, by the first of `eval_nfes`, is in `best/`
    with its figures. Training is not disturbed: its random numbers are left alone. Called by all processes.

    Args:
        config ([`ConsistencyConfig`]): the run's.
        dataset: the run's, prepared. The reference is read from it now.
        accelerator (`Accelerator`): the run's.
        text ([`~cm_diffusers.training.text_to_image.TextToImage`], *optional*): of a student that makes images of
            text, which are the captions of its training images, spread evenly.
        record (`Callable`, *optional*): from the network that is saved to the
            [`~cm_diffusers.training.record.TrainingRecord`] of the run so far, which then goes into `best/`, too.

    Raises:
        `ValueError`, `TypeError`: for evaluations that cannot work, or a stream that can be read only once.
    """

    def __init__(
        self, config: ConsistencyConfig, dataset: Any, accelerator: Accelerator, text: TextToImage | None = None,
        record: Callable[[Any], TrainingRecord] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.accelerator, self.folder = config, accelerator, Path(config.output_dir)
        self.text, self.record = text, record
        if not hasattr(dataset, "__len__") and iter(dataset.dataset) is iter(dataset.dataset):
            raise ValueError("`eval_steps` needs training images that can be read again: this stream comes only once.")
        with own_randomness(config.seed):
            features = load_features(config.eval_features, accelerator.device)
            clip = None if config.eval_clip is None else load_clip(config.eval_clip, accelerator.device)
            name, plain = public_name(config.dataset) or "training data", without_augmentation(dataset)
            reference = Reference.from_dataset(plain, name, config.eval_num_reference, features)
            prompts = None if text is None else Prompts.from_dataset(plain, name, config.eval_num_images)
        self.evaluator = Evaluator(
            features, reference, config.eval_num_images, batch_size=config.batch_size, prompts=prompts, clip=clip
        )
        self.best = math.inf

    def start(self) -> None:
        """Take up the best student so far, if it was measured as the next ones will be."""
        self.best = on_main(self.accelerator, self._best_so_far)

    def _best_so_far(self) -> float:
        file = self.folder / BEST / FIGURES
        entry = json.loads(file.read_text()) if file.exists() else {}
        same = entry.get("protocol") == self._protocol and entry["nfe"] == self.config.eval_nfes[0]
        return float(entry["fid"]) if same else math.inf

    @property
    def _protocol(self) -> dict[str, Any]:
        return self.evaluator.protocol.facts()

    def __call__(self, pipeline: Any, step: int) -> None:
        """Measure the student after `step` steps; save it if it is the best so far. A diverged one has no figures."""
        pipeline.set_progress_bar_config(disable=True)
        for place, nfe in enumerate(self.config.eval_nfes):
            try:
                with own_randomness(self.config.seed):
                    metrics = self.evaluator.measure(self._sampler(pipeline, nfe)).metrics
            except FloatingPointError as error:
                logger.warning("Step %d, %d NFE: %s", step, nfe, error)
                continue
            entry = {"step": step, "nfe": nfe, **metrics, "protocol": self._protocol}
            self.accelerator.log({f"eval/{name}_nfe_{nfe}": value for name, value in metrics.items()}, step=step)
            better = place == 0 and metrics["fid"] < self.best
            on_main(self.accelerator, functools.partial(self._write, entry, pipeline if better else None))
            if better:
                self.best = metrics["fid"]
                logger.info("Step %d: FID %.4g at %d NFE, the best so far.", step, self.best, nfe)

    def _sampler(self, pipeline: Any, nfe: int) -> Sampler:
        prompts = self.evaluator.prompts
        if self.text is None or prompts is None:
            return student_sampler(pipeline, nfe)
        return text_student_sampler(self.text.on_device(pipeline), nfe, prompts.texts, run_guidance(self.config))

    def _write(self, entry: dict[str, Any], best: Any) -> None:
        with (self.folder / HISTORY).open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if best is not None:
            self._keep(best, entry)

    def _keep(self, pipeline: Any, entry: dict[str, Any]) -> None:
        """Save the student and what is known of it beside `best/`, then put it there."""
        with workplace(self.folder) as place:
            save_student(pipeline, place / "new")
            (place / "new" / FIGURES).write_text(json.dumps(entry, indent=2) + "\n")
            if self.record is not None:
                self.record(pipeline.unet).save(place / "new")
            if (self.folder / BEST).exists():
                (self.folder / BEST).rename(place / "old")
            (place / "new").rename(self.folder / BEST)


def forget_after(folder: Path, step: int) -> None:
    """Drop what was measured after `step`, where a run starts or goes on, and the best student if it is of later.

    Called by the main process.
    """
    if (folder / HISTORY).exists():
        kept = [entry for entry in read_history(folder / HISTORY) if entry["step"] <= step]
        write_whole(folder / HISTORY, "".join(json.dumps(entry) + "\n" for entry in kept))
        if not kept:
            (folder / HISTORY).unlink()
    figures = folder / BEST / FIGURES
    if figures.exists() and json.loads(figures.read_text())["step"] > step:
        shutil.rmtree(folder / BEST)


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Global random numbers from `seed` on, alike on all processes; then they go on as if nothing had been drawn."""
    python, array = random.getstate(), np.random.get_state()
    device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(device):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


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
