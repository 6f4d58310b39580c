"""A model card made of what really happened: the run's record, its evaluation, its samples."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cm_diffusers.evaluation.results import TITLES, Protocol
from cm_diffusers.evaluation.timestep_search import levels_text
from cm_diffusers.hub.student import Student
from cm_diffusers.hub.usage import usage
from cm_diffusers.training.record import HUB_ID, SAMPLES, TrainingRecord

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


def render_card(folder: str | Path, repo_id: str) -> ModelCard:
    """The card of a student.

    Reads `training.json`, `evaluation/report.json`, `evaluation.jsonl` or `evaluation.json`, and `samples.png` of the
    folder, and says nothing of what is not there.

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
        usage(student),
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
    task = "text-to-image" if student.takes_prompts else "unconditional-image-generation"
    if student.teacher_id is not None:
        values["base_model"] = student.teacher_id
        if student.is_adapters:
            values["base_model_relation"] = "adapter"
    dataset = record.dataset["name"] if record else ""
    if HUB_ID.fullmatch(dataset or ""):
        values["datasets"] = [dataset]
    if report is not None and report.protocol is not None:
        data = {"task_type": task, "dataset_type": "images", "dataset_name": report.protocol.reference}
        values["eval_results"] = [
            EvalResult(
                metric_type=name,
                metric_name=f"{TITLES[name].rpartition(' ')[0]}, {result.nfe} NFE",
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
        license=teacher.get("license"), library_name="diffusers", pipeline_tag=task,
        tags=["consistency-models", "cm_diffusers", "one-step", kind, *["lora"] * student.is_adapters], **values,
    )  # fmt: skip


def _introduction(student: Student) -> str:
    kind = "The adapters (LoRA) of a" if student.is_adapters else "A"
    text = (
        f"{kind} [consistency model](https://arxiv.org/abs/2303.01469){_origin(student.record)}: it "
        f"{_does(student)} in one evaluation of its network, or in a few."
    )
    if (student.folder / SAMPLES).exists():
        text += f"\n\n![Samples in one step]({SAMPLES})"
    return text


def _does(student: Student) -> str:
    """What it does, as far as its folder says."""
    size, classes = student.image_size, student.unet.get("num_class_embeds")
    images = f"images of {size[0]} × {size[1]} pixels" if size else "images"
    if student.takes_prompts:
        return f"makes {images} of text"
    return f"draws {images} of {classes} classes" if classes else f"draws {images}"


def _origin(record: TrainingRecord | None) -> str:
    if record is None:
        return ""
    if record.teacher is None:
        return ", trained on data alone"
    how = "distilled from" if _is_distilled(record) else "trained on data from the weights of"
    return f", {how} {_code(record.teacher['name'])}"


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
        raise ValueError(f"{student.measured_in} holds no evaluation of a student: {error!r}") from error


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
