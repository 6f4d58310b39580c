"""Runs that are killed again and again end as if nothing had happened, bit for bit.

Each test kills as often as the environment's KILLS says (3 by default): at the start, between steps, and while a
checkpoint is written.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from launching import command, environment, final_state, largest_difference, run

KILLS = int(os.environ.get("KILLS", 3))
STEPS = 12 + 4 * KILLS
RUNS = {
    "one process": {"ranks": 1},
    "two ranks": {"ranks": 2, "batch_size": 4},
    "stream": {"ranks": 1, "streaming": True},
}
# Two workers and two micro-steps; and dropout, by the environment.
COMMON = {"max_train_steps": STEPS, "num_workers": 2, "gradient_accumulation_steps": 2, "checkpoint_limit": 2}
# Which starts one process itself, and more by torchrun.
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch",
    *"--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split(),
]  # fmt: skip
DROPOUT = {"TINY_DROPOUT": "0.2"}


@pytest.mark.timeout(900 + 60 * KILLS)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_instants_ends_bit_identical(name, tmp_path):
    settings = {**COMMON, **RUNS[name]}
    run(tmp_path / "whole", env=DROPOUT, **settings)
    chance = random.Random(name)
    whens = Counter(kill(tmp_path / "killed", when, chance, settings) for when in instants(chance))
    print(f"{name}: killed at {dict(whens)}")
    assert whens["end"] == 0, "the run was over before it could be killed"
    if KILLS > 1:
        assert whens["write"] > 0
    run(tmp_path / "killed", env=DROPOUT, **settings)
    assert largest_difference(final_state(tmp_path / "killed"), final_state(tmp_path / "whole")) == 0


def instants(chance: random.Random) -> list[str]:
    return ["write", "step", "start", *chance.choices(["write", "step", "step", "start"], k=KILLS)][:KILLS]


def kill(folder: Path, when: str, chance: random.Random, settings: dict) -> str:
    """Start the run, and kill one of its processes at a random instant. Returns where it was then."""
    env = environment(**DROPOUT, TINY_PAUSE="0.1", TINY_SLOW_DISK="0.02")
    left_over = half_written(folder)
    process = subprocess.Popen(command(folder, **settings), env=env, start_new_session=True, stdout=subprocess.PIPE)
    family = []
    try:
        if when == "start":
            time.sleep(chance.uniform(0, 8))
        else:
            process.stdout.readline()  # the first step
            if when == "write":
                wait_for(lambda: half_written(folder) - left_over or process.poll() is not None)
            time.sleep(chance.uniform(0, 0.1 if when == "write" else 0.5))
        if process.poll() is not None:
            return "end"
        found = "write" if half_written(folder) - left_over else "step" if when == "write" else when
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        # The run, one of its ranks, or a loader's worker, which the memory watchdog of a cluster is fond of.
        chance.choice([family[0]] * max(len(family) - 1, 1) + family[1:]).kill()
        process.wait(60)  # what is left of it ends by itself
        return found
    finally:
        end(process, family)


def half_written(folder: Path) -> set[tuple[int, int]]:
    """The checkpoints that are being written, or were when their run was killed."""
    found = set()
    for partial in (folder / "checkpoints").glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            found.add((partial.stat().st_ino, partial.stat().st_ctime_ns))
    return found


def wait_for(happened, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.002)


def end(process: subprocess.Popen, family: list[psutil.Process]) -> None:
    """End what is left of a run. Ranks outlive a torchrun that is killed, and would write beside the next run."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = family or [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)
    process.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("launched", "told"),
    [
        (RUNS["two ranks"], signal.SIGTERM), (RUNS["two ranks"], signal.SIGKILL),
        ({"launcher": ACCELERATE}, signal.SIGTERM),
    ],
    ids=["torchrun", "torchrun, killed", "accelerate"],
)  # fmt: skip
def test_what_ends_the_launcher_saves_on_all_ranks(launched, told, tmp_path):
    settings = {**launched, **COMMON, "checkpoint_steps": 1000}
    env = environment(TINY_PAUSE="0.1")
    process = subprocess.Popen(
        command(tmp_path, **settings), env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(told)
        _, errors = process.communicate(timeout=60)
    finally:
        end(process, [])
    assert process.returncode != 0
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 1, errors.decode()[-3000:]
    assert b"go on with `resume: auto`" in errors
