"""`cm-diffusers distill`, `train` and `doctor`: runs, and what they would meet."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, get_args

from cm_diffusers.commands.options import Parser


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
    parser = Parser(command)
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


def _default(spec: dataclasses.Field[Any]) -> Any:
    value = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()  # type: ignore[operator]
    return "none" if value is None else value


def _kinds(name: str) -> list[Any]:
    from cm_diffusers.training.config import field_types

    hint = field_types()[name]
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
    if _kinds(name)[0] is str or "Literal" in str(_kinds(name)[0]):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{name}` cannot be read from {text!r}.") from error
