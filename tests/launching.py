"""Starting `tiny_run.py` in processes of its own, and comparing what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "configs" / "accelerate"
STEPS = 9
WHOLE = {"ranks": 1, "batch_size": 8, "max_train_steps": STEPS, "checkpoint_steps": 4}
HALVES = {**WHOLE, "ranks": 2, "batch_size": 4}
# Losses of some hundreds and weights of some tenths, after float32 sums in another order and a dozen steps of Adam.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4


def launch(config: str, *arguments: str) -> list[str]:
    """`accelerate launch` with a config that this repository ships, in float32."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"),
        "--num_cpu_threads_per_process", "1", "--mixed_precision", "no", *arguments,
    ]  # fmt: skip


SHARDED, ZERO2, ZERO3 = (
    {**HALVES, "launcher": launch(config, "--num_processes", "2")}
    for config in ("fsdp2", "deepspeed-zero2", "deepspeed-zero3")
)


def command(folder: Path, ranks: int = 1, launcher: list[str] | None = None, **settings: Any) -> list[str]:
    """The command line of a run that writes to `folder`, as one process or under torchrun."""
    if launcher is None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        launcher = [sys.executable] if ranks == 1 else torchrun
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [*launcher, str(TESTS / "tiny_run.py"), "--output_dir", str(folder), *options]


def environment(**more: str) -> dict[str, str]:
    found = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": found, "TQDM_DISABLE": "1", **more}


def run(folder: Path, env: dict[str, str] | None = None, **settings: Any) -> None:
    """Run to the end. `settings` are those of [`command`].

    Raises:
        `AssertionError`: if it fails, with its output.
    """
    done = subprocess.run(
        command(folder, **settings), env=environment(**(env or {})), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-30000:]


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step of the process that ended the run."""
    return {int(step): value for step, value in json.loads((folder / "losses.json").read_text()).items()}


def final_state(folder: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint, and the saved student."""
    newest = max((folder / "checkpoints").glob("step-*"))
    files = [*newest.glob("*.safetensors"), folder / "unet" / "diffusion_pytorch_model.safetensors"]
    return {f"{file.stem}:{name}": value for file in files for name, value in load_file(file).items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def assert_same_training(folder: Path, golden: Path, exactly: bool = False) -> None:
    trajectory, expected = losses(folder), losses(golden)
    assert set(trajectory) <= set(expected)
    for step, loss in trajectory.items():
        assert loss == pytest.approx(expected[step], rel=0 if exactly else LOSS_TOLERANCE, nan_ok=True)
    difference = largest_difference(final_state(folder), final_state(golden))
    assert difference <= (0 if exactly else WEIGHT_TOLERANCE)
