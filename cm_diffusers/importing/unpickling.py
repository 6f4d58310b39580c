"""Reading pickled weights without running what a pickle asks to run.

A pickle names globals, classes and functions, and has them called. Here every name that is known is answered by an
inert class, which only writes down what it was called with; every other name is refused. What the records mean is read
afterwards: no class or source code that comes with a file is ever imported or executed.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# torch.load(weights_only=True) could be made to run code before this version (CVE-2025-32434, CVE-2026-24747).
SAFE_TORCH = "2.10"

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
PARAMETER = "torch._utils._rebuild_parameter"
TENSOR = "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
CONTAINERS = ("torch.nn.modules.container.ModuleDict", "torch.nn.modules.container.ModuleList")
NUMPY = (
    "numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar "
    "numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct numpy.core.numeric._frombuffer "
    "numpy._core.numeric._frombuffer"
).split()
INERT = frozenset((PERSISTENT, PARAMETER, TENSOR, STORAGE, *CONTAINERS, *NUMPY))
PLAIN = {
    "collections.OrderedDict": collections.OrderedDict,
    "dnnlib.util.EasyDict": dict,
    "builtins.set": set,
}


class _Fixed(type):
    """Classes whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise ValueError(f"it sets `{name}` of a class")


class Record(metaclass=_Fixed):
    """What a pickle says of an object: the global that makes it, what that is called with, and the state it gets.

    Attributes:
        name (`str`): the global, with its module.
        arguments (`tuple`): what it is called with.
        state (`Any`): the object's state; `None` if the pickle gives none.
    """

    __slots__ = ("name", "arguments", "state")
    global_name = ""
    name: str
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Record:
        record = super().__new__(cls)
        record.name, record.arguments, record.state = cls.global_name, arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The inert answer to a known global; all others are refused."""
        full_name = f"{module}.{name}"
        if full_name in INERT:
            return _Fixed("Record", (Record,), {"__slots__": (), "global_name": full_name})
        if full_name not in PLAIN:
            raise ValueError(f"it asks for `{full_name}`, which no network that can be imported needs")
        return PLAIN[full_name]


@dataclass
class PickledModule:
    """A `torch.nn.Module` out of a pickle, as data.

    Args:
        class_name (`str`): the name of its class.
        attributes (`dict`): its plain attributes.
        tensors (`dict[str, Tensor]`): its own parameters and buffers.
        children (`dict[str, PickledModule]`): its submodules, in order.
    """

    class_name: str
    attributes: dict[str, Any]
    tensors: dict[str, Tensor]
    children: dict[str, PickledModule]

    def attribute(self, name: str) -> Any:
        """A plain attribute, which has to be there."""
        if name not in self.attributes:
            raise ValueError(f"The {self.class_name} in the pickle has no attribute `{name}`.")
        return self.attributes[name]

    def child(self, name: str) -> PickledModule:
        """A submodule, which has to be there."""
        if name not in self.children:
            raise ValueError(
                f"The {self.class_name} in the pickle has no module `{name}`, only {', '.join(self.children)}."
            )
        return self.children[name]


def load_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """A state dict saved by `torch.save`, on the CPU.

    Args:
        path (`str` or `os.PathLike`): a `.pt` file.

    Raises:
        `ValueError`: if it holds anything but named tensors.
    """
    with Path(path).open("rb") as file:
        loaded = _load_weights(file, str(path))
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a state dict, found an object of type {type(loaded).__name__}.")
    if not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"{path} must hold a state dict, found names that are no text.")
    others = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} must hold a state dict of tensors alone; not tensors: {', '.join(others[:5])}.")
    for name, tensor in loaded.items():
        _check_weight(tensor, f"{path}: {name}")
    return dict(loaded)


def load_pickled_network(path: str | os.PathLike, key: str = "ema") -> PickledModule:
    """A network out of a pickle made with NVlabs' `torch_utils.persistence`.

    Args:
        path (`str` or `os.PathLike`): a `.pkl` file.
        key (`str`): where in the pickled dict the network is.

    Raises:
        `ValueError`: if the pickle is damaged, asks for an unknown global (which is named), or holds no network there.
    """
    with Path(path).open("rb") as file:
        try:
            loaded = _Unpickler(file).load()
            if isinstance(loaded, dict) and key in loaded:
                return _read_module(loaded[key], set())
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a hostile or torn pickle makes its reader fail in any way
            raise ValueError(f"{path} cannot be read as a pickled network: {error}.") from error
    found = f"a {type(loaded).__name__}"
    if isinstance(loaded, dict):
        found = f"a dict of {', '.join([name for name in loaded if isinstance(name, str)][:5])}"
    raise ValueError(f"{path} must hold a dict with a network under {key!r}, found {found}.")


def _read_module(record: Any, seen: set[int]) -> PickledModule:
    """The module of a record. None may be found twice: so nested, a few bytes would stand for any number of them."""
    if not isinstance(record, Record) or record.name not in (PERSISTENT, *CONTAINERS):
        raise ValueError(f"a module was expected, found a {getattr(record, 'name', type(record).__name__)}")
    if id(record) in seen:
        raise ValueError("a module is in two places")
    seen.add(id(record))
    if record.name == PERSISTENT:
        (meta,) = record.arguments
        class_name, state = meta["class_name"], dict(meta["state"])
        if not isinstance(class_name, str):
            raise ValueError(f"the name of a class is a {type(class_name).__name__}")
    else:
        class_name, state = record.name.split(".")[-1], dict(record.state)
    tensors = {**state.pop("_parameters"), **state.pop("_buffers")}
    children = state.pop("_modules")
    return PickledModule(
        class_name,
        state,
        {name: _read_tensor(value) for name, value in tensors.items() if value is not None},
        {name: _read_module(child, seen) for name, child in children.items() if child is not None},
    )


def _read_tensor(record: Any) -> Tensor:
    """The tensor that nested records describe: a parameter of a tensor of a storage of bytes."""
    name = getattr(record, "name", type(record).__name__)
    if name == PARAMETER:
        return _read_tensor(record.arguments[0])
    if name != TENSOR:
        raise ValueError(f"a tensor was expected, found a {name}")
    storage, offset, size, stride = record.arguments[:4]
    if not isinstance(storage, Record) or storage.name != STORAGE:
        raise ValueError("a tensor has no storage")
    values = _load_weights(io.BytesIO(*storage.arguments), "the storage of a tensor")
    if not isinstance(values, torch.TypedStorage):
        raise ValueError(f"the storage of a tensor is a {type(values).__name__}")
    flat = torch.empty(0, dtype=values.dtype).set_(values)  # type: ignore[call-overload]
    tensor = flat.as_strided(tuple(size), tuple(stride), offset)  # refuses to leave the storage
    _check_weight(tensor, "a tensor")
    return tensor


def _check_weight(tensor: Tensor, name: str) -> None:
    """Refuse what no network's weights are, and what would take more room than the file has."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
        raise ValueError(f"{name} is no weight but a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} repeats the same few values.")


def _load_weights(file: Any, name: str) -> Any:
    """`torch.load` of what holds tensors or a storage, and nothing else."""
    if torch.__version__ < SAFE_TORCH:
        raise ValueError(f"Reading pickles safely needs torch {SAFE_TORCH} or newer, found {torch.__version__}.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # torch's own text advises to load without the check.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for `{asked[1]}`" if asked else "it is damaged, or holds something else"
        raise ValueError(f"{name} cannot be read as weights alone: {reason}.") from error
