"""Students against their teachers: every metric over the number of evaluations, under one protocol."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import PartialState
from torch import Tensor

from cm_diffusers.evaluation.clip_score import ClipScore
from cm_diffusers.evaluation.features import Features
from cm_diffusers.evaluation.metrics import all_metrics, frechet_distance
from cm_diffusers.evaluation.prompts import Prompts
from cm_diffusers.evaluation.reference import Reference, reference_features
from cm_diffusers.evaluation.results import Protocol, Result
from cm_diffusers.evaluation.sampling import Sampler
from cm_diffusers.evaluation.sharing import map_shared
from cm_diffusers.pipelines.text import prompts_in_turn
from cm_diffusers.training.runtime import on_main


@dataclass(frozen=True)
class Evaluator:
    """Measures samplers against one reference, on the features of one network.

    The images of a repetition are those of the seeds 0 to `num_images - 1`, those of the next the `num_images` after
    them, and so on, whatever the batch size and the number of processes. Called by all processes.

    Args:
        features ([`~cm_diffusers.evaluation.features.Features`]): on the device of this process.
        reference ([`~cm_diffusers.evaluation.reference.Reference`]): the images to resemble, two at least, the same on
            all processes.
        num_images (`int`): that are drawn for a figure.
        repeats (`int`): figures with other seeds, whose mean and standard deviation are given.
        batch_size (`int`): of sampling and of the feature network, on each process.
        prompts ([`~cm_diffusers.evaluation.prompts.Prompts`], *optional*): what the images are made of.
        clip ([`~cm_diffusers.evaluation.clip_score.ClipScore`], *optional*): tells how well they show it, which is one
            more metric, `clip_score`.
    """

    features: Features
    reference: Reference
    num_images: int
    repeats: int = 1
    batch_size: int = 64
    prompts: Prompts | None = None
    clip: ClipScore | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "repeats", "batch_size"):
            if getattr(self, name) < 1 + (name == "num_images"):
                raise ValueError(f"`{name}` must be at least {1 + (name == 'num_images')}, got {getattr(self, name)}.")
        if len(self.reference.images) < 2:
            raise ValueError("The reference must have two images at least.")
        if self.clip is not None and self.prompts is None:
            raise ValueError("`clip` compares images with the prompts that they are made of: it needs `prompts`.")

    @cached_property
    def protocol(self) -> Protocol:
        channels, height, width = self.reference.images.shape[1:]
        return Protocol(
            features=self.features.name, features_digest=self.features.digest, num_images=self.num_images,
            images=f"{channels} x {height} x {width}, 8 bits", reference=self.reference.name,
            reference_digest=self.reference.digest, num_reference=len(self.reference.images),
            **{} if self.prompts is None else {"prompts": str(self.prompts), "prompts_digest": self.prompts.digest},
            **{} if self.clip is None else {"clip": self.clip.name, "clip_digest": self.clip.digest},
        )  # fmt: skip

    @cached_property
    def real(self) -> Tensor:
        """Features of the reference, on the main process; empty on others. Called by all."""
        return reference_features(self.features, self.reference, self.batch_size)

    def measure(self, sampler: Sampler) -> Result:
        """All metrics of a sampler. The main process computes them for all.

        Raises:
            `ValueError`: if its images have another shape than the reference's, or are made of other prompts.
            `FloatingPointError`: if they are not finite.
        """
        real = self.real
        seconds, found = 0.0, []
        for repeat in range(self.repeats):
            drawn, spent = self._draw(sampler, repeat * self.num_images)
            seconds += spent
            found.append(on_main(PartialState(), functools.partial(_metrics, drawn, real)))
        return Result.over(
            found, model=sampler.model, sampler=sampler.description, nfe=sampler.nfe, protocol=self.protocol,
            seconds_per_1000=1000 * seconds / (self.repeats * self.num_images), weights=sampler.digest,
        )  # fmt: skip

    def fid(self, sampler: Sampler) -> float:
        """FID alone, of the first repetition: what a search over many samplers needs. Raises what `measure` does."""
        real = self.real
        features = self._draw(sampler, 0)[0]["features"]
        return float(on_main(PartialState(), functools.partial(frechet_distance, features, real)))

    def _draw(self, sampler: Sampler, first: int) -> tuple[dict[str, Tensor], float]:
        """What is found on the images from the seed `first` on, and the seconds that drawing them took."""
        if sampler.prompts != (() if self.prompts is None else self.prompts.texts):
            raise ValueError(
                f"The images of the {sampler.model} are made of other prompts than those of the protocol."
            )
        device, spent = PartialState().device, 0.0
        names: list[str] = []

        def work(indices: Sequence[int]) -> tuple[Tensor, ...]:
            nonlocal spent
            start = time.perf_counter()
            seeds = [first + index for index in indices]
            images = sampler.draw(seeds)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            spent += time.perf_counter() - start
            if images.shape[1:] != self.reference.images.shape[1:]:
                shapes = tuple(images.shape[1:]), tuple(self.reference.images.shape[1:])
                raise ValueError(f"Images of shape {shapes[0]} cannot be compared with a reference of {shapes[1]}.")
            found = self._look_at(images.to(device), seeds)
            names[:] = found
            return tuple(found.values())

        results = map_shared(self.num_images, self.batch_size, work, f"{sampler.model}, {sampler.nfe} NFE")
        return dict(zip(names, results, strict=True)), spent

    def _look_at(self, images: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Features of images and, if these can be had, logits and CLIP scores."""
        features, logits = self.features(images)
        found = {"features": features}
        if logits is not None:
            found["logits"] = logits
        if self.clip is not None and self.prompts is not None:
            found["clip_scores"] = self.clip.score(images, prompts_in_turn(self.prompts.texts, seeds))
        return found


def _metrics(drawn: Mapping[str, Tensor], real: Tensor) -> dict[str, float]:
    metrics = all_metrics(drawn["features"], real, drawn.get("logits"))
    scores = drawn.get("clip_scores")
    return metrics if scores is None else {**metrics, "clip_score": float(scores.double().mean())}
