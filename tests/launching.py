"""Starting `tiny_run.py` in processes of its own, and comparing what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

TESTS = Path(__file__).parent


def command(folder: Path, ranks: int = 1, launcher: list[str] | None = None, **settings: Any) -> list[str]:
    """The command line of a run that writes to `folder`, as one process or under torchrun."""
    if launcher is None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        launcher = [sys.executable] if ranks == 1 else torchrun
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [*launcher, str(TESTS / "tiny_run.py"), "--output_dir", str(folder), *options]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), "TQDM_DISABLE": "1", **more}


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
