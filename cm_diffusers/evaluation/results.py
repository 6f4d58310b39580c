"""Figures with what they were measured by, and tables that keep different protocols apart."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """Everything beside the images that a figure depends on.

    Args:
        features (`str`): the feature network, with how it resizes.
        features_digest (`str`): of its weights.
        images (`str`): size, channels and quantisation of the images that it sees.
        num_images (`int`): generated, for every figure.
        reference (`str`): the images that they are compared with.
        reference_digest (`str`): of their pixels.
        num_reference (`int`): how many they are.
        prompts (`str`), prompts_digest (`str`): what the images are made of; empty without text.
        clip (`str`), clip_digest (`str`): the model of the CLIP score; empty without one.
    """

    features: str
    features_digest: str
    images: str
    num_images: int
    reference: str
    reference_digest: str
    num_reference: int
    prompts: str = ""
    prompts_digest: str = ""
    clip: str = ""
    clip_digest: str = ""

    def __str__(self) -> str:
        text = (
            f"{self.num_images:,} images ({self.images}) against {self.num_reference:,} of {self.reference}, "
            f"features: {self.features} [{self.features_digest}]"
        )
        if self.prompts:
            text += f", prompts: {self.prompts} [{self.prompts_digest}]"
        return text + (f", CLIP: {self.clip} [{self.clip_digest}]" if self.clip else "")

    def facts(self) -> dict[str, Any]:
        """Its fields by name, without those that are empty."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value != ""}


@dataclass(frozen=True)
class Result:
    """The figures of one model at one number of network evaluations.

    Args:
        model (`str`): `"student"`, `"teacher"` or another name.
        sampler (`str`): how it was sampled.
        nfe (`int`): network evaluations per image.
        metrics (`dict[str, float]`): means over repetitions with other seeds.
        spread (`dict[str, float]`): their standard deviations; empty for one repetition.
        repeats (`int`): how many.
        seconds_per_1000 (`float`): of sampling, on all devices together.
        protocol ([`Protocol`]): what the figures depend on.
        weights (`str`): a digest of the model's weights and scheduler; empty if unknown.
    """

    model: str
    sampler: str
    nfe: int
    metrics: dict[str, float]
    spread: dict[str, float]
    repeats: int
    seconds_per_1000: float
    protocol: Protocol
    weights: str = ""

    @classmethod
    def over(cls, repetitions: Sequence[dict[str, float]], **description: Any) -> Result:
        """From the metrics of each repetition."""
        series = {name: [found[name] for found in repetitions] for name in repetitions[0]}
        means = {name: statistics.fmean(values) for name, values in series.items()}
        spread = {name: statistics.stdev(values) for name, values in series.items() if len(values) > 1}
        return cls(metrics=means, spread=spread, repeats=len(repetitions), **description)

    def text(self, metric: str) -> str:
        """The figure, with its spread."""
        value = f"{self.metrics[metric]:.4g}" if metric in self.metrics else "-"
        return f"{value} ± {self.spread[metric]:.2g}" if metric in self.spread else value


@dataclass
class Report:
    """Results that may be compared: they have one protocol, and those of a model are of the same weights."""

    results: list[Result] = field(default_factory=list)

    @property
    def protocol(self) -> Protocol | None:
        return self.results[0].protocol if self.results else None

    def add(self, result: Result) -> None:
        """Add a result, in the place of one of the same model, sampler and number of evaluations.

        Raises:
            `ValueError`: if it cannot stand beside the others, as for `check`.
        """
        self.check(result.protocol, result.model, result.weights)
        key = (result.model, result.sampler, result.nfe)
        self.results = [r for r in self.results if (r.model, r.sampler, r.nfe) != key] + [result]

    def check(self, protocol: Protocol, model: str, weights: str) -> None:
        """See that a result can stand beside those that are there.

        Raises:
            `ValueError`: if it has another protocol, naming the differences, or other weights under the same name.
        """
        if self.protocol is not None and protocol != self.protocol:
            old, new = dataclasses.asdict(self.protocol), dataclasses.asdict(protocol)
            differences = "; ".join(
                f"{name}: {old[name]!r} and {new[name]!r}" for name in old if old[name] != new[name]
            )
            raise ValueError(f"Figures of different protocols cannot stand in one table: {differences}.")
        if any(r.weights != weights for r in self.of(model)):
            raise ValueError(
                f"The report has figures of another {model}, with other weights or another scheduler: put those of "
                "this one elsewhere, or delete the report."
            )

    def of(self, model: str) -> list[Result]:
        """The results of one model, by number of evaluations."""
        return sorted((r for r in self.results if r.model == model), key=lambda r: r.nfe)

    def table(self, metrics: Iterable[str] | None = None) -> str:
        """A Markdown table, with the protocol below it."""
        if not self.results:
            return ""
        names = list(metrics or self.results[0].metrics)
        rows = [["model", "sampler", "NFE", *(TITLES.get(name, _plain(name)) for name in names), "s per 1,000"]]
        for model in dict.fromkeys(result.model for result in self.results):
            for r in self.of(model):
                figures = [r.text(name) for name in names]
                rows.append([_plain(r.model), _plain(r.sampler), str(r.nfe), *figures, f"{r.seconds_per_1000:.3g}"])
        rows.insert(1, ["---"] * len(rows[0]))
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        protocol = self.results[0].protocol
        plain: dict[str, Any] = {
            name: _plain(fact) if isinstance(fact, str) else fact for name, fact in protocol.facts().items()
        }
        return "\n".join([*lines, "", f"{Protocol(**plain)}."])

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        write_whole(Path(path), json.dumps([dataclasses.asdict(result) for result in self.results], indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote.

        Raises:
            `ValueError`: if the file is not of this form.
        """
        try:
            report = cls()
            for values in json.loads(Path(path).read_text()):
                report.add(Result(**{**values, "protocol": Protocol(**values["protocol"])}))
        except (OSError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no evaluation: {error}") from error
        return report


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its final place, then move it there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _plain(text: str) -> str:
    """`text` as Markdown shows it, with nothing in it that would make a cell, a link, a picture or a tag."""
    return re.sub(r"([\\`|<>\[\]])", r"\\\1", " ".join(text.split()))


TITLES = {
    "fid": "FID ↓", "kid": "KID ↓", "inception_score": "IS ↑", "precision": "precision ↑", "recall": "recall ↑",
    "density": "density ↑", "coverage": "coverage ↑", "clip_score": "CLIP score ↑",
}  # fmt: skip
