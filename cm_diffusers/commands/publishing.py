"""`cm-diffusers push` and `export`: students to the Hub, and to other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cm_diffusers.commands.options import Parser, add_student


def push(arguments: Sequence[str]) -> None:
    """`cm-diffusers push`: one commit with the student, its card and its evaluation."""
    parser = Parser("push")
    parser.add_argument("folder", metavar="FOLDER", help="the student, as a run saved it")
    parser.add_argument("repo_id", metavar="NAME", help="name, user/name or organisation/name on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--token", help="by default that of `hf auth login` or HF_TOKEN")
    parser.add_argument("--revision", help="branch to commit to, made if there is none")
    parser.add_argument("--commit_message", default="Upload student", help="of the commit")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry_run", action="store_true", help="print the card, and push nothing")
    options = vars(parser.parse_args(arguments))
    from cm_diffusers.hub import push_to_hub, render_card

    folder, repo_id = options.pop("folder"), options.pop("repo_id")
    if options.pop("dry_run"):
        print(render_card(folder, repo_id))
    else:
        print(f"Pushed to {push_to_hub(folder, repo_id, **options)}")


def export(arguments: Sequence[str]) -> None:
    """`cm-diffusers export`: a stock pipeline, or an ONNX model of one step."""
    parser = Parser("export")
    add_student(parser)
    parser.add_argument("folder", metavar="FOLDER", help="where the export goes")
    parser.add_argument("--format", choices=("diffusers", "onnx"), default="diffusers", help="(default: diffusers)")
    options = parser.parse_args(arguments)
    from cm_diffusers import ConsistencyPipeline
    from cm_diffusers.hub import export_to_diffusers, export_to_onnx
    from cm_diffusers.pipelines.loading import refuse_prompts
    from cm_diffusers.pipelines.weights import load_weights
    from cm_diffusers.training.record import TrainingRecord

    refuse_prompts(options.model, options.revision)
    pipeline = load_weights(ConsistencyPipeline, options.model, revision=options.revision)
    if options.format == "onnx":
        print(f"Wrote {export_to_onnx(pipeline, options.folder)}: noise of unit variance in, images in [0, 1] out.")
    else:
        record = TrainingRecord.load(Path(options.model))
        kind = export_to_diffusers(pipeline, options.folder)
        if record is not None:
            record.save(Path(options.folder))
        print(f"Wrote {options.folder}, which loads with diffusers.{kind.__name__}.")
        for steps in sorted(map(int, pipeline.scheduler.config.few_step_sigmas or {})):
            if (timesteps := pipeline.scheduler.stock_timesteps(steps)) is not None:
                print(f"For the images of {steps} steps here, pass it `timesteps={timesteps}`.")
