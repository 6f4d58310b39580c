"""The training loop, once for all methods."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.noise_levels import default_second_sigma, karras_grid
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_consistency import GRID_FAMILIES
from cm_diffusers.training import checkpoints
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.data import load_image_dataset, make_dataloader, prepare_dataset, started
from cm_diffusers.training.ema import EMA, decay_for_half_life
from cm_diffusers.training.images import ImageSpec
from cm_diffusers.training.phases import Phase, make_phases
from cm_diffusers.training.runtime import check_writable, make_accelerator, make_optimizer
from cm_diffusers.training.schedules import learning_rate, make_levels, mu_schedule
from cm_diffusers.training.student import make_student
from cm_diffusers.training.teacher import Teacher, check_teacher, load_teacher
from cm_diffusers.training.tracking import Meter, log_samples, start_tracker

logger = logging.getLogger(__name__)

# What may differ between a checkpoint's config and the run that resumes it.
FREE_TO_CHANGE = frozenset(
    "output_dir resume logging_steps sample_steps num_samples sample_nfes tracker checkpoint_steps checkpoint_limit "
    "teacher_check few_step_sigmas on_bad_image".split()
)
MAX_BAD_STEPS = 10


class ConsistencyTrainer:
    """Trains a consistency model: a student of a pretrained diffusers UNet, or a network on its own.

    Everything that can be wrong with the inputs is found here, before training starts.

    Args:
        config ([`ConsistencyConfig`]): the run.
        teacher (*optional*): a folder, Hub id, pipeline, or pair `(unet, scheduler)`; `config.teacher` when `None`.
            For `ct` it only gives the initial weights.
        train_dataset (*optional*): a dataset of `datasets`, a torch dataset of images, or a tensor of shape
            `(n, channels, height, width)`; `config.dataset` when `None`.

    Raises:
        `ValueError`, `TypeError`: for a config, teacher or dataset that cannot work.

    Example:
        ```py
        config = ConsistencyConfig(method="cd", distance="pseudo_huber", output_dir="my-student")
        pipe = ConsistencyTrainer(config, teacher="google/ddpm-cifar10-32", train_dataset=dataset).train()
        ```
    """

    def __init__(self, config: ConsistencyConfig, teacher: Any = None, train_dataset: Any = None) -> None:
        self.config = config = config.resolve()
        self.output_dir = Path(config.output_dir)
        check_writable(self.output_dir)
        self.accelerator = make_accelerator(config)
        set_seed(config.seed)

        self.teacher = self._load_teacher(config.teacher if teacher is None else teacher)
        unet, self.scheduler = self._make_student()
        self.dataset = self._prepare_data(train_dataset, unet)
        set_seed(config.seed, device_specific=True)

        device = self.accelerator.device
        unet = unet.to(device).train()
        self.ema = EMA(unet)
        self.target_ema = EMA(unet) if config.target == "ema" and config.mu else None
        loader = make_dataloader(
            self.dataset, batch_size=config.batch_size, shuffle=True, num_workers=config.num_workers, seed=config.seed
        )
        optimizer = make_optimizer(config, unet)
        self.student, self.optimizer, self.loader = self.accelerator.prepare(unet, optimizer, loader)
        self.unet = self.accelerator.unwrap_model(self.student)

        scheduler_config = self.scheduler.config
        self.levels = make_levels(config, scheduler_config.sigma_min, scheduler_config.sigma_max, scheduler_config.rho)
        self.mu = mu_schedule(config, self.levels)
        self.phases = make_phases(
            config, self.teacher, self.scheduler, self.levels, self.student, self.target_ema, self.accelerator.device
        )
        self.step = self.epoch = self.batches_in_epoch = self.bad_steps = 0

    # Preparation ----------------------------------------------------------------------------------------------------

    def _load_teacher(self, source: Any) -> Teacher | None:
        if source is not None:
            return load_teacher(source, self.config.teacher_revision, self.config.teacher_prediction_type)
        if self.config.source == "teacher":
            raise ValueError(f"`method={self.config.method!r}` needs a `teacher`.")
        return None

    def _make_student(self) -> tuple[Any, ConsistencyScheduler]:
        config = self.config
        overrides = {name: getattr(config, name) for name in ("boundary", "sigma_min", "sigma_max", "few_step_sigmas")}
        if self.teacher is not None:
            convert = config.conversion_steps != 0
            unet: Any
            unet, scheduler = make_student(self.teacher.unet, self.teacher.scheduler, convert, **overrides)
        elif config.unet_config is not None:
            unet = UNet2DModel.from_config(UNet2DModel.load_config(config.unet_config))
            scheduler = ConsistencyScheduler(**{name: value for name, value in overrides.items() if value is not None})
        else:
            raise ValueError("Training without a teacher needs `unet_config`, the config of a UNet2DModel.")
        return unet, self._describe_training(scheduler, config.resolution or unet.config.sample_size or 64)

    def _describe_training(self, scheduler: ConsistencyScheduler, size: Any) -> ConsistencyScheduler:
        """The scheduler with the grid that the student ends its training on, and a second level out of it."""
        now = scheduler.config
        levels = make_levels(self.config, now.sigma_min, now.sigma_max, now.rho)
        length = levels.num_levels(self.config.max_train_steps)
        grid_field = "num_train_timesteps" if now.family in GRID_FAMILIES else "num_levels"
        changes: dict[str, Any] = {grid_field: length}
        if now.few_step_sigmas is None and length > 2:
            grid = karras_grid(length, now.sigma_min, now.sigma_max, now.rho)
            wanted = default_second_sigma(size if isinstance(size, int) else size[0])
            second = min(grid[1:-1].tolist(), key=lambda sigma: abs(math.log(sigma / wanted)))
            changes["few_step_sigmas"] = {"2": [now.sigma_max, second]}
        return ConsistencyScheduler.from_config({**now, **changes, "_use_default_values": []})

    def _prepare_data(self, dataset: Any, unet: Any) -> Any:
        config = self.config
        if dataset is None:
            if config.dataset is None:
                raise ValueError("Training needs a `dataset`.")
            with self.accelerator.main_process_first():
                dataset = load_image_dataset(
                    config.dataset, name=config.dataset_name, split=config.dataset_split, streaming=config.streaming
                )
        size = config.resolution or unet.config.sample_size
        if size is None:
            raise ValueError("The network's config has no `sample_size`: set `resolution`.")
        height, width = (size, size) if isinstance(size, int) else size
        unet.register_to_config(sample_size=size)
        low, high = self.scheduler.config.image_range
        spec = ImageSpec(unet.config.in_channels, height, width, (low, high), config.center_crop, config.random_flip)
        num_classes = unet.config.num_class_embeds
        if num_classes is None and config.label_column is not None:
            raise ValueError("`label_column` was given, but the network is not class-conditional.")
        prepared = prepare_dataset(
            dataset, spec, image_column=config.image_column, label_column=config.label_column,
            on_bad_image=config.on_bad_image, num_classes=num_classes,
        )  # fmt: skip
        needed = config.batch_size * self.accelerator.num_processes
        if hasattr(prepared, "__len__") and len(prepared) < needed:
            raise ValueError(
                f"The dataset's {len(prepared)} images are fewer than one batch of {needed} (all devices)."
            )
        return prepared

    # Training -------------------------------------------------------------------------------------------------------

    def train(self) -> ConsistencyPipeline:
        """Run to the end, save the student to `config.output_dir` and return it as a pipeline.

        The saved weights are the evaluation EMA's.
        """
        total = self.phases[-1].start + self.phases[-1].steps
        self._resume()
        self._check_teacher()
        start_tracker(self.accelerator, self.config)
        meter = Meter(self.accelerator, self.global_batch_size)
        bar = tqdm(
            total=total, initial=self.step, disable=not self.accelerator.is_main_process, desc="train", smoothing=0
        )
        batches = self._batches()
        while self.step < total:
            phase = next(p for p in self.phases if self.step < p.start + p.steps)
            if self.step == phase.start:
                self._enter(phase, bar)
            loss, norm = self._optimise(phase, batches)
            meter.update(loss, norm)
            self._follow(phase)
            self.step += 1
            bar.update()
            self._report(phase, meter, bar)
        bar.close()
        self.accelerator.wait_for_everyone()
        pipeline = self.pipeline()
        if self.accelerator.is_main_process:
            self.save(pipeline)
        self.accelerator.end_training()
        return pipeline

    @property
    def global_batch_size(self) -> int:
        """Images per step, over all devices and micro-steps."""
        config = self.config
        return config.batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def _enter(self, phase: Phase, bar: tqdm) -> None:
        bar.set_description(phase.name)
        self.ema.restart(self.unet)
        if self.target_ema is not None:
            self.target_ema.restart(self.unet)

    def _optimise(self, phase: Phase, batches: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, Tensor]:
        """One optimiser step over all its micro-steps. Returns the mean loss and the gradient's norm."""
        step = self.step - phase.start
        rate = learning_rate(step, phase.steps, phase.learning_rate, phase.lr_schedule, phase.lr_warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = []
        norm = torch.zeros(())
        for _ in range(self.config.gradient_accumulation_steps):
            images, conditioning = next(batches)
            with self.accelerator.accumulate(self.student):
                with self.accelerator.autocast():
                    loss = phase.objective.loss(images, step, **conditioning)
                self.accelerator.backward(loss)
                losses.append(loss.detach())
                if self.accelerator.sync_gradients:
                    limit = self.config.max_grad_norm or math.inf
                    norm = self.accelerator.clip_grad_norm_(self.student.parameters(), limit)
                    # A scaler skips bad steps itself, and has to see them to lower its scale.
                    if self._is_finite(norm) or self.accelerator.scaler is not None:
                        self.optimizer.step()
                self.optimizer.zero_grad()
        return torch.stack(losses).mean(), norm

    def _is_finite(self, norm: Tensor) -> bool:
        """Whether the gradient may reach the weights."""
        if torch.isfinite(norm):
            self.bad_steps = 0
            return True
        self.bad_steps += 1
        logger.warning("Step %d: the gradient is not finite; the step is skipped.", self.step)
        if self.bad_steps >= MAX_BAD_STEPS and self.accelerator.scaler is None:
            raise FloatingPointError(
                f"{self.bad_steps} steps in a row had a gradient that is not finite. The weights are those of the "
                "last good step; lower the learning rate, or look at the images."
            )
        return False

    def _follow(self, phase: Phase) -> None:
        """Move the averages towards the new weights."""
        step = self.step - phase.start
        if self.target_ema is not None and phase is self.phases[-1]:
            self.target_ema.update(self.unet, self.mu(step))
        self.ema.update(self.unet, self._ema_decay(step))

    def _ema_decay(self, step: int) -> float:
        batch, config = self.global_batch_size, self.config
        return decay_for_half_life(config.ema_half_life, batch, (step + 1) * batch, config.ema_rampup)

    def _batches(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        while True:
            if hasattr(self.loader, "set_epoch"):
                self.loader.set_epoch(self.epoch)
            done = self.batches_in_epoch
            for batch in started(skip_first_batches(self.loader, done) if done else self.loader):
                self.batches_in_epoch += 1
                yield batch["images"], self._conditioning(batch)
            if self.batches_in_epoch == 0:
                raise ValueError("The dataset gave no batch: it holds fewer images than one batch.")
            self.epoch, self.batches_in_epoch = self.epoch + 1, 0

    def _conditioning(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch.get("class_labels")
        if labels is None or self.unet.config.num_class_embeds is None:
            return {}
        if self.config.label_dropout:
            dropped = torch.rand(len(labels), device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(dropped, self.config.null_class_label or 0)
        return {"class_labels": labels}

    @torch.no_grad()
    def _check_teacher(self) -> None:
        if self.teacher is None or not self.config.teacher_check or self.config.source != "teacher":
            return
        # 64 images of 64 x 64 x 4, and more where they are smaller.
        first = next(iter(make_dataloader(self.dataset, batch_size=1, shuffle=False, num_workers=0, seed=0)))
        count = max(8, min(256, 2**20 // first["images"].numel()))
        loader = make_dataloader(self.dataset, batch_size=count, shuffle=False, num_workers=0, seed=0, drop_last=False)
        batch = {name: value.to(self.accelerator.device) for name, value in next(iter(loader)).items()}
        labels = batch.get("class_labels")
        conditional = labels is not None and self.unet.config.num_class_embeds is not None
        check_teacher(self.teacher, batch["images"], **({"class_labels": labels} if conditional else {}))

    # What a run leaves behind ---------------------------------------------------------------------------------------

    def _report(self, phase: Phase, meter: Meter, bar: tqdm) -> None:
        config, step, done = self.config, self.step, self.step - phase.start
        last = done == phase.steps
        if step % config.logging_steps == 0 or last:
            values = {"lr": self.optimizer.param_groups[0]["lr"], "ema_decay": self._ema_decay(done - 1)}
            if phase is self.phases[-1]:
                values["num_levels"] = self.levels.num_levels(done - 1)
                values["mu"] = self.mu(done - 1) if self.target_ema is not None else 0.0
            meter.log(phase.name, step, values, bar)
        if config.sample_steps and (step % config.sample_steps == 0 or last):
            log_samples(self.accelerator, self.pipeline(), config, step, self.output_dir / "samples")
            meter.restart_clock()
        if config.checkpoint_steps and (step % config.checkpoint_steps == 0 or (last and phase is self.phases[-1])):
            self.save_checkpoint()
            meter.restart_clock()

    def pipeline(self) -> ConsistencyPipeline:
        """The student with its evaluation weights."""
        scheduler = ConsistencyScheduler.from_config(self.scheduler.config)
        return ConsistencyPipeline(self.ema.network, scheduler, self.config.null_class_label)

    def save(self, pipeline: ConsistencyPipeline) -> None:
        """Save the student beside its final place, then move it there: an older one is whole until then."""
        partial = Path(tempfile.mkdtemp(prefix=".student-", dir=self.output_dir))
        try:
            pipeline.save_pretrained(partial)
            for part in sorted(partial.iterdir()):
                place = self.output_dir / part.name
                if place.is_dir():
                    shutil.rmtree(place)
                os.replace(part, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def save_checkpoint(self) -> Path:
        """Write everything that the next step depends on. Called on all ranks."""
        accelerator = self.accelerator
        folder = checkpoints.checkpoint_path(self.output_dir / "checkpoints", self.step)
        checkpoints.write_files(folder, self._write_state, accelerator.is_main_process, accelerator.wait_for_everyone)
        if accelerator.is_main_process:
            checkpoints.prune(folder.parent, self.config.checkpoint_limit)
        return folder

    def _write_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder / "accelerate"))
        if not self.accelerator.is_main_process:
            return
        for name, average in self._averages().items():
            save_file(average.network.state_dict(), folder / f"{name}.safetensors")
        state = {
            "step": self.step, "epoch": self.epoch, "batches_in_epoch": self.batches_in_epoch,
            "num_processes": self.accelerator.num_processes, "config": self.config.to_dict(),
        }  # fmt: skip
        (folder / checkpoints.STATE).write_text(json.dumps(state, indent=2))

    def _averages(self) -> dict[str, EMA]:
        return {"ema": self.ema} | ({"target": self.target_ema} if self.target_ema is not None else {})

    def _resume(self) -> None:
        if self.config.resume is None:
            return
        found = checkpoints.find(self.config.resume, self.output_dir / "checkpoints")
        if found is None:
            logger.info("No checkpoint in %s: starting anew.", self.output_dir)
            return
        folder, state = found
        self._check_same_run(folder, state)
        self.accelerator.load_state(str(folder / "accelerate"))
        for name, average in self._averages().items():
            average.network.load_state_dict(load_file(folder / f"{name}.safetensors"))
        self.step, self.epoch, self.batches_in_epoch = (state[k] for k in ("step", "epoch", "batches_in_epoch"))
        logger.info("Resumed from %s.", folder)

    def _check_same_run(self, folder: Path, state: dict[str, Any]) -> None:
        if state["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"Checkpoint {folder} was written by {state['num_processes']} processes, this run has "
                f"{self.accelerator.num_processes}."
            )
        now, differences = self.config.to_dict(), []
        for spec in dataclasses.fields(self.config):
            name = spec.name
            if name not in FREE_TO_CHANGE and state["config"].get(name, spec.default) != now[name]:
                differences.append(f"{name} was {state['config'].get(name)!r} and is {now[name]!r}")
        if differences:
            raise ValueError(f"Checkpoint {folder} belongs to another run: {'; '.join(differences)}.")
