"""What a run has to remember, written to checkpoints and taken up from them, on any number of processes."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from cm_diffusers.training import checkpoints, state
from cm_diffusers.training.companions import Companion
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.loading import Batches
from cm_diffusers.training.runtime import on_main

logger = logging.getLogger(__name__)

# What may differ between a checkpoint's config and the run that resumes it.
FREE_TO_CHANGE = frozenset(
    "output_dir resume logging_steps sample_steps num_samples sample_nfes sample_prompts tracker checkpoint_steps "
    "checkpoint_limit teacher_check few_step_sigmas on_bad_image max_bad_steps distributed_timeout eval_steps "
    "eval_features eval_num_images eval_num_reference eval_nfes eval_clip "
    "push_to_hub hub_model_id hub_private_repo hub_revision hub_strategy hub_token "
    # How the work is done, not what is computed, up to rounding. The global batch is compared instead of its parts,
    # and the precision that accelerate settled on instead of what it was asked for.
    "batch_size gradient_accumulation_steps num_workers allow_tf32 compile channels_last "
    "gradient_checkpointing mixed_precision".split()
)


class Memory:
    """The lasting part of a run. Its methods are called by all processes.

    Args:
        accelerator (`Accelerator`): the run's.
        folder (`Path`): where checkpoints are.
        limit (`int`): how many are kept.
        networks (`dict[str, nn.Module]`): the `"student"`, and what follows it.
        optimizer (`AcceleratedOptimizer`): the student's.
        companions (`dict[str, Companion]`): what is trained beside it.
        batches ([`~cm_diffusers.training.loading.Batches`]): of this process.
        identity (`dict`): what has to be the same when the run is resumed: the config, and other plain values.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, limit: int, networks: dict[str, nn.Module], optimizer: Any,
        companions: dict[str, Companion], batches: Batches, identity: dict[str, Any],
    ) -> None:  # fmt: skip
        self.accelerator, self.folder, self.limit = accelerator, folder, limit
        self.networks, self.optimizer, self.companions = networks, optimizer, companions
        self.batches, self.identity = batches, identity
        self._saved = Path()

    def save(self, step: int, progress: dict[str, float]) -> Path:
        """Write everything that the next step depends on, once, and delete old checkpoints.

        Args:
            step (`int`): the next.
            progress (`dict`): numbers to go on counting from.

        Raises:
            [`~cm_diffusers.training.checkpoints.CheckpointError`]: if it cannot be written. Older ones stay.
        """
        folder = checkpoints.checkpoint_path(self.folder, step)
        if folder == self._saved:
            return folder
        weights = {name: state.whole_weights(network) for name, network in self._all_networks().items()}
        optimizers = {
            name: state.whole_optimizer(network, optimizer) for name, network, optimizer in self._optimizers()
        }
        scaler = self.accelerator.scaler
        run = {
            **self.identity, "step": step, "data": gather_object([self.batches.state()]), "progress": progress,
            "scaler": None if scaler is None else scaler.state_dict(),
        }  # fmt: skip

        def write(partial: Path) -> None:
            state.write(partial, weights, optimizers)
            (partial / checkpoints.STATE).write_text(json.dumps(run, indent=2))

        def write_and_prune() -> None:
            checkpoints.write_files(folder, write)
            checkpoints.prune(folder, self.limit)

        on_main(self.accelerator, write_and_prune)
        self._saved = folder
        return folder

    def _all_networks(self) -> dict[str, nn.Module]:
        return self.networks | {name: companion.module for name, companion in self.companions.items()}

    def _optimizers(self) -> Iterator[tuple[str, nn.Module, Any]]:
        """The name, the network and the optimiser of everything that is trained."""
        yield state.OPTIMIZER, self.networks["student"], self.optimizer.optimizer
        for name, companion in self.companions.items():
            yield f"{name}-{state.OPTIMIZER}", companion.module, companion.optimizer

    def resume(self, source: str) -> tuple[int, dict[str, float]]:
        """Take up the run from `"auto"` or a checkpoint's folder.

        Returns:
            `tuple`: the next step, and what `progress` was when it was saved; 0 and nothing if there is no checkpoint.

        Raises:
            [`~cm_diffusers.training.checkpoints.CheckpointError`]: if the checkpoint is missing or damaged.
            `ValueError`: if its run was another, naming each difference.
        """
        found = on_main(self.accelerator, lambda: find_matching(source, self.folder, self.identity))
        if found is None:
            logger.info("No checkpoint in %s: starting anew.", self.folder)
            return 0, {}
        folder, saved = found
        is_main, distributed = self.accelerator.is_main_process, self.accelerator.num_processes > 1
        for name, network in self._all_networks().items():
            state.restore_weights(network, folder / f"{name}.safetensors", is_main, distributed)
        for name, network, optimizer in self._optimizers():
            state.restore_optimizer(network, optimizer, folder, is_main, distributed, name)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.batches.is_stream:
            self.batches.restore(saved["data"][self.accelerator.process_index])
        else:
            self.batches.restore({"batches": saved["step"] * self.accelerator.gradient_accumulation_steps})
        logger.info("Resumed from %s.", folder)
        return saved["step"], saved.get("progress", {})


def find_matching(source: str, root: Path, identity: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, if it belongs to the same run.

    Raises:
        [`~cm_diffusers.training.checkpoints.CheckpointError`]: if it is missing or damaged.
        `ValueError`: if its run was another, naming each difference.
    """
    found = checkpoints.find(source, root)
    if found is None:
        return None
    folder, saved = found
    differences = []
    for spec in dataclasses.fields(ConsistencyConfig):
        was, now = saved["config"].get(spec.name, spec.default), identity["config"][spec.name]
        if spec.name not in FREE_TO_CHANGE and was != now:
            differences.append(f"{spec.name} was {was!r} and is {now!r}")
    # What older checkpoints do not say is not compared.
    for name in saved.keys() - {"config", "step", "data", "scaler", "progress"}:
        differences += compare(f"the {name.replace('_', ' ')}", saved.get(name), identity.get(name))
    if differences:
        raise ValueError(f"Checkpoint {folder} belongs to another run: {'; '.join(sorted(differences))}.")
    return folder, saved


def compare(name: str, was: Any, now: Any) -> list[str]:
    """The differences of two values, in words; of two mappings, of what they hold."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [text for key in keys for text in compare(f"{name}'s {key}", was.get(key), now.get(key))]
    return [] if was == now else [f"{name} was {was!r} and is {now!r}"]
