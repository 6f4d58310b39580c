"""The `cm-diffusers` command."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from cm_diffusers import __version__
from cm_diffusers.commands.options import USAGE

# The function of each command, in `cm_diffusers.commands`.
FUNCTIONS = {
    "distill": "training.distill",
    "train": "training.train",
    "doctor": "training.doctor",
    "precompute": "precomputing.precompute",
    "sample": "sampling.sample",
    "edit": "editing.edit",
    "evaluate": "evaluation.evaluate",
    "timesteps": "timesteps.timesteps",
    "push": "publishing.push",
    "export": "publishing.export",
    "demo": "demo.demo",
    "import": "importing.import_",
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
    module, function = FUNCTIONS[command].split(".")
    run = getattr(importlib.import_module(f"cm_diffusers.commands.{module}"), function)
    try:
        run(given[1:])
    except (ValueError, TypeError, ImportError, FloatingPointError, OSError) as error:
        sys.exit(f"cm-diffusers {command}: error: {error}")


if __name__ == "__main__":
    main()
