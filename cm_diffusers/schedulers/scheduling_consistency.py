"""The scheduler of consistency models, for students of any family of diffusion networks."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cm_diffusers.network_config import preconditioning_from_config
from cm_diffusers.noise_levels import karras_sigmas
from cm_diffusers.preconditioning import Boundary, Preconditioning
from cm_diffusers.schedulers.origins import fields_from_lcm, fields_from_teacher, is_lcm, name_of_teacher
from cm_diffusers.schedulers.sampling_levels import GRID_FAMILIES, SamplingLevels
from cm_diffusers.schedulers.stock import STOCK_CLASS, grid_indices, is_stock, lcm_scheduler, stock_config

logger = logging.get_logger(__name__)


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
    checkpoints run unchanged. States are variance exploding, `x = x0 + sigma * n`, but for the boundary `lcm`, whose
    states are those of diffusers' `LCMScheduler`: the same of unit variance, `x / sqrt(1 + sigma^2)`.

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
        original_inference_steps (`int`, *optional*): for `vp` networks that were trained at that many timesteps, the
            last of as many equal parts, as `LCMScheduler` has it. These are their grid, instead of Karras's.
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
        original_inference_steps: int | None = None,
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
        if flow_map and (boundary != "euler" or family == "consistency"):
            raise ValueError(
                f"A flow map is a step along D: it needs `boundary='euler'` and a family that has a D, got "
                f"{boundary!r} and {family!r}."
            )
        self.boundary  # noqa: B018  refuses impossible combinations at once
        self._levels.check()
        self.is_scale_input_called = False
        self.init_noise_sigma = self.first_std(sigma_max)
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
        """As everywhere in diffusers, and from the config of the `LCMScheduler` of a latent consistency model.

        The scheduler of a diffusion model is refused, whether it was loaded or made: it describes no student.

        Raises:
            `ValueError`: for another scheduler's config, or an `LCMScheduler`'s that cannot be represented.
        """
        if isinstance(config, Mapping) and is_lcm(config):
            config = fields_from_lcm(config)
        elif isinstance(config, Mapping) and (name := name_of_teacher(config)):
            raise ValueError(f"The config is {name}. A student's scheduler is made by `from_teacher(scheduler)`.")
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_teacher(cls, scheduler: SchedulerMixin, **overrides: Any) -> ConsistencyScheduler:
        """The student's scheduler, made from the scheduler of a pretrained diffusion model.

        Args:
            scheduler (`SchedulerMixin`): the teacher's scheduler, of any supported class.
            overrides: any argument of [`ConsistencyScheduler`]. Without them the range of sigma is
                [max(0.002, teacher's lowest), min(80, teacher's highest)], or all of the teacher's for the boundary
                `lcm` and with `original_inference_steps`, as `LCMScheduler` has it; the boundary is `edm` for EDM
                and consistency teachers, `euler` for all others; and estimates are clipped, unless the teacher has a
                `clip_sample` that says no.

        Raises:
            `ValueError`: if the scheduler is not supported, or a range of sigma outside the teacher's is asked for.
        """
        config = dict(scheduler.config)
        config.setdefault("_class_name", type(scheduler).__name__)
        return cls(**fields_from_teacher(config, overrides))

    def to_lcm(self) -> LCMScheduler:
        """diffusers' `LCMScheduler` that computes the same, for users who do not have this package.

        Up to rounding; but where it clips, it clips D, not f, and where the terminal SNR is zero, it starts without
        signal, and this one with 2^-12 of it. It does not know `few_step_sigmas`, and spreads its steps over the
        timesteps of `original_inference_steps`; where these are `None`, only its single step is the same.

        Raises:
            `ValueError`: if there is none, saying why: it takes the family `vp` with the boundary `lcm`, on all of the
                schedule.
        """
        return lcm_scheduler(self.config, self.preconditioning)

    # The schedule ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the noise levels to sample at. Exactly one of steps, timesteps and sigmas must be given.

        Args:
            num_inference_steps (`int`, *optional*): the levels stored for this number of steps in the config,
                otherwise levels spread evenly over the grid.
            device (`str` or `torch.device`, *optional*): where `timesteps` is put.
            timesteps (`Sequence[float]`, *optional*): descending. For `consistency` and `edm` networks, indices into
                the training grid as in `CMStochasticIterativeScheduler`, for instance `[22, 0]`; for the others, the
                timesteps that the network is given.
            sigmas (`Sequence[float]`, *optional*): noise levels, descending, inside [`sigma_min`, `sigma_max`].
            original_inference_steps (`int`, *optional*): instead of the config's, for `num_inference_steps`.
            strength (`float`): the part of the timesteps of `original_inference_steps` to spread the steps over, from
                the lowest up, as diffusers' image-to-image pipeline of latent consistency models asks for.

        Raises:
            `ValueError`: if not exactly one is given, or its values are out of order or out of range.
        """
        given = [value for value in (num_inference_steps, timesteps, sigmas) if value is not None]
        if len(given) != 1:
            raise ValueError("Pass exactly one of `num_inference_steps`, `timesteps` and `sigmas`.")
        if strength != 1 and num_inference_steps is None:
            raise ValueError("`strength` is for `num_inference_steps`; levels are passed as they are wanted.")
        stock_start = timesteps is not None and self.config.family in GRID_FAMILIES
        if sigmas is not None:
            levels = self._levels.checked(sigmas, "sigmas")
        elif timesteps is not None:
            levels = self._levels.at_timesteps(timesteps)
        else:
            levels = self._levels.at_original(original_inference_steps, strength).for_steps(num_inference_steps)
        self.num_inference_steps = len(levels)
        # Sampling may start below sigma_max; diffusers' own class starts from sigma_max whatever its indices say.
        starts_lower = not stock_start and levels[0] < self.config.sigma_max * (1 - 1e-6)
        self.init_noise_sigma = self.first_std(float(levels[0]) if starts_lower else self.config.sigma_max)
        self._set_schedule(levels, device)

    def levels_for(self, steps: Any) -> np.ndarray:
        """The noise levels of a number of steps, descending: those that are stored for it, or spread over the grid.

        Args:
            steps (`int`): as `num_inference_steps` in `set_timesteps`.

        Raises:
            `ValueError`: if it is no positive integer, or none are stored and the grid has fewer.
        """
        return self._levels.for_steps(steps)

    @property
    def _levels(self) -> SamplingLevels:
        return SamplingLevels(self.config, self.preconditioning)

    @property
    def grid_length(self) -> int:
        """How many levels the grid has."""
        return self._levels.length

    @property
    def grid(self) -> np.ndarray:
        """All levels of the grid, descending, in float64."""
        return self._levels.grid

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

    # States ---------------------------------------------------------------------------------------------------------

    def state_scale(self, sigma: Tensor) -> Tensor:
        """What `x0 + sigma * n` is divided by to be a state of this scheduler: 1, or what leaves unit variance."""
        if self.config.boundary == "lcm":
            return self.preconditioning.input_scale(sigma)
        return torch.ones_like(sigma)

    def first_std(self, sigma: float) -> float:
        """The standard deviation of the noise that is the first state, where sampling starts at `sigma`."""
        return 1.0 if self.config.boundary == "lcm" else sigma

    # Sampling -------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the network is given: `c_in(sigma) * x`, for the state of any boundary.

        Args:
            sample (`Tensor` of shape `(batch, channels, height, width)`): the state.
            timestep (`float` or `Tensor`): one of `timesteps`.
        """
        self.is_scale_input_called = True
        sigma = self.sigmas[self._locate(timestep)]
        scale = self.preconditioning.input_scale(sigma) / self.state_scale(sigma)
        return (sample / scale).to(sample.dtype)

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
        if not self.is_scale_input_called and self.config.boundary != "lcm":
            logger.warning("`step` was called without `scale_model_input`: the network was given unscaled states.")
            self.is_scale_input_called = True
        index = self._locate(timestep)
        # Half precision is too coarse for c_skip * x at sigma = 80.
        dtype = torch.promote_types(sample.dtype, torch.float32)
        function = self.preconditioning if self.config.flow_map else self.boundary
        sigma, lower = self.sigmas[index], self.sigmas[index + 1]
        c_skip, c_out, *_ = function.scalings(sigma)
        output, state = model_output[:, : sample.shape[1]].to(dtype), sample.to(dtype) * self.state_scale(sigma)
        denoised = c_out * output + c_skip * state
        if self.config.clip_denoised:
            denoised = denoised.clamp(*self.config.image_range)

        prev_sample = denoised
        if self.config.flow_map:
            prev_sample = torch.lerp(state, denoised, self.denoised_share(index))
        elif self._adds_noise_after(index):
            noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=dtype)
            prev_sample = denoised + noise * self.config.s_noise * self.added_noise_std(lower)
            prev_sample = prev_sample / self.state_scale(lower)
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
        """How much of the clean estimate of a step is in the state after it.

        All of it, but on the way of a flow map, and where noise is added to states that keep unit variance.
        """
        if self.config.flow_map:
            return 1.0 - float(self.sigmas[index + 1] / self.sigmas[index])
        return 1 / float(self.state_scale(self.sigmas[index + 1])) if self._adds_noise_after(index) else 1.0

    def added_noise_std(self, sigma: Tensor) -> Tensor:
        """`sqrt(sigma^2 - answer^2)`: so much noise leads from the level at which f answers back to `sigma`.

        That is `sigma_min`, or 0 for the boundary `lcm`. Rounding may leave the difference slightly negative there.
        """
        return (sigma**2 - self.boundary.answer_level**2).clamp(min=0) ** 0.5

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x0 + sigma(timestep) * noise`, as a state of this scheduler.

        Args:
            original_samples (`Tensor` of shape `(batch, channels, height, width)`): clean samples.
            noise (`Tensor` of the same shape): unit-variance noise.
            timesteps (`Tensor` of shape `(batch,)`): in the network's own time, on the schedule or not.
        """
        # Half precision holds no large sigma.
        samples = original_samples.to(torch.promote_types(original_samples.dtype, torch.float32))
        sigma = self.preconditioning.sigma_from_c_noise(torch.as_tensor(timesteps))
        sigma = sigma.view(-1, *[1] * (samples.ndim - 1))
        state = (samples + sigma.to(samples) * noise.to(samples)) / self.state_scale(sigma).to(samples)
        return state.to(original_samples.dtype)

    # Saving: stock on disk where diffusers' own class computes the same ---------------------------------------------

    @property
    def is_stock(self) -> bool:
        """Whether diffusers' `CMStochasticIterativeScheduler` represents this scheduler exactly.

        It does not know `few_step_sigmas`; [`~ConsistencyScheduler.stock_timesteps`] say the same to it.
        """
        return is_stock(self.config)

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
        stock = SamplingLevels({**self.config, "sigma_lowest": None}, self.preconditioning)
        return grid_indices(self.levels_for(num_inference_steps), stock.grid)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the config; under the stock class's name when diffusers' own class computes the same."""
        config = json.loads(self.to_json_string())
        if self.is_stock:
            config = stock_config(config, type(self))
        Path(json_file_path).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        import diffusers

        return [cls, getattr(diffusers, STOCK_CLASS)]
