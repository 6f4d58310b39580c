"""`cm-diffusers distill`, `train` and `doctor`: runs, and what they would meet."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from cm_diffusers.commands.config_options import add_config_options, parse_config_options
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
        base = f" --base {values['teacher']}" if trainer.config.lora_rank else ""
        options = "" if trainer.text is None else f"{base} --prompts TEXT"
        print(f"Student saved to {trainer.output_dir}. Sample with: cm-diffusers sample {trainer.output_dir}{options}")


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
    from cm_diffusers.training.config import ConsistencyConfig
    from cm_diffusers.training.config_values import read_yaml

    names = [spec.name for spec in dataclasses.fields(ConsistencyConfig)]
    parser = Parser(command)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of the options below; the command line comes first"
    )
    add_config_options(parser, names, {"method": method})
    values, given = parse_config_options(parser, arguments, names)
    from_file = read_yaml(given.config) if given.config else {}
    return {"method": method, **from_file, **values}
