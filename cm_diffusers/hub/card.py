"""A model card made of what really happened: the run's record, its evaluation, its samples."""

from __future__ import annotations

import html
import json
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cm_diffusers.evaluation.digests import model_digest
from cm_diffusers.evaluation.in_loop import HISTORY, read_history
from cm_diffusers.evaluation.results import TITLES, Protocol, Report
from cm_diffusers.evaluation.timestep_search import levels_text
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.training.record import HUB_ID, SAMPLES, TrainingRecord

logger = logging.getLogger(__name__)

TASK = "unconditional-image-generation"
RENDERED = "<!-- Rendered by cm_diffusers, and anew with every push. Delete this line to keep what you change. -->"
CITATION = """\
```bibtex
@inproceedings{song2023consistency,
  title     = {Consistency Models},
  author    = {Song, Yang and Dhariwal, Prafulla and Chen, Mark and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year      = {2023}
}
```"""


@dataclass(frozen=True)
class Student:
    """What is in a student's folder.

    Args:
        folder (`Path`): as `ConsistencyPipeline.save_pretrained` wrote it.
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

    @property
    def index(self) -> dict[str, Any]:
        return self._json("model_index.json")

    @property
    def scheduler(self) -> ConsistencyScheduler:
        scheduler: ConsistencyScheduler = ConsistencyScheduler.from_config(
            self._json("scheduler", "scheduler_config.json")
        )
        return scheduler

    @property
    def unet(self) -> dict[str, Any]:
        return self._json("unet", "config.json")

    @property
    def is_stock(self) -> bool:
        """Whether stock diffusers classes represent it exactly."""
        return self.index.get("_class_name") == "ConsistencyModelPipeline"

    @property
    def record(self) -> TrainingRecord | None:
        return TrainingRecord.load(self.folder)

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
        if not measured:
            return True
        return measured == {model_digest(UNet2DModel.from_pretrained(self.folder / "unet"), self.scheduler.config)}

    @property
    def last_measured(self) -> list[dict[str, Any]]:
        """The figures of the last evaluation while it trained; empty if there was none."""
        history = read_history(self.folder / HISTORY)
        return [entry for entry in history if entry["step"] == history[-1]["step"]]


def render_card(folder: str | Path, repo_id: str) -> ModelCard:
    """The card of a student.

    Reads `training.json`, `evaluation/report.json`, `evaluation.jsonl` and `samples.png` of the folder, and says
    nothing of what is not there.

    Args:
        folder (`str` or `Path`): of the student.
        repo_id (`str`): its name on the Hub, for the loading snippets.

    Raises:
        `ValueError`: if the folder holds no student, or a file in it is damaged.
    """
    student = Student(Path(folder), repo_id)
    parts = [
        f"# {repo_id.rsplit('/', 1)[-1]}",
        _introduction(student),
        _usage(student),
        _training(student.record),
        _evaluation(student),
        _limitations(student),
        _license(student.record),
        f"## Citation\n\n{CITATION}",
    ]
    metadata = _metadata(student).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n{RENDERED}\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def is_rendered(card: Path) -> bool:
    """Whether a README.md is one that `render_card` made, rather than a person's own."""
    return RENDERED in card.read_text(encoding="utf-8", errors="replace")


def _is_distilled(record: TrainingRecord | None) -> bool:
    return record is not None and record.teacher is not None and record.choices.get("source") == "teacher"


def _metadata(student: Student) -> ModelCardData:
    record, report = student.record, student.report
    values: dict[str, Any] = {}
    teacher = (record.teacher or {}) if record else {}
    if HUB_ID.fullmatch(teacher.get("name", "")):
        values["base_model"] = teacher["name"]
    dataset = record.dataset["name"] if record else ""
    if HUB_ID.fullmatch(dataset or ""):
        values["datasets"] = [dataset]
    if report is not None and report.protocol is not None:
        data = {"task_type": TASK, "dataset_type": "images", "dataset_name": report.protocol.reference}
        values["eval_results"] = [
            EvalResult(
                metric_type=name,
                metric_name=f"{TITLES[name].split()[0]}, {result.nfe} NFE",
                metric_value=value,
                **data,
            )
            for result in report.of("student")
            for name, value in result.metrics.items()
        ]
        values["model_name"] = student.repo_id.rsplit("/", 1)[-1]
    kind = "distillation" if _is_distilled(record) else "image-generation"
    if (student.folder / SAMPLES).exists():
        values["widget"] = [{"text": "-", "output": {"url": SAMPLES}}]  # the Hub asks for a prompt, and there is none
    return ModelCardData(
        license=teacher.get("license"), library_name="diffusers", pipeline_tag=TASK,
        tags=["consistency-models", "cm_diffusers", "one-step", kind], **values,
    )  # fmt: skip


def _introduction(student: Student) -> str:
    unet = student.unet
    size = unet.get("sample_size")
    height, width = (size, size) if isinstance(size, int) else size or ("?", "?")
    classes = f" of {unet['num_class_embeds']} classes" if unet.get("num_class_embeds") else ""
    text = (
        f"A [consistency model](https://arxiv.org/abs/2303.01469){_origin(student.record)}: it draws images of "
        f"{height} × {width} pixels{classes} in one evaluation of its network, or in a few."
    )
    if (student.folder / SAMPLES).exists():
        text += f"\n\n![Samples in one step]({SAMPLES})"
    return text


def _origin(record: TrainingRecord | None) -> str:
    if record is None:
        return ""
    if record.teacher is None:
        return ", trained on data alone"
    how = "distilled from" if _is_distilled(record) else "trained on data from the weights of"
    return f", {how} {_code(record.teacher['name'])}"


def _usage(student: Student) -> str:
    conditional = bool(student.unet.get("num_class_embeds"))
    label = "class_labels=0, " if conditional else ""
    ours = (
        "```python\n# pip install cm_diffusers\nfrom cm_diffusers import ConsistencyPipeline\n\n"
        f'pipe = ConsistencyPipeline.from_pretrained("{student.repo_id}")\n'
        f"image = pipe({label}num_inference_steps=1).images[0]\n"
        f"image = pipe({label}num_inference_steps=2).images[0]\n```"
    )
    stock = (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{student.repo_id}")\n'
        f"image = pipe({label}num_inference_steps=1).images[0]\n```"
    )
    if student.is_stock:
        same = f"With stock diffusers, or with cm_diffusers for the same images:\n\n{stock}\n\n{ours}"
        return "\n\n".join(["## Use", same, *_stored_for_stock(student.scheduler)])
    network = (
        "```python\nfrom diffusers import UNet2DModel\n\n"
        f'unet = UNet2DModel.from_pretrained("{student.repo_id}", subfolder="unet")\n```'
    )
    return (
        f"## Use\n\n{ours}\n\nStock diffusers has no pipeline that computes this student (family "
        f"`{student.scheduler.config.family}`, boundary `{student.scheduler.config.boundary}`): `DiffusionPipeline` "
        f"does not load it. Its network alone loads there:\n\n{network}"
    )


def _stored_for_stock(scheduler: ConsistencyScheduler) -> list[str]:
    """How stock diffusers takes the levels that are stored for a number of steps, of which it knows nothing."""
    texts = []
    for steps in sorted(map(int, scheduler.config.few_step_sigmas or {})):
        timesteps = scheduler.stock_timesteps(steps)
        other = f"pass it `timesteps={timesteps}` for the same images" if timesteps else "it draws other images"
        texts.append(f"In {steps} steps cm_diffusers takes stored levels, unknown to stock diffusers: {other}.")
    return texts


def _plain(text: Any) -> str:
    """Text that cannot be taken for markup, or for the end of a table's cell."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\\[\]!*_|~`])", r"\\\1", escaped)


def _code(text: Any) -> str:
    """Text as it is, in the type of code, in which nothing is markup."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def _training(record: TrainingRecord | None) -> str:
    if record is None:
        return ""
    rows = {
        "method": record.method,
        **{name.replace("_", " "): value for name, value in record.choices.items()},
        **{name.replace("_", " "): value for name, value in record.optimisation.items()},
        "steps of conversion before": f"{record.conversion_steps:,}" if record.conversion_steps else None,
        "steps": f"{record.steps:,}",
        "images seen": f"{record.images:,}",
        "steps left out (no finite gradient)": record.skipped_steps or None,
        "weights": f"{record.parameters:,}",
        "hardware": f"{record.processes} × {record.hardware}, precision {record.precision}",
        "time": _duration(record.seconds),
        "seed": record.seed,
        "software": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "finished": record.date,
    }
    lines = [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items() if value is not None]
    lines.append(f"| data | {_data(record.dataset)} |")
    teacher = ""
    if record.teacher:
        name = record.teacher["name"]
        shown = f"[{_plain(name)}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else _code(name)
        teacher = f"Teacher: {shown}, under a {_code(record.teacher['scheduler'])}.\n\n"
    return "## Training\n\n" + teacher + "\n".join(["| | |", "|---|---|", *lines])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _data(dataset: dict[str, Any]) -> str:
    name, rows = dataset.get("name"), dataset.get("rows")
    shown = _plain(name or "private data")
    if HUB_ID.fullmatch(name or ""):
        shown = f"[{shown}](https://huggingface.co/datasets/{name})"
    return f"{shown}, {rows:,} images" if rows else shown


def _evaluation(student: Student) -> str:
    report = student.report
    table = report.table() if report is not None and report.results else ""
    texts = [text for text in (table, _while_it_trained(student)) if text]
    if not texts:
        return ""
    note = "FID and the other figures depend on all of that; compare them only with figures of the same protocol."
    return "\n\n".join(["## Evaluation", *texts, note])


def _while_it_trained(student: Student) -> str:
    try:
        measured = student.last_measured
        if not measured:
            return ""
        figures = "; ".join(f"{_figures(entry)} at {entry['nfe']} NFE" for entry in measured)
        step, protocol = measured[-1]["step"], Protocol(**measured[-1]["protocol"])
        return f"While it trained, at step {step:,}: {figures}. {_plain(protocol)}."
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{student.folder / HISTORY} holds no evaluation of a student: {error!r}") from error


def _figures(entry: dict[str, Any]) -> str:
    return ", ".join(f"{title} {entry[name]:.4g}" for name, title in TITLES.items() if name in entry)


def _limitations(student: Student) -> str:
    sigmas = {int(steps): levels for steps, levels in (student.scheduler.config.few_step_sigmas or {}).items()}
    stored = "; ".join(f"{steps} steps at σ = {levels_text(levels)}" for steps, levels in sorted(sigmas.items()))
    lines = [
        "It knows the images that it was trained on, with their biases and gaps, and no others.",
        "One step trades quality for speed: compare with more steps.",
        "It is best at the noise levels of its training; others may do worse."
        + f" Stored with it: {stored}." * bool(stored),
    ]
    if student.report is None and not student.last_measured:
        lines.append("Its quality has not been measured.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _license(record: TrainingRecord | None) -> str:
    if record is None or not record.teacher:
        return ""
    if record.teacher.get("license"):
        return f"## Licence\n\n{_code(record.teacher['license'])}, that of its teacher."
    return (
        "## Licence\n\nThat of its teacher, which states none: ask its authors before you use or share this student."
    )
