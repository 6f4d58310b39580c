"""The same global batch is the same training: on one process, on two, sharded, and on two hosts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from launching import (
    CONFIGS,
    HALVES,
    LOSS_TOLERANCE,
    SHARDED,
    STEPS,
    WHOLE,
    ZERO2,
    ZERO3,
    assert_same_training,
    command,
    environment,
    launch,
    losses,
    run,
)

from cm_diffusers import ConsistencyPipeline


def copy_half_of(run_folder: Path, to: Path) -> Path:
    """The run as it was before its last checkpoint."""
    shutil.copytree(run_folder, to)
    shutil.rmtree(max((to / "checkpoints").glob("step-*")))
    (to / "losses.json").unlink()
    return to


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """One process."""
    folder = tmp_path_factory.mktemp("golden")
    run(folder, **WHOLE)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-ranks")
    run(folder, **HALVES)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two processes that hold half of everything each."""
    folder = tmp_path_factory.mktemp("sharded")
    run(folder, **SHARDED)
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=["stage 2", "stage 3"])
def zero(tmp_path_factory, request):
    """Two processes under DeepSpeed."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    split = {2: ZERO2, 3: ZERO3}[request.param]
    run(folder, **split)
    return folder, split


def test_a_run_that_has_ended_leaves_no_threads_of_its_connections(two_ranks):
    """They could abort a process whose interpreter shuts down."""
    threads = json.loads((two_ranks / "threads.json").read_text())
    assert threads and not [name for name in threads if "gloo" in name]


def test_two_ranks_equal_one_process(two_ranks, golden):
    assert len(losses(two_ranks)) == STEPS + 3  # with the conversion
    assert_same_training(two_ranks, golden)


def test_sharded_ranks_equal_one_process_and_save_a_pipeline_that_loads(sharded, golden):
    assert_same_training(sharded, golden)
    images = ConsistencyPipeline.from_pretrained(sharded)(batch_size=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()


def test_deepspeed_equals_one_process_and_resumes_with_and_without(zero, golden, tmp_path):
    folder, split = zero
    assert_same_training(folder, golden)
    images = ConsistencyPipeline.from_pretrained(folder)(batch_size=2, output_type="pt").images
    assert images.isfinite().all()
    for name, before, then, exactly in (
        ("alike", folder, split, True), ("without", folder, WHOLE, False), ("with", golden, split, False)
    ):  # fmt: skip
        resumed = copy_half_of(before, tmp_path / name)
        run(resumed, **then)
        assert_same_training(resumed, before, exactly)


@pytest.mark.parametrize("split", [SHARDED, ZERO3], ids=["fsdp2", "zero-3"])
def test_the_doctor_knows_that_weights_are_in_parts(split, tmp_path):
    found = {}
    for name, how in (("parts", split), ("whole", WHOLE)):
        doctor = {"max_train_steps": 2, "checkpoint_steps": 0}
        run(tmp_path / name, env={"TINY_DOCTOR": "1"}, **{**how, **doctor, "batch_size": 4})
        found[name] = json.loads((tmp_path / name / "footprint.json").read_text())
    parts, whole = found["parts"], found["whole"]
    for kind in ("student", "averages", "gradients", "optimizer"):
        assert parts[kind] == pytest.approx(whole[kind] / 2, rel=0.25)  # some are split unevenly
    assert whole["activations"] * 0.9 < parts["activations"] < whole["activations"] + whole["student"]


def test_deepspeed_leaves_a_bad_step_out(golden, tmp_path):
    pytest.importorskip("deepspeed")
    run(tmp_path / "zero", env={"TINY_BAD_STEP": "5"}, **ZERO3)
    run(tmp_path / "plain", env={"TINY_BAD_STEP": "5"}, **WHOLE)
    assert (tmp_path / "zero" / "bad-steps" / "step-00000005-rank-1.json").exists()
    assert_same_training(tmp_path / "zero", tmp_path / "plain")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "fp16"}, "set `mixed_precision` to bf16 or no"),
        ({}, "stages 2 and 3 here, not in stage 1"),
    ],
)
def test_what_deepspeed_is_not_used_for_is_refused(settings, message, tmp_path):
    pytest.importorskip("deepspeed")
    stage = [] if settings else ["--zero_stage", "1"]
    launcher = launch("deepspeed-zero2", "--num_processes", "1", *stage)
    with pytest.raises(AssertionError, match=message):
        run(tmp_path, launcher=launcher, **settings)


@pytest.mark.parametrize(
    ("first", "then", "exactly"),
    [("golden", HALVES, False), ("two_ranks", HALVES, True), ("sharded", SHARDED, True), ("sharded", WHOLE, False)],
    ids=["one on two", "two on two", "sharded on sharded", "sharded on one"],
)
def test_a_run_resumes_on_other_processes(first, then, exactly, tmp_path, request):
    before = request.getfixturevalue(first)
    folder = copy_half_of(before, tmp_path / "resumed")
    run(folder, **then)
    assert len(losses(folder)) < STEPS
    assert_same_training(folder, before, exactly)


def test_three_ranks_sum_as_before_when_they_resume(tmp_path):
    split = {"ranks": 3, "batch_size": 3, "max_train_steps": 5, "checkpoint_steps": 4, "conversion_steps": 0}
    run(tmp_path / "whole", **split)
    resumed = copy_half_of(tmp_path / "whole", tmp_path / "resumed")
    run(resumed, **split)
    assert_same_training(resumed, tmp_path / "whole", exactly=True)


def test_sharded_ranks_in_bf16_see_the_noise_levels_of_one_process(tmp_path):
    settings = {"mixed_precision": "bf16", "max_train_steps": 3, "conversion_steps": 0, "checkpoint_steps": 0}
    run(tmp_path / "one", **{**WHOLE, **settings})
    run(tmp_path / "two", **{**SHARDED, **settings})
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two[0] == pytest.approx(one[0], rel=LOSS_TOLERANCE)  # before any step was rounded
    assert [two[step] for step in range(3)] == pytest.approx([one[step] for step in range(3)], rel=5e-3)


@pytest.mark.parametrize("split", [SHARDED, ZERO2], ids=["fsdp2", "zero-2"])
def test_channels_last_is_refused_where_weights_are_laid_out_otherwise(split, tmp_path):
    with pytest.raises(AssertionError, match="`channels_last` does not go with FSDP and DeepSpeed"):
        run(tmp_path, **split, channels_last=True)


def test_hosts_with_other_data_are_told_apart(tmp_path):
    with pytest.raises(AssertionError, match="Process 1 has other data than the first"):
        run(tmp_path, env={"TINY_OTHER_DATA": "1"}, **HALVES)


def test_a_torn_checkpoint_ends_all_ranks_with_its_name(two_ranks, tmp_path):
    folder = copy_half_of(two_ranks, tmp_path / "torn")
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        (checkpoint / "ema.safetensors").write_bytes(b"")
    with pytest.raises(AssertionError, match="None of the .* checkpoints"):
        run(folder, **HALVES)


def test_samples_are_the_same_from_any_number_of_ranks(tmp_path):
    settings = {"max_train_steps": 2, "sample_steps": 5, "num_samples": 5, "conversion_steps": 3}
    for name, split in (("one", WHOLE), ("two", HALVES)):
        run(tmp_path / name, **{**split, **settings})
    from PIL import Image

    one, two = (
        torch.tensor(list(Image.open(tmp_path / n / "samples/step-00000005-nfe-2.png").tobytes()))
        for n in ("one", "two")
    )
    assert len(one) == len(two)
    assert (one - two).abs().max() <= 1  # rounding, of weights and then of pixels


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes >= 8
    assert set(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())) <= set(vars(config)) | {"same_network"}


# Two hosts ----------------------------------------------------------------------------------------------------------


class Hosts:
    """Two hosts, as far as programs can tell: each a network namespace, with a cable between them."""

    def __init__(self, names: tuple[str, str], addresses: tuple[str, str]) -> None:
        self.names, self.addresses = names, addresses

    def start(self, rank: int, folder: Path, **settings) -> subprocess.Popen:
        network = f"c{self.names[rank]}"
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[rank], *self._command(rank, folder, **settings)],
            env=environment(GLOO_SOCKET_IFNAME=network), start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _command(self, rank: int, folder: Path, **settings) -> list[str]:
        launcher = launch(
            "two-hosts", "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", self.addresses[0]
        )
        return command(folder, launcher=launcher, **settings)

    def cut(self) -> None:
        ip("-n", self.names[0], "link", "set", f"c{self.names[0]}", "down")

    def mend(self) -> None:
        ip("-n", self.names[0], "link", "set", f"c{self.names[0]}", "up")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    names = (f"cm{os.getpid()}a", f"cm{os.getpid()}b")
    addresses = ("10.213.7.1", "10.213.7.2")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", f"c{names[0]}", "netns", names[0], "type", "veth", "peer", f"c{names[1]}", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"c{name}")
            ip("-n", name, "link", "set", f"c{name}", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        remove(names)
        pytest.skip(f"no network namespaces here: {error}")
    yield Hosts(names, addresses)
    remove(names)


def remove(names: tuple[str, str]) -> None:
    for name in names:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            ip("netns", "delete", name)


def finish(processes: list[subprocess.Popen], seconds: float) -> list[str]:
    """Wait for both, at most so long, and end what is left."""
    try:
        return ["".join(process.communicate(timeout=seconds))[-3000:] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_two_hosts_equal_one_process_and_survive_a_cut_cable(hosts, golden, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]  # they share no disk
    settings = {name: value for name, value in HALVES.items() if name != "ranks"}
    slow = {**settings, "distributed_timeout": 20}
    os.environ["TINY_PAUSE"] = "0.5"
    try:
        processes = [hosts.start(rank, folders[rank], **slow) for rank in (0, 1)]
    finally:
        del os.environ["TINY_PAUSE"]
    for line in processes[0].stdout:
        if line.startswith("step 6"):
            break
    hosts.cut()
    start = time.monotonic()
    outputs = finish(processes, 120)
    assert time.monotonic() - start < 90
    assert all(process.returncode not in (0, None) for process in processes), outputs
    assert not (folders[0] / "losses.json").exists()

    hosts.mend()
    processes = [hosts.start(rank, folders[rank], **slow) for rank in (0, 1)]
    outputs = finish(processes, 120)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert 0 < len(losses(folders[0])) < STEPS
    assert_same_training(folders[0], golden)
    assert not (folders[1] / "checkpoints").exists()
