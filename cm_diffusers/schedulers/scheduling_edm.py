"""EDM's Euler sampler for networks whose time is a multiple of EDM's."""

from __future__ import annotations

from diffusers import EDMEulerScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks for it in this module
from torch import Tensor


class ScaledTimeEDMScheduler(EDMEulerScheduler):
    """`EDMEulerScheduler` for networks that are given `time_scale` times EDM's time.

    OpenAI's EDM networks are given `250 ln sigma`, 1000 times EDM's `ln(sigma) / 4`. The first frequency of a
    `UNet2DModel`'s time embedding is always 1, so that no config or weight of the network can absorb the factor. All
    else is EDM's, and as a teacher's scheduler it is read like EDM's. No other scheduler of diffusers knows of the
    factor: one made from this one's config gives the network a wrong time.

    Args:
        time_scale (`float`): the factor.
        sigma_min, sigma_max, sigma_data, sigma_schedule, num_train_timesteps, prediction_type, rho, final_sigmas_type:
            as in `EDMEulerScheduler`.
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
        time_scale: float = 1000.0,
    ) -> None:
        if not time_scale > 0:
            raise ValueError(f"`time_scale` must be positive, got {time_scale}.")
        super().__init__(
            sigma_min, sigma_max, sigma_data, sigma_schedule, num_train_timesteps, prediction_type, rho,
            final_sigmas_type,
        )  # fmt: skip

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """The network's time at `sigma`: `time_scale * ln(sigma) / 4`, of the shape of `sigma`."""
        return self.config.time_scale * super().precondition_noise(sigma)
