"""The averages of a run: its evaluation weights, the target's, and the student of a first stage."""

from __future__ import annotations

from torch import nn

from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.ema import EMA, decay_for_half_life
from cm_diffusers.training.phases import first_stage_steps
from cm_diffusers.training.schedules import mu_schedule


class Averages:
    """Frozen copies that follow the student.

    Args:
        config ([`ConsistencyConfig`]): resolved.
        student (`nn.Module`): the network to follow.
        batch_size (`int`): images per step over all devices.

    Attributes:
        ema ([`~cm_diffusers.training.ema.EMA`]): the weights that are evaluated and saved.
        target ([`~cm_diffusers.training.ema.EMA`], *optional*): the weights that answer at the lower level.
        first_stage ([`~cm_diffusers.training.ema.EMA`], *optional*): the student that a second stage goes on from.
    """

    def __init__(self, config: ConsistencyConfig, student: nn.Module, batch_size: int) -> None:
        self.config, self.batch_size, self._mu = config, batch_size, mu_schedule(config)
        self.ema = EMA(student)
        self.target = EMA(student) if config.target == "ema" and config.mu else None
        self.first_stage = EMA(student) if first_stage_steps(config) < config.max_train_steps else None
        if self.target is not None:
            self.target.network.train()  # the dropout of the student

    def networks(self) -> dict[str, nn.Module]:
        """Their networks, by name."""
        found = {"ema": self.ema, "target": self.target, "first_stage": self.first_stage}
        return {name: average.network for name, average in found.items() if average is not None}

    def asked(self) -> dict[str, nn.Module]:
        """Those that answer in a training step; from the others only samples are drawn."""
        return {name: network for name, network in self.networks().items() if name != "ema"}

    def restart(self, student: nn.Module, is_last: bool) -> None:
        """Begin a phase of training from the student as it is; what it was before the last one is kept.

        Args:
            is_last (`bool`): whether no phase follows.
        """
        if self.first_stage is not None and is_last:
            self.first_stage.restart(self.ema.network)
        self.ema.restart(student)
        if self.target is not None:
            self.target.restart(student)

    def follow(self, student: nn.Module, step: int, is_method: bool) -> None:
        """Move towards the student after a step, counted within the phase; the target only in the method's own."""
        if self.target is not None and is_method:
            self.target.update(student, self.mu_at(step))
        self.ema.update(student, self.decay_at(step))

    def mu_at(self, step: int) -> float:
        """The decay of the target; 0 where the student answers itself."""
        return 0.0 if self.target is None else self._mu(step)

    def decay_at(self, step: int) -> float:
        """The decay of the evaluation weights."""
        images_seen = (step + 1) * self.batch_size
        return decay_for_half_life(self.config.ema_half_life, self.batch_size, images_seen, self.config.ema_rampup)
