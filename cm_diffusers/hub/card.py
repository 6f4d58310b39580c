"""A model card made of what really happened: the run's record, its evaluation, its samples."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cm_diffusers.evaluation.results import TITLES, Report
from cm_diffusers.training.record import HUB_ID, TrainingRecord

TASK = "unconditional-image-generation"
SAMPLES = "samples.png"
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
    def scheduler(self) -> dict[str, Any]:
        return self._json("scheduler", "scheduler_config.json")

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

    @property
    def report(self) -> Report | None:
        path = self.folder / "evaluation" / "report.json"
        return Report.load(path) if path.exists() else None


def render_card(folder: str | Path, repo_id: str) -> ModelCard:
    """The card of a student.

    Reads `training.json`, `evaluation/report.json` and `samples.png` of the folder, and leaves out what is not there.

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
        _evaluation(student.report),
        _limitations(student),
        _license(student.record),
        f"## Citation\n\n{CITATION}",
    ]
    metadata = _metadata(student).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def _metadata(student: Student) -> ModelCardData:
    record, report, values = student.record, student.report, {}
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
    return ModelCardData(
        license=teacher.get("license"), library_name="diffusers", pipeline_tag=TASK,
        tags=["consistency-models", "cm_diffusers", "one-step", "distillation" if teacher else "image-generation"],
        **values,
    )  # fmt: skip


def _introduction(student: Student) -> str:
    unet, record = student.unet, student.record
    size = unet.get("sample_size")
    height, width = (size, size) if isinstance(size, int) else size or ("?", "?")
    classes = f" of {unet['num_class_embeds']} classes" if unet.get("num_class_embeds") else ""
    origin = "trained on data alone"
    if record is not None and record.teacher:
        origin = f"distilled from `{_plain(record.teacher['name'])}`"
    text = (
        f"A [consistency model](https://arxiv.org/abs/2303.01469), {origin}: it draws images of {height} × {width} "
        f"pixels{classes} in one evaluation of its network, and better ones in a few."
    )
    if (student.folder / SAMPLES).exists():
        text += f"\n\n![Samples in one step]({SAMPLES})"
    return text


def _usage(student: Student) -> str:
    conditional = bool(student.unet.get("num_class_embeds"))
    label = "class_labels=0, " if conditional else ""
    ours = (
        "```python\n# pip install cm_diffusers\nfrom cm_diffusers import ConsistencyPipeline\n\n"
        f'pipe = ConsistencyPipeline.from_pretrained("{student.repo_id}")\n'
        f"image = pipe({label}num_inference_steps=1).images[0]\n"
        f"better = pipe({label}num_inference_steps=2).images[0]\n```"
    )
    stock = (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{student.repo_id}")\n'
        f"image = pipe({label}num_inference_steps=1).images[0]\n```"
    )
    if student.is_stock:
        return f"## Use\n\nWith stock diffusers, or with cm_diffusers for the same images:\n\n{stock}\n\n{ours}"
    network = (
        "```python\nfrom diffusers import UNet2DModel\n\n"
        f'unet = UNet2DModel.from_pretrained("{student.repo_id}", subfolder="unet")\n```'
    )
    return (
        f"## Use\n\n{ours}\n\nStock diffusers has no pipeline that computes this student (family "
        f"`{student.scheduler['family']}`, boundary `{student.scheduler['boundary']}`): `DiffusionPipeline` does not "
        f"load it. Its network alone loads there:\n\n{network}"
    )


def _plain(text: Any) -> str:
    """Text that cannot be taken for markup, or for the end of a table's cell."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return escaped.replace("|", "\\|").replace("`", "'")


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
        "data": _data(record.dataset),
        "weights": f"{record.parameters:,}",
        "hardware": f"{record.processes} × {record.hardware}, precision {record.precision}",
        "time": _duration(record.seconds),
        "seed": record.seed,
        "software": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "finished": record.date,
    }
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows.items() if value is not None]
    teacher = ""
    if record.teacher:
        name = _plain(record.teacher["name"])
        shown = f"[{name}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else f"`{name}`"
        teacher = f"Teacher: {shown}, under a `{record.teacher['scheduler']}`.\n\n"
    return "## Training\n\n" + teacher + "\n".join(["| | |", "|---|---|", *lines])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _data(dataset: dict[str, Any]) -> str:
    name, rows = dataset.get("name"), dataset.get("rows")
    shown = (
        f"[{name}](https://huggingface.co/datasets/{name})" if HUB_ID.fullmatch(name or "") else name or "private data"
    )
    return f"{shown}, {rows:,} images" if rows else str(shown)


def _evaluation(report: Report | None) -> str:
    if report is None or not report.results:
        return ""
    note = "FID and the other figures depend on all of that; compare them only with figures of the same protocol."
    return f"## Evaluation\n\n{report.table()} {note}"


def _limitations(student: Student) -> str:
    sigmas = student.scheduler.get("few_step_sigmas") or {}
    stored = "; ".join(
        f"{steps} steps at σ = {', '.join(f'{sigma:.3g}' for sigma in levels)}"
        for steps, levels in sorted(sigmas.items())
    )
    lines = [
        "It knows the images that it was trained on, with their biases and gaps, and no others.",
        "One step trades quality for speed; see the evaluation, or compare with more steps.",
        "It is best at the noise levels of its training; others may do worse."
        + f" Stored with it: {stored}." * bool(stored),
    ]
    if student.report is None:
        lines.append("Its quality has not been measured.")
    return "## Limitations\n\n" + "\n".join(f"- {line}" for line in lines)


def _license(record: TrainingRecord | None) -> str:
    if record is None or not record.teacher:
        return ""
    if record.teacher.get("license"):
        return f"## Licence\n\n`{record.teacher['license']}`, that of its teacher."
    return (
        "## Licence\n\nThat of its teacher, which states none: ask its authors before you use or share this student."
    )
