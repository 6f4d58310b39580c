"""Figures with what they were measured by, and tables that keep different protocols apart."""

from __future__ import annotations

import dataclasses
import json
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
    """

    features: str
    features_digest: str
    images: str
    num_images: int
    reference: str
    reference_digest: str
    num_reference: int

    def __str__(self) -> str:
        return (
            f"{self.num_images:,} images ({self.images}) against {self.num_reference:,} of {self.reference}, "
            f"features: {self.features} [{self.features_digest}]"
        )


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
    """

    model: str
    sampler: str
    nfe: int
    metrics: dict[str, float]
    spread: dict[str, float]
    repeats: int
    seconds_per_1000: float
    protocol: Protocol

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
    """Results that may be compared, since they have one protocol."""

    results: list[Result] = field(default_factory=list)

    @property
    def protocol(self) -> Protocol | None:
        return self.results[0].protocol if self.results else None

    def add(self, result: Result) -> None:
        """Add a result, in the place of one of the same model, sampler and number of evaluations.

        Raises:
            `ValueError`: if it has another protocol, naming the differences.
        """
        if self.protocol is not None and result.protocol != self.protocol:
            old, new = dataclasses.asdict(self.protocol), dataclasses.asdict(result.protocol)
            differences = "; ".join(
                f"{name}: {old[name]!r} and {new[name]!r}" for name in old if old[name] != new[name]
            )
            raise ValueError(f"Figures of different protocols cannot stand in one table: {differences}.")
        key = (result.model, result.sampler, result.nfe)
        self.results = [r for r in self.results if (r.model, r.sampler, r.nfe) != key] + [result]

    def of(self, model: str) -> list[Result]:
        """The results of one model, by number of evaluations."""
        return sorted((r for r in self.results if r.model == model), key=lambda r: r.nfe)

    def best(self, model: str, metric: str = "fid") -> Result | None:
        """The result with the lowest `metric`."""
        return min(self.of(model), key=lambda r: r.metrics[metric], default=None)

    def table(self, metrics: Iterable[str] | None = None) -> str:
        """A Markdown table, with the protocol below it."""
        if not self.results:
            return ""
        names = list(metrics or self.results[0].metrics)
        rows = [["model", "sampler", "NFE", *(TITLES.get(name, name) for name in names), "s per 1,000"]]
        for model in dict.fromkeys(result.model for result in self.results):
            for r in self.of(model):
                figures = [r.text(name) for name in names]
                rows.append([r.model, r.sampler, str(r.nfe), *figures, f"{r.seconds_per_1000:.3g}"])
        rows.insert(1, ["---"] * len(rows[0]))
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([*lines, "", f"{self.protocol}."])

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps([dataclasses.asdict(result) for result in self.results], indent=2) + "\n")

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


TITLES = {
    "fid": "FID ↓", "kid": "KID ↓", "inception_score": "IS ↑", "precision": "precision ↑", "recall": "recall ↑",
    "density": "density ↑", "coverage": "coverage ↑",
}  # fmt: skip
