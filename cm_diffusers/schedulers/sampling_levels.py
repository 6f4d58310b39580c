"""The noise levels that a student is sampled at: those stored for a number of steps, or some of its grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cm_diffusers.noise_levels import karras_sigmas
from cm_diffusers.preconditioning import Preconditioning

GRID_FAMILIES = ("consistency", "edm")  # their `timesteps=` are indices into the training grid, as in diffusers
SLACK = 1 + 1e-6  # levels are stored in decimals, and timesteps in float32: accept what rounds to the ends


def original_timesteps(num_train_timesteps: int, original_inference_steps: int, strength: float = 1.0) -> np.ndarray:
    """The timesteps that a latent consistency model was trained at, descending (Luo et al. 2023, section 4.3).

    Args:
        num_train_timesteps (`int`): those of the teacher.
        original_inference_steps (`int`): into how many equal parts they were cut. Each has its last one trained.
        strength (`float`): the part of them that is wanted, from the lowest up.

    Raises:
        `ValueError`: for a strength out of (0, 1], or a number out of [1, num_train_timesteps].
    """
    steps = original_inference_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= num_train_timesteps:
        raise ValueError(
            f"`original_inference_steps` must be an integer from 1 to num_train_timesteps={num_train_timesteps}, got "
            f"{steps!r}."
        )
    if not 0 < strength <= 1:
        raise ValueError(f"`strength` must lie above 0 and be at most 1, got {strength!r}.")
    return np.arange(int(steps * strength), 0, -1) * (num_train_timesteps // steps) - 1


@dataclass(frozen=True)
class SamplingLevels:
    """The noise levels of a student, and the choice of a few.

    Args:
        config (`Mapping`): of a [`ConsistencyScheduler`].
        preconditioning ([`Preconditioning`]): of its network.
        strength (`float`): as in [`original_timesteps`]; nothing to Karras grids.
    """

    config: Mapping[str, Any]
    preconditioning: Preconditioning
    strength: float = 1.0

    def check(self) -> None:
        """
        Raises:
            `ValueError`: if the config names levels that the student does not have, or two grids.
        """
        config = self.config
        low, high = config["sigma_min"], config["sigma_max"]
        if config["sigma_lowest"] is not None and not low < config["sigma_lowest"] < high:
            raise ValueError(f"`sigma_lowest` must lie between {low} and {high}, got {config['sigma_lowest']}.")
        if config["num_levels"] is not None and config["num_levels"] < 2:
            raise ValueError(f"`num_levels` must be at least 2, got {config['num_levels']}.")
        if config["original_inference_steps"] is not None:
            if config["family"] != "vp":
                raise ValueError(f"`original_inference_steps` is for the family 'vp', not {config['family']!r}.")
            if config["num_levels"] is not None:
                raise ValueError("A student has one grid: pass `original_inference_steps` or `num_levels`, not both.")
            self.checked(self.grid, f"original_inference_steps={config['original_inference_steps']}")
        for steps, levels in (config["few_step_sigmas"] or {}).items():
            if int(steps) != len(levels):
                raise ValueError(f"`few_step_sigmas[{steps!r}]` must hold {steps} noise levels, got {levels}.")
            self.checked(levels, f"few_step_sigmas[{steps!r}]")

    def at_original(self, original_inference_steps: int | None, strength: float) -> SamplingLevels:
        """These, or what else is asked for, of which no levels are stored. See [`ConsistencyScheduler.set_timesteps`].

        Raises:
            `ValueError`: if the student has no timesteps, or a part is asked for of a Karras grid.
        """
        original = original_inference_steps
        if original is None and strength == 1:
            return self
        if original is None:
            original = self.config["original_inference_steps"]
        if original is None or self.config["family"] != "vp":
            raise ValueError(
                "`original_inference_steps` is for the family 'vp', and `strength` for students of such steps; this "
                f"one's family is {self.config['family']!r}, and its `original_inference_steps` {original}."
            )
        asked = {"original_inference_steps": original, "num_levels": None, "few_step_sigmas": None}
        return SamplingLevels({**self.config, **asked}, self.preconditioning, strength)

    @property
    def length(self) -> int:
        """How many levels the grid has."""
        config = self.config
        if config["original_inference_steps"] is not None:
            return len(self.grid)
        return int(config["num_levels"] or config["num_train_timesteps"])

    @property
    def grid(self) -> np.ndarray:
        """All levels, descending, in float64."""
        original = self.config["original_inference_steps"]
        if original is None:
            return self._karras(np.arange(self.length))
        timesteps = original_timesteps(self.config["num_train_timesteps"], original, self.strength)
        return self._at_time(timesteps * self.preconditioning.time_scale)

    def for_steps(self, steps: Any) -> np.ndarray:
        """See [`ConsistencyScheduler.levels_for`]."""
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"`num_inference_steps` must be a positive integer, got {steps!r}.")
        stored = {int(n): levels for n, levels in (self.config["few_step_sigmas"] or {}).items()}.get(int(steps))
        if stored is not None:
            return np.array(stored, dtype=np.float64)
        if steps > self.length:
            raise ValueError(f"`num_inference_steps={steps}` exceeds the {self.length} levels of the grid.")
        if self.config["original_inference_steps"] is None:
            return self._karras(np.arange(steps) * (self.length // steps))
        # Rounded down, as LCMScheduler has it.
        return self.grid[np.linspace(0, self.length, num=steps, endpoint=False).astype(np.int64)]

    def at_timesteps(self, timesteps: Sequence[float]) -> np.ndarray:
        """The levels of what users pass as `timesteps`, see [`ConsistencyScheduler.set_timesteps`]."""
        values = np.asarray(torch.as_tensor(timesteps).cpu(), dtype=np.float64)
        if values.ndim != 1 or not len(values) or not (np.diff(values) < 0).all():
            raise ValueError(f"`timesteps` must be a list in descending order, got {timesteps}.")
        if self.config["family"] not in GRID_FAMILIES:
            return self.checked(self._at_time(values), f"the noise levels of timesteps={list(timesteps)}")
        if not (values[-1] >= 0 and values[0] < self.length):
            raise ValueError(f"`timesteps` must lie in [0, {self.length}), got {timesteps}.")
        return self._karras(values[::-1])

    def checked(self, sigmas: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
        """`sigmas` in float64.

        Raises:
            `ValueError`: if they are out of order or out of the student's range, under their `name`.
        """
        low, high = self.config["sigma_min"], self.config["sigma_max"]
        levels = [float(sigma) for sigma in sigmas]
        if not levels or not all(a > b for a, b in zip(levels, levels[1:], strict=False)):
            raise ValueError(f"`{name}` must be in descending order, got {levels}.")
        if not (levels[0] <= high * SLACK and levels[-1] * SLACK >= low):
            raise ValueError(f"`{name}` must lie in [sigma_min={low:g}, sigma_max={high:g}], got {levels}.")
        return np.array(levels, dtype=np.float64)

    def _karras(self, indices: np.ndarray) -> np.ndarray:
        config = self.config
        ramp = indices / max(self.length - 1, 1)
        return karras_sigmas(ramp, config["sigma_lowest"] or config["sigma_min"], config["sigma_max"], config["rho"])

    def _at_time(self, timesteps: np.ndarray) -> np.ndarray:
        return self.preconditioning.sigma_from_c_noise(torch.from_numpy(timesteps)).numpy()
