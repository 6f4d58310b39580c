"""The scheduler of consistency models, for students of any family of diffusion networks."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cm_diffusers.network_config import SUPPORTED_SCHEDULERS, describe_network, preconditioning_from_config
from cm_diffusers.noise_levels import karras_sigmas
from cm_diffusers.preconditioning import Boundary, Preconditioning

STOCK_CLASS = "CMStochasticIterativeScheduler"
STOCK_FIELDS = {"num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "s_noise", "rho", "clip_denoised"}
GRID_FAMILIES = ("consistency", "edm")  # their `timesteps=` are indices into the training grid, as in diffusers


@dataclass
class ConsistencySchedulerOutput(BaseOutput):
    """Output of [`ConsistencyScheduler.step`].

    Args:
        prev_sample (`Tensor` of shape `(batch, channels, height, width)`): the state at the next noise level, or the
            finished sample after the last step.
        denoised (`Tensor` of the same shape): the consistency function's estimate of the clean sample, clipped if the
            scheduler clips.
    """

    prev_sample: Tensor
    denoised: Tensor


class ConsistencyScheduler(SchedulerMixin, ConfigMixin):
    """Multistep consistency sampling (Song et al. 2023, algorithm 1) for a student of any supported family.

    The config describes the network completely (family, prediction type, betas, boundary form, range of sigma,
    few-step schedule). Its defaults are those of diffusers' `CMStochasticIterativeScheduler`, whose published
    checkpoints run unchanged. States are variance exploding: `x = x0 + sigma * n`.

    Args:
        num_train_timesteps (`int`): length of the beta schedule (`vp`), of the Karras grid (`consistency`, `edm`), or
            the scale of time (`flow`).
        sigma_min (`float`): where the consistency function is the identity.
        sigma_max (`float`): where sampling starts.
        sigma_data (`float`): standard deviation of the data.
        s_noise (`float`): factor on the noise that is added between steps.
        rho (`float`): curvature of the Karras schedule.
        clip_denoised (`bool`): clip the clean estimate to `image_range`; off for latents.
        family (`str`): `"consistency"`, `"edm"`, `"vp"`, `"flow"` or `"ve"`.
        prediction_type (`str`, *optional*): what a `vp` or `edm` network predicts, in diffusers' terms.
        boundary (`str`): `"edm"`, `"euler"` or `"lcm"`, see [`~cm_diffusers.preconditioning.Boundary`].
        timestep_scaling (`float`): sharpness of the `lcm` boundary.
        time_scale (`float`): factor on the time that networks of an `edm`, `vp` or `flow` family have.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the betas of a `vp` network, with
            the meaning they have in `DDPMScheduler`.
        image_range (`list[float]`): the values between which images lie.
        few_step_sigmas (`dict[str, list[float]]`, *optional*): for a number of steps, the noise levels to take,
            descending. Other numbers of steps are spread over the Karras grid.
        num_levels (`int`, *optional*): length of the Karras grid that the student was trained on, whose levels are the
            only ones it knows well; `num_train_timesteps` when `None`.
        sigma_lowest (`float`, *optional*): the lowest level that the student was trained at, where that is not
            `sigma_min`; the grid ends there.
        flow_map (`bool`): the network is told which lower level to jump to, as a second time, and jumps there without
            noise being added. Its boundary is `euler`.
    """

    order = 1
    _compatibles = [STOCK_CLASS]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
        family: str = "consistency",
        prediction_type: str | None = None,
        boundary: str = "edm",
        timestep_scaling: float = 10.0,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        image_range: Sequence[float] = (-1.0, 1.0),
        few_step_sigmas: dict[str, list[float]] | None = None,
        num_levels: int | None = None,
        time_scale: float = 1.0,
        flow_map: bool = False,
        sigma_lowest: float | None = None,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"Need 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}.")
        if not time_scale > 0:
            raise ValueError(f"`time_scale` must be positive, got {time_scale}.")
        if not (sigma_data > 0 and rho > 0 and num_train_timesteps > 0 and image_range[0] < image_range[1]):
            raise ValueError(
                "`sigma_data`, `rho` and `num_train_timesteps` must be positive and `image_range` ascending, got "
                f"{sigma_data}, {rho}, {num_train_timesteps} and {list(image_range)}."
            )
        if sigma_lowest is not None and not sigma_min < sigma_lowest < sigma_max:
            raise ValueError(f"`sigma_lowest` must lie between {sigma_min} and {sigma_max}, got {sigma_lowest}.")
        if num_levels is not None and num_levels < 2:
            raise ValueError(f"`num_levels` must be at least 2, got {num_levels}.")
        if flow_map and (boundary != "euler" or family == "consistency"):
            raise ValueError(
                f"A flow map is a step along D: it needs `boundary='euler'` and a family that has a D, got "
                f"{boundary!r} and {family!r}."
            )
        for steps, levels in (few_step_sigmas or {}).items():
            if int(steps) != len(levels):
                raise ValueError(f"`few_step_sigmas[{steps!r}]` must hold {steps} noise levels, got {levels}.")
            self._check_sigmas(levels, f"few_step_sigmas[{steps!r}]")
        self.boundary  # noqa: B018  refuses impossible combinations at once
        self.init_noise_sigma = sigma_max
        self.num_inference_steps: int | None = None
        self._set_schedule(karras_sigmas(np.linspace(0, 1, min(num_train_timesteps, 1000)), sigma_min, sigma_max, rho))

    # What the network is --------------------------------------------------------------------------------------------

    @functools.cached_property
    def preconditioning(self) -> Preconditioning:
        """The family of the network, as four functions of sigma."""
        return preconditioning_from_config(self.config)

    @functools.cached_property
    def boundary(self) -> Boundary:
        """The consistency function's scalings."""
        config = self.config
        return Boundary(self.preconditioning, config.boundary, config.sigma_min, config.timestep_scaling)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As everywhere in diffusers, but the scheduler of a diffusion model is refused: it describes no student."""
        name = config.get("_class_name") if hasattr(config, "get") else None
        if isinstance(name, str) and name in SUPPORTED_SCHEDULERS - {cls.__name__, STOCK_CLASS}:
            raise ValueError(f"The config is a {name}'s. A student's scheduler is made by `from_teacher(scheduler)`.")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_teacher(cls, scheduler: SchedulerMixin, **overrides: Any) -> ConsistencyScheduler:
        """The student's scheduler, made from the scheduler of a pretrained diffusion model.

        Args:
            scheduler (`SchedulerMixin`): the teacher's scheduler, of any supported class.
            overrides: any argument of [`ConsistencyScheduler`]. Without them the range of sigma is
                [max(0.002, teacher's lowest), min(80, teacher's highest)], or all of the teacher's for the boundary
                `lcm`, as `LCMScheduler` has it; and the boundary is `edm` for EDM and consistency teachers, `euler`
                for all others.

        Raises:
            `ValueError`: if the scheduler is not supported, or a range of sigma outside the teacher's is asked for.
        """
        config = dict(scheduler.config)
        config.setdefault("_class_name", type(scheduler).__name__)
        fields = describe_network(config)
        low, high = preconditioning_from_config(fields).sigma_range
        overrides = {key: value for key, value in overrides.items() if value is not None}
        own_grid = fields["family"] in GRID_FAMILIES
        if overrides.get("family", fields["family"]) != fields["family"]:
            for name in ("prediction_type", "time_scale"):  # say nothing of another family
                fields.pop(name, None)
        if overrides.get("boundary") == "lcm":
            overrides.setdefault("sigma_min", low)
            overrides.setdefault("sigma_max", high)  # where LCMScheduler starts
        defaults = {
            "boundary": "edm" if own_grid else "euler",
            "sigma_min": max(0.002, low),
            "sigma_max": min(80.0, high),
        }
        fields = {**fields, **defaults, **overrides}
        # The ends of a discrete schedule are irrational: accept what rounds to them.
        slack = 1 + 1e-6
        if fields["sigma_min"] * slack < low or fields["sigma_max"] > high * slack:
            raise ValueError(
                f"The range of sigma [{fields['sigma_min']:g}, {fields['sigma_max']:g}] leaves the teacher's, "
                f"[{low:g}, {high:g}]: it has never seen such noise. Choose `sigma_min` and `sigma_max` inside."
            )
        return cls(**fields)

    # The schedule ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels to sample at. Exactly one of the three must be given.

        Args:
            num_inference_steps (`int`, *optional*): the levels stored for this number of steps in the config,
                otherwise levels spread evenly over the Karras schedule.
            device (`str` or `torch.device`, *optional*): where `timesteps` is put.
            timesteps (`Sequence[float]`, *optional*): descending. For `consistency` and `edm` networks, indices into
                the training grid as in `CMStochasticIterativeScheduler`, for instance `[22, 0]`; for the others, the
                timesteps that the network is given.
            sigmas (`Sequence[float]`, *optional*): noise levels, descending, inside [`sigma_min`, `sigma_max`].

        Raises:
            `ValueError`: if not exactly one is given, or its values are out of order or out of range.
        """
        given = [value for value in (num_inference_steps, timesteps, sigmas) if value is not None]
        if len(given) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `timesteps` and `sigmas`.")
        stock_start = timesteps is not None and self.config.family in GRID_FAMILIES
        if sigmas is not None:
            levels = np.array(self._check_sigmas(sigmas, "sigmas"), dtype=np.float64)
        elif timesteps is not None:
            levels = self._sigmas_at(timesteps)
        else:
            levels = self.levels_for(num_inference_steps)
        self.num_inference_steps = len(levels)
        # Sampling may start below sigma_max; diffusers' own class starts from sigma_max whatever its indices say.
        starts_lower = not stock_start and levels[0] < self.config.sigma_max * (1 - 1e-6)
        self.init_noise_sigma = float(levels[0]) if starts_lower else self.config.sigma_max
        self._set_schedule(levels, device)

    def levels_for(self, steps: Any) -> np.ndarray:
        """The noise levels of a number of steps, descending: those that are stored for it, or spread over the grid.

        Args:
            steps (`int`): as `num_inference_steps` in `set_timesteps`.

        Raises:
            `ValueError`: if it is no positive integer, or none are stored and the grid has fewer.
        """
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"`num_inference_steps` must be a positive integer, got {steps!r}.")
        stored = {int(n): levels for n, levels in (self.config.few_step_sigmas or {}).items()}.get(int(steps))
        if stored is not None:
            return np.array(stored, dtype=np.float64)
        if steps > self.grid_length:
            raise ValueError(f"`num_inference_steps={steps}` exceeds the {self.grid_length} levels of the grid.")
        return self._karras(np.arange(steps) * (self.grid_length // steps))

    @property
    def grid_length(self) -> int:
        """How many levels the Karras grid has."""
        return int(self.config.num_levels or self.config.num_train_timesteps)

    @property
    def grid(self) -> np.ndarray:
        """All levels of the Karras grid, descending, in float64."""
        return self._karras(np.arange(self.grid_length))

    def _karras(self, indices: np.ndarray) -> np.ndarray:
        config = self.config
        ramp = indices / max(self.grid_length - 1, 1)
        return karras_sigmas(ramp, config.sigma_lowest or config.sigma_min, config.sigma_max, config.rho)

    def _sigmas_at(self, timesteps: Sequence[float]) -> np.ndarray:
        values = np.asarray(torch.as_tensor(timesteps).cpu(), dtype=np.float64)
        if values.ndim != 1 or not len(values) or not (np.diff(values) < 0).all():
            raise ValueError(f"`timesteps` must be a list in descending order, got {timesteps}.")
        if self.config.family not in GRID_FAMILIES:
            sigmas = self.preconditioning.sigma_from_c_noise(torch.from_numpy(values)).tolist()
            return np.array(self._check_sigmas(sigmas, f"the noise levels of timesteps={list(timesteps)}"))
        if not (values[-1] >= 0 and values[0] < self.grid_length):
            raise ValueError(f"`timesteps` must lie in [0, {self.grid_length}), got {timesteps}.")
        return self._karras(values[::-1])

    def _check_sigmas(self, sigmas: Sequence[float], name: str) -> list[float]:
        low, high, slack = self.config.sigma_min, self.config.sigma_max, 1 + 1e-6
        levels = [float(sigma) for sigma in sigmas]
        if not levels or not all(a > b for a, b in zip(levels, levels[1:], strict=False)):
            raise ValueError(f"`{name}` must be in descending order, got {levels}.")
        if not (levels[0] <= high * slack and levels[-1] * slack >= low):
            raise ValueError(f"`{name}` must lie in [sigma_min={low:g}, sigma_max={high:g}], got {levels}.")
        return levels

    def _set_schedule(self, levels: np.ndarray, device: str | torch.device | None = None) -> None:
        """`levels` in float64, descending. `sigmas` stays on the CPU: reading a level must not wait for a device."""
        timesteps = self.preconditioning.c_noise(torch.from_numpy(levels.copy()))
        self.timesteps = timesteps.to(torch.float32).to(device)
        levels = np.append(levels, self.config.sigma_min)
        targets = self.preconditioning.c_noise(torch.from_numpy(levels[1:].copy()))
        self.target_timesteps = targets.to(torch.float32).to(device)
        self.sigmas = torch.from_numpy(levels.astype(np.float32))
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Index of the current step, `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, when set by a pipeline."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start sampling in the middle of the schedule."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The step whose timestep is nearest: half precision and integers must find theirs, too."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return int((schedule.float() - torch.as_tensor(timestep, device=schedule.device).float()).abs().argmin())

    def _locate(self, timestep: float | Tensor) -> int:
        if self._step_index is None or self._step_index >= len(self.timesteps):
            start = self._begin_index if self._step_index is None else None
            self._step_index = self.index_for_timestep(timestep) if start is None else start
        return self._step_index

    # Sampling -------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network is given: `c_in(sigma) * sample`.

        Args:
            sample (`Tensor` of shape `(batch, channels, height, width)`): the state.
            timestep (`float` or `Tensor`): one of `timesteps`.
        """
        sigma = self.sigmas[self._locate(timestep)]
        return (sample / self.preconditioning.input_scale(sigma)).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ConsistencySchedulerOutput | tuple[Tensor, ...]:
        """Jump to the clean sample, then add noise up to the next level; none after the last.

        A flow map jumps to the next level itself, along the line through the clean sample that it predicts.

        Args:
            model_output (`Tensor` of shape `(batch, channels, height, width)`): the network's output (a predicted
                variance behind it is dropped).
            timestep (`float` or `Tensor`): one of `timesteps`.
            sample (`Tensor`): the state that the output was computed from, before `scale_model_input`.
            generator (`torch.Generator` or a list of one per sample, *optional*): source of the noise.
            return_dict (`bool`): return a [`ConsistencySchedulerOutput`] rather than a tuple.
        """
        index = self._locate(timestep)
        # Half precision is too coarse for c_skip * x at sigma = 80.
        dtype = torch.promote_types(sample.dtype, torch.float32)
        function = self.preconditioning if self.config.flow_map else self.boundary
        c_skip, c_out, *_ = function.scalings(self.sigmas[index])
        output = model_output[:, : sample.shape[1]].to(dtype)
        denoised = c_out * output + c_skip * sample.to(dtype)
        if self.config.clip_denoised:
            denoised = denoised.clamp(*self.config.image_range)

        prev_sample = denoised
        if self.config.flow_map:
            prev_sample = torch.lerp(sample.to(dtype), denoised, self.denoised_share(index))
        elif self._adds_noise_after(index):
            noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype).to(dtype)
            prev_sample = denoised + noise * self.config.s_noise * self.added_noise_std(self.sigmas[index + 1])
        self._step_index = index + 1

        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return ConsistencySchedulerOutput(prev_sample=prev_sample, denoised=denoised)

    def _adds_noise_after(self, index: int) -> bool:
        """Noise leads to the next level; there is none after the last.

        diffusers' own class adds the rounding residue of `added_noise_std(sigma_min)`, some 1e-7, after the last of
        several steps. Where it is stock networks that run, their published images come first, to the bit.
        """
        return index + 1 < len(self.timesteps) or (self.is_stock and len(self.timesteps) > 1)

    def denoised_share(self, index: int) -> float:
        """How much of the clean estimate of a step is in the state after it: all, but on the way of a flow map."""
        return 1.0 - float(self.sigmas[index + 1] / self.sigmas[index]) if self.config.flow_map else 1.0

    def added_noise_std(self, sigma: Tensor) -> Tensor:
        """`sqrt(sigma^2 - sigma_min^2)`: f answers at `sigma_min`, so that much noise leads back to `sigma`.

        Rounding may leave the difference slightly negative at `sigma_min` itself.
        """
        return (sigma**2 - self.config.sigma_min**2).clamp(min=0) ** 0.5

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x0 + sigma(timestep) * noise`.

        Args:
            original_samples (`Tensor` of shape `(batch, channels, height, width)`): clean samples.
            noise (`Tensor` of the same shape): unit-variance noise.
            timesteps (`Tensor` of shape `(batch,)`): in the network's own time, on the schedule or not.
        """
        sigma = self.preconditioning.sigma_from_c_noise(torch.as_tensor(timesteps))
        sigma = sigma.to(original_samples.device, original_samples.dtype)
        return original_samples + sigma.view(-1, *[1] * (original_samples.ndim - 1)) * noise

    # Saving: stock on disk where diffusers' own class computes the same ---------------------------------------------

    @property
    def is_stock(self) -> bool:
        """Whether diffusers' `CMStochasticIterativeScheduler` represents this scheduler exactly.

        It does not know `few_step_sigmas`; [`~ConsistencyScheduler.stock_timesteps`] say the same to it.
        """
        config = self.config
        same_grid = config.num_levels in (None, config.num_train_timesteps)
        return config.family == "consistency" and tuple(config.image_range) == (-1.0, 1.0) and same_grid

    def stock_timesteps(self, num_inference_steps: int) -> list[int] | None:
        """The `timesteps` by which diffusers' own class takes the levels of this one for a number of steps.

        Args:
            num_inference_steps (`int`): as in `set_timesteps`.

        Returns:
            `list[int]`, *optional*: indices into the training grid, descending, for `timesteps=`; `None` if no such
            indices lead to these levels.
        """
        if not self.is_stock:
            return None
        levels, grid = self.levels_for(num_inference_steps), self.grid
        indices = np.abs(np.log(grid) - np.log(levels)[:, None]).argmin(axis=1)
        starts_at_top = indices[0] == 0  # as diffusers' own class does whatever its indices say
        return indices[::-1].tolist() if starts_at_top and np.allclose(grid[indices], levels, rtol=1e-5) else None

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the config; under the stock class's name when diffusers' own class computes the same."""
        config = json.loads(self.to_json_string())
        if self.is_stock:
            # What diffusers' class has no argument for, it warns of: leave out what says nothing.
            own = {name: value.default for name, value in inspect.signature(type(self)).parameters.items()}
            for name in own.keys() - STOCK_FIELDS:
                if config[name] == (list(own[name]) if isinstance(own[name], tuple) else own[name]):
                    del config[name]
            config["_class_name"] = STOCK_CLASS
        Path(json_file_path).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        import diffusers

        return [cls, getattr(diffusers, STOCK_CLASS)]
