"""Options of the command line that are fields of a run's config."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from cm_diffusers.commands.options import Parser

NOTHING = ("none", "null")
SYNTAX = (
    "STR is taken as it is written, any other value as YAML. Several values are several arguments (--data_files a.tar "
    "b.tar), or one list in YAML (--data_files '[a.tar, b.tar]'). The word none switches an option off."
)


def add_config_options(parser: Parser, names: Iterable[str], defaults: Mapping[str, Any]) -> None:
    """Let a parser take some of the config's fields, of which those that are not given are left out.

    Args:
        parser ([`~cm_diffusers.commands.options.Parser`]): of the command.
        names (`Iterable[str]`): of the fields.
        defaults (`Mapping[str, Any]`): for the help, where they are others than the config's.
    """
    from cm_diffusers.training.config import ConsistencyConfig

    fields = {spec.name: spec for spec in dataclasses.fields(ConsistencyConfig)}
    add = parser.add_argument_group("fields of a run's config", SYNTAX).add_argument
    for name in names:
        spec = fields[name]
        default = defaults.get(name, _default(spec))
        text = f"{spec.metadata['help']} (default: {default})".replace("%", "%%")
        number = "+" if _is_list(name) else None
        add(f"--{name}", default=argparse.SUPPRESS, nargs=number, metavar=_metavar(name), help=text)


def parse_config_options(
    parser: Parser, arguments: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, Any], argparse.Namespace]:
    """The values of the fields that are given, and what the parser was told besides.

    Exits with a message for an unknown option, naming the nearest of the fields `names` and the parser's own.
    """
    from cm_diffusers.training.config_values import unknown_key

    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        own = [name for name in vars(given) if name not in names]
        parser.error(unknown_key(unknown[0].split("=")[0].lstrip("-"), [*names, *own]))
    values = {name: _parse(name, written) for name, written in vars(given).items() if name in names}
    return values, given


def _default(spec: dataclasses.Field[Any]) -> Any:
    value = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()  # type: ignore[operator]
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else value


def _kinds(name: str) -> list[Any]:
    from cm_diffusers.training.config import field_types

    hint = field_types()[name]
    arguments = [kind for kind in get_args(hint) if kind is not type(None)]
    return arguments if type(None) in get_args(hint) else [hint]


def _is_list(name: str) -> bool:
    return get_origin(_kinds(name)[0]) is list


def _kind(name: str) -> Any:
    """The type of the field, or of its items if it is a list."""
    kind = _kinds(name)[0]
    return get_args(kind)[0] if _is_list(name) else kind


def _metavar(name: str) -> str:
    choices = get_args(_kind(name))
    if choices and all(isinstance(choice, str) for choice in choices):
        return "{" + ",".join(choices) + "}"
    return str(getattr(_kind(name), "__name__", "value")).upper()


def _parse(name: str, written: str | list[str]) -> Any:
    """The value of a field, of one argument or of a list of them."""
    if isinstance(written, str):
        return _parse_value(name, written)
    if len(written) == 1:
        if written[0].lower() in NOTHING:
            return None
        if (found := _yaml_list(written[0])) is not None:
            return found
    if _kind(name) is str:
        return written
    return [_parse_value(name, part) for text in written for part in text.split(",") if part]


def _yaml_list(text: str) -> list[Any] | None:
    """What `[...]` is in YAML; `None` for other text, such as the pattern `[ab]*.png`."""
    import yaml

    if not text.lstrip().startswith("["):
        return None
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return found if isinstance(found, list) else None


def _parse_value(name: str, text: str) -> Any:
    import yaml

    if text.lower() in NOTHING:
        return None if name != "tracker" else "none"
    if _kind(name) is str or "Literal" in str(_kind(name)):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{name}` cannot be read from {text!r}.") from error
