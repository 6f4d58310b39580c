"""What a file asks to run is not run: a hostile pickle here leaves a marker file when it is loaded the usual way."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nvlabs
import pytest
import torch
from openai_unet import OpenAIUNet

from cm_diffusers.importing import unpickling
from cm_diffusers.importing.unpickling import Record, load_pickled_network, load_state_dict


class Call:
    """Pickles as a call of `function`, which may be a call itself."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self) -> None:
        """Only callables can be asked to be called."""

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


ATTACKS = {
    "posix.system": lambda marker: Call(os.system, f"touch '{marker}'"),
    "builtins.eval": lambda marker: Call(eval, f"open({str(marker)!r}, 'w').close()"),
    "builtins.exec": lambda marker: Call(exec, f"open({str(marker)!r}, 'w').close()"),
    "builtins.getattr": lambda marker: Call(Call(getattr, marker, "touch")),
    "io.open": lambda marker: Call(open, marker, "w"),
    "subprocess.check_call": lambda marker: Call(subprocess.check_call, ["touch", str(marker)]),
}


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def attacks(marker) -> dict[str, Call]:
    """The attacks, each of which works on the usual loader."""
    calls = {name: attack(marker) for name, attack in ATTACKS.items()}
    for name, call in calls.items():
        pickle.loads(pickle.dumps(call))
        assert marker.exists(), name
        marker.unlink()
    return calls


def write(path: Path, content: Any) -> Path:
    with nvlabs.nvlabs_modules():
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path


def small_network() -> nvlabs.Linear:
    return nvlabs.Linear(2, 3)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("place", ["top", "beside the network", "in its state", "in a container's state"])
def test_pickle_that_calls_something_is_refused_by_name(name, place, attacks, marker, tmp_path) -> None:
    network = nvlabs.build(width=4, head_dim=4)
    content: Any = {"ema": network, "loss_fn": attacks[name]}
    if place == "in its state":
        network.evil, content["loss_fn"] = attacks[name], None
    elif place == "in a container's state":
        network.model.enc.evil, content["loss_fn"] = attacks[name], None
    path = write(tmp_path / "edm.pkl", attacks[name] if place == "top" else content)
    with pytest.raises(ValueError, match=f"edm.pkl cannot be read.*asks for `{name}`"):
        load_pickled_network(path)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_storage_bytes_that_call_something_are_refused(zipped, attacks, marker, tmp_path) -> None:
    buffer = io.BytesIO()
    torch.save(attacks["posix.system"], buffer, _use_new_zipfile_serialization=zipped)
    storage = Call(torch.storage._load_from_bytes, buffer.getvalue())
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, None)
    network = small_network()
    network._buffers["evil"] = tensor  # type: ignore[assignment]
    with pytest.raises(ValueError, match="storage of a tensor.*asks for `posix.system`"):
        load_pickled_network(write(tmp_path / "edm.pkl", {"ema": network}))
    assert not marker.exists()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_that_calls_something_is_refused(name, zipped, attacks, marker, tmp_path) -> None:
    path = tmp_path / "cd_x.pt"
    state = {"weight": torch.ones(2), "evil": attacks[name]}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="cd_x.pt cannot be read as weights alone: it asks for ") as refusal:
        load_state_dict(path)
    assert not marker.exists()
    assert "weights_only" not in str(refusal.value)  # no advice to switch the check off


def test_source_code_in_a_pickle_is_not_executed(marker, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(nvlabs, "SOURCE", f"open({str(marker)!r}, 'w').close()\n")
    loaded = load_pickled_network(nvlabs.write_pickle(tmp_path / "edm.pkl", small_network()))
    assert loaded.class_name == "Linear"
    assert not marker.exists()
    assert "torch_utils" not in sys.modules and "dnnlib" not in sys.modules


GLOBALS = [
    "torch_utils.persistence sys.exit", "collections OrderedDict.__class__", "builtins type", "copyreg _reconstructor",
    "functools partial", "torch load", "torch._utils _rebuild_tensor", "numpy.core.multiarray frombuffer",
]  # fmt: skip


@pytest.mark.parametrize("name", GLOBALS)
def test_globals_beside_the_table_are_refused(name: str, tmp_path) -> None:
    module, member = name.split()
    opcodes = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, member))
    with pytest.raises(ValueError, match=f"asks for `{module}.{member}`"):
        load_pickled_network(write(tmp_path / "edm.pkl", opcodes + b"\x93."))


@pytest.mark.parametrize("target", [b"cdnnlib.util\nEasyDict\n", b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n"])
def test_pickle_cannot_change_what_it_is_answered(target: bytes, tmp_path) -> None:
    """BUILD with slots sets attributes of anything, classes too."""
    with pytest.raises(ValueError, match="cannot be read"):
        load_pickled_network(write(tmp_path / "edm.pkl", target + b"(N}S'__new__'\ncnumpy\nndarray\nstb."))
    assert isinstance(Record(1), Record)


def test_attributes_and_weights_are_read(tmp_path) -> None:
    network = nvlabs.build(label_dim=2)
    loaded = load_pickled_network(nvlabs.write_pickle(tmp_path / "edm.pkl", network))
    assert loaded.attribute("sigma_data") == 0.5
    assert loaded.child("model").child("enc").class_name == "ModuleDict"
    assert list(loaded.child("model").child("enc").children) == list(network.model.enc)
    read = loaded.child("model").child("map_label").tensors["weight"]
    assert torch.equal(read, network.model.map_label.weight)


def test_few_bytes_do_not_stand_for_many_modules(tmp_path) -> None:
    network = small_network()
    for _ in range(40):
        outer = small_network()
        outer._modules.update(one=network, other=network)
        network = outer
    with pytest.raises(ValueError, match="a module is in two places"):
        load_pickled_network(nvlabs.write_pickle(tmp_path / "edm.pkl", network))


def test_messages_stay_short(tmp_path) -> None:
    name: Any = "deep"
    for _ in range(20):
        name = (name, name)
    for content in ({name: 1}, {"ema": nvlabs_module(name)}):
        with pytest.raises(ValueError) as caught:
            load_pickled_network(write(tmp_path / "edm.pkl", content))
        assert len(str(caught.value)) < 500


def nvlabs_module(class_name: Any) -> Any:
    """A module whose class has that name."""
    network = nvlabs.build()
    pickled = network.__reduce__()
    meta = {**pickled[1][0], "class_name": class_name}
    return Call(pickled[0], meta)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_views_of_one_storage_are_read(protocol: int, tmp_path) -> None:
    network, values = small_network(), torch.arange(12.0)
    network.register_buffer("even", values[::2].reshape(3, 2))
    network.register_buffer("last", values[9:].to(torch.float16))
    loaded = load_pickled_network(nvlabs.write_pickle(tmp_path / "edm.pkl", network, protocol))
    assert torch.equal(loaded.tensors["even"], network.even)
    assert torch.equal(loaded.tensors["last"], network.last)


def tensor_of(storage: Any, offset: int, size: tuple, stride: tuple) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, None)


def bytes_of(content: Any) -> Call:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return Call(torch.storage._load_from_bytes, buffer.getvalue())


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (tensor_of(bytes_of(torch.ones(4)._typed_storage()), 2, (3,), (1,)), "out of bounds"),
        (tensor_of(bytes_of(torch.ones(4)), 0, (4,), (1,)), "storage of a tensor is a Tensor"),
        (tensor_of([1.0, 2.0], 0, (2,), (1,)), "no storage"),
        (5, "a tensor was expected, found a int"),
        (tensor_of(bytes_of(torch.ones(1)._typed_storage()), 0, (10**9,), (0,)), "repeats the same few values"),
        (tensor_of(bytes_of(torch.ones(1, dtype=torch.int64)._typed_storage()), 0, (1,), (1,)), "no weight but"),
    ],
)
def test_damaged_tensors_are_refused(tensor: Any, found: str, tmp_path) -> None:
    network = small_network()
    network._buffers["odd"] = tensor
    with pytest.raises(ValueError, match=found):
        load_pickled_network(write(tmp_path / "edm.pkl", {"ema": network}))


def test_torn_pickle_is_refused(tmp_path) -> None:
    path = nvlabs.write_pickle(tmp_path / "edm.pkl", small_network())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="edm.pkl cannot be read as a pickled network"):
        load_pickled_network(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [({"net": 1, "optimizer": 2}, "a dict of net, optimizer"), ([1], "a list"), ({"ema": [1]}, "found a list")],
)
def test_pickle_without_a_network_says_what_it_holds(content: Any, found: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=found):
        load_pickled_network(write(tmp_path / "edm.pkl", content))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state_dict": {"weight": torch.ones(1)}, "step": 3}, "not tensors: state_dict, step"),
        ([torch.ones(1)], "of type list"),
        ({1: torch.ones(1)}, "no text"),
        ({"w": torch.ones(1).expand(10**9)}, "w of shape .* repeats"),
        ({"w": torch.ones(1, dtype=torch.complex64)}, "no weight but .*complex64"),
        ({"w": torch.ones(1, dtype=torch.int32)}, "no weight but .*int32"),
        ({"w": torch.ones(1, device="meta")}, "no weight but .*meta"),
    ],
)
def test_pt_file_without_a_state_dict_says_what_it_holds(content: Any, found: str, tmp_path) -> None:
    torch.save(content, tmp_path / "cd_x.pt")
    with pytest.raises(ValueError, match=found):
        load_state_dict(tmp_path / "cd_x.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn", b"\x89PNG", b"\x80\x02}q\x00."])
def test_something_else_than_a_pt_file_is_refused(content: bytes, tmp_path) -> None:
    """Without torch's advice to load it unsafely."""
    (tmp_path / "cd_x.pt").write_bytes(content)
    reason = "it is damaged, or holds something else."
    with pytest.raises(ValueError, match=f"cd_x.pt cannot be read as weights alone: {reason}$"):
        load_state_dict(tmp_path / "cd_x.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_is_read(zipped: bool, tmp_path) -> None:
    state = OpenAIUNet(widths=(32,), attention=(False,)).half().state_dict()
    torch.save(state, tmp_path / "cd_x.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_state_dict(tmp_path / "cd_x.pt")
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_missing_file_is_an_os_error(tmp_path) -> None:
    for load in (load_state_dict, load_pickled_network):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "nowhere")


def test_torch_that_does_not_keep_its_promise_is_refused(monkeypatch, tmp_path) -> None:
    torch.save({}, tmp_path / "cd_x.pt")
    monkeypatch.setattr(unpickling.torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(ValueError, match="needs torch 2.10 or newer, found 2.9.1"):
        load_state_dict(tmp_path / "cd_x.pt")
