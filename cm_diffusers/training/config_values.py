"""Values of a config as they are written in files and on command lines."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML config file.

    Raises:
        `ValueError`: if the file is missing, is not YAML or holds something other than keys and values.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"Cannot read the config file {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"The config file {path} must hold `key: value` lines, got {type(values).__name__}.")
    return values


def unknown_key(key: str, names: list[str]) -> str:
    """What to say of a key that does not exist."""
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"Unknown option {key!r}." + (f" Did you mean {near[0]!r}?" if near else f" Options: {', '.join(names)}.")


def coerce(name: str, value: Any, types: Mapping[str, Any]) -> Any:
    """`value` as the type of the field `name` (YAML reads `1e-4` as text, and integers where floats go).

    Raises:
        `ValueError`: if it is not of that type, or not one of the choices.
    """
    hint = types[name]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if _is_optional(hint) else [hint]
    if value is None:
        if _is_optional(hint):
            return None
        raise ValueError(f"`{name}` must not be empty.")
    kind = kinds[0]
    if get_origin(kind) is Literal:
        if value is False and "no" in get_args(kind):  # YAML's `no`
            value = "no"
        if value not in get_args(kind):
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}.")
        return value
    try:
        return _convert(kind, value)
    except (TypeError, ValueError) as error:
        expected = getattr(kind, "__name__", str(kind))
        raise ValueError(f"`{name}` must be of type {expected}, got {value!r}.") from error


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _convert(kind: Any, value: Any) -> Any:
    if get_origin(kind) is list:
        return [_convert(get_args(kind)[0], item) for item in (value if isinstance(value, list | tuple) else [value])]
    if get_origin(kind) is dict:
        return {str(key): _convert(get_args(kind)[1], item) for key, item in dict(value).items()}
    if kind is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ValueError(value)
    if isinstance(value, bool) or isinstance(value, list | dict):
        raise TypeError(value)
    if kind is int and float(value) != int(float(value)):
        raise ValueError(value)
    return int(float(value)) if kind is int else kind(value)
