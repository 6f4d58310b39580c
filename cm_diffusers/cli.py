"""The `cm-diffusers` command: `distill`, `train`, `sample`, `import` and `doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from cm_diffusers import __version__

USAGE = {
    "distill": "Distil a pretrained diffusers UNet into a one-step student (consistency distillation).",
    "train": "Train a one-step network on data alone (consistency training).",
    "sample": "Draw images from a student.",
    "import": "Turn a published checkpoint of OpenAI (.pt) or NVlabs (.pkl) into a diffusers pipeline.",
    "doctor": "Say what a run would meet on this machine: versions, teacher, dataset, memory, speed.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `cm-diffusers` with `arguments`, or with those of the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="cm-diffusers", description="Consistency models for diffusers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in USAGE.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(given[:1]).command
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    run = {"distill": distill, "train": train, "sample": sample, "import": import_, "doctor": doctor}[command]
    try:
        run(given[1:])
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        sys.exit(f"cm-diffusers {command}: error: {error}")


def distill(arguments: Sequence[str]) -> None:
    """`cm-diffusers distill`: train with `method: cd` unless the config says otherwise."""
    _train("distill", arguments, "cd")


def train(arguments: Sequence[str]) -> None:
    """`cm-diffusers train`: train with `method: ct` unless the config says otherwise."""
    _train("train", arguments, "ct")


def _train(command: str, arguments: Sequence[str], method: str) -> None:
    values = parse_config(command, arguments, method)
    from cm_diffusers.training import ConsistencyConfig, ConsistencyTrainer

    trainer = ConsistencyTrainer(ConsistencyConfig.from_dict(values))
    trainer.train()
    if trainer.accelerator.is_main_process:
        print(f"Student saved to {trainer.output_dir}. Sample with: cm-diffusers sample {trainer.output_dir}")


def doctor(arguments: Sequence[str]) -> None:
    """`cm-diffusers doctor`: the options are those of `distill`; without any, only the machine is looked at.

    Exits with 1 if something would go wrong.
    """
    values = parse_config("doctor", arguments, "cd")
    from cm_diffusers.doctor import examine, examine_machine
    from cm_diffusers.training import ConsistencyConfig

    found = examine(ConsistencyConfig.from_dict(values)) if arguments else examine_machine()
    print(found)
    if found.warnings:
        sys.exit(1)


def parse_config(command: str, arguments: Sequence[str], method: str) -> dict[str, Any]:
    """The values of a run: the config file's, under those of the command line.

    Exits with a message for an unknown key, naming the nearest valid one.
    """
    from cm_diffusers.training.config import ConsistencyConfig, read_yaml, unknown_key

    fields = {spec.name: spec for spec in dataclasses.fields(ConsistencyConfig)}
    parser = _Parser(prog=f"cm-diffusers {command}", description=USAGE[command], allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of the options below; the command line comes first"
    )
    for name, spec in fields.items():
        default = method if name == "method" else _default(spec)
        text = f"{spec.metadata['help']} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=_metavar(name), help=text)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(unknown_key(unknown[0].split("=")[0].lstrip("-"), [*fields, "config"]))
    values = {name: _parse_value(name, text) for name, text in vars(given).items() if name != "config"}
    from_file = read_yaml(given.config) if given.config else {}
    return {"method": method, **from_file, **values}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(f"{self.prog}: error: {message} (--help lists the options)")


def _default(spec: dataclasses.Field[Any]) -> Any:
    value = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()  # type: ignore[operator]
    return "none" if value is None else value


def _kinds(name: str) -> list[Any]:
    from cm_diffusers.training.config import ConsistencyConfig

    hint = get_type_hints(ConsistencyConfig)[name]
    arguments = [kind for kind in get_args(hint) if kind is not type(None)]
    return arguments if type(None) in get_args(hint) else [hint]


def _metavar(name: str) -> str:
    choices = get_args(_kinds(name)[0])
    if choices and all(isinstance(choice, str) for choice in choices):
        return "{" + ",".join(choices) + "}"
    return str(getattr(_kinds(name)[0], "__name__", "value")).upper()


def _parse_value(name: str, text: str) -> Any:
    import yaml

    if text.lower() in ("none", "null"):
        return None if name != "tracker" else "none"
    return text if _kinds(name)[0] is str or "Literal" in str(_kinds(name)[0]) else yaml.safe_load(text)


def sample(arguments: Sequence[str]) -> None:
    """`cm-diffusers sample`: images from a student, one PNG each and one grid of all."""
    parser = _Parser(prog="cm-diffusers sample", description=USAGE["sample"], allow_abbrev=False)
    parser.add_argument("model", metavar="PATH", help="folder or Hub id of the student")
    parser.add_argument("--num_images", type=int, default=16, help="how many images (default: 16)")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations per image (default: 1)")
    parser.add_argument("--sigmas", type=float, nargs="+", help="noise levels to step through, instead of --steps")
    parser.add_argument("--class_labels", type=int, nargs="+", help="one label for all images, or one for each")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance (default: 1, off)")
    parser.add_argument("--seed", type=int, default=0, help="image i is drawn with seed + i (default: 0)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: 64)")
    parser.add_argument("--device", help="cpu, cuda, mps ...; by default the best there is")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--output_dir", default="outputs/samples", help="where the images go")
    options = parser.parse_args(arguments)
    if options.num_images < 1 or options.batch_size < 1:
        parser.error("--num_images and --batch_size must be positive.")
    images = _draw(options)

    from cm_diffusers.image_grid import save_grid

    folder = Path(options.output_dir)
    for index, image in enumerate(images):
        _save_image(image, folder / f"{index:05d}.png")
    save_grid(images, folder / "grid.png")
    print(f"{len(images)} images in {folder}, all of them in {folder / 'grid.png'}")


def import_(arguments: Sequence[str]) -> None:
    """`cm-diffusers import`: a folder that is a teacher, or a student to sample from."""
    parser = _Parser(prog="cm-diffusers import", description=USAGE["import"], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="FILE", help="cd_*.pt, ct_*.pt, edm_*.pt or edm-*.pkl; not executed")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="where the pipeline goes")
    parser.add_argument("--kind", choices=("cd", "ct", "edm"), help="what it is; by default the file's name says")
    parser.add_argument("--image_size", type=int, help="pixels; like all below, known for published models")
    parser.add_argument("--attention_head_dim", type=int, help="channels of an attention head")
    parser.add_argument("--qkv_order", choices=("new", "legacy"), help="OpenAI's use_new_attention_order: on or off")
    parser.add_argument("--num_train_timesteps", type=int, help="noise levels a consistency model was trained on")
    options = vars(parser.parse_args(arguments))

    from cm_diffusers.importing import import_checkpoint

    folder, path = options.pop("output_dir"), options.pop("checkpoint")
    pipeline = import_checkpoint(path, **options)
    pipeline.save_pretrained(folder)
    use = "sample" if type(pipeline).__name__ == "ConsistencyPipeline" else "distill --teacher"
    print(f"Saved to {folder}. Use it with: cm-diffusers {use} {folder}")


def _draw(options: argparse.Namespace) -> Any:
    import numpy as np
    import torch

    from cm_diffusers import ConsistencyPipeline

    device = options.device or _best_device()
    precision = {} if options.dtype == "float32" else {"torch_dtype": getattr(torch, options.dtype)}
    pipeline = ConsistencyPipeline.from_pretrained(options.model, **precision).to(device)
    labels = options.class_labels
    if labels is not None and len(labels) not in (1, options.num_images):
        raise ValueError(f"Got {len(labels)} class labels for {options.num_images} images.")
    batches = []
    for start in range(0, options.num_images, options.batch_size):
        indices = range(start, min(start + options.batch_size, options.num_images))
        batches.append(
            pipeline(
                batch_size=len(indices),
                class_labels=labels if labels is None or len(labels) == 1 else [labels[i] for i in indices],
                num_inference_steps=None if options.sigmas else options.steps,
                sigmas=options.sigmas,
                guidance_scale=options.guidance_scale,
                generator=[torch.Generator().manual_seed(options.seed + i) for i in indices],
                output_type="np",
            ).images
        )
    return np.concatenate(batches)


def _best_device() -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def _save_image(image: Any, path: Path) -> None:
    from diffusers import DiffusionPipeline

    path.parent.mkdir(parents=True, exist_ok=True)
    DiffusionPipeline.numpy_to_pil(image[None])[0].save(path)
