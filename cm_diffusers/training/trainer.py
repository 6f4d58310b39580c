"""The training loop, once for all methods."""

from __future__ import annotations

import contextlib
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
from accelerate.utils import gather_object, send_to_device, set_seed
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.noise_levels import default_second_sigma, karras_grid
from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.preconditioning import send
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.schedulers.scheduling_consistency import GRID_FAMILIES
from cm_diffusers.training import checkpoints, state
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.data import load_image_dataset, prepare_dataset
from cm_diffusers.training.ema import EMA, decay_for_half_life, whole
from cm_diffusers.training.health import Preempted, StepRecord, Watch
from cm_diffusers.training.images import ImageSpec
from cm_diffusers.training.loading import Batches, first_images
from cm_diffusers.training.objectives import Losses
from cm_diffusers.training.optimizers import make_optimizer, set_learning_rate, take_step
from cm_diffusers.training.phases import Phase, make_phases
from cm_diffusers.training.randomness import SampleRandom, mixed
from cm_diffusers.training.runtime import (
    autocast,
    check_writable,
    end_training,
    in_precision,
    lay_out,
    make_accelerator,
    on_main,
)
from cm_diffusers.training.schedules import make_levels, mu_schedule
from cm_diffusers.training.sharding import shard_like_student
from cm_diffusers.training.student import make_student
from cm_diffusers.training.teacher import Teacher, TeacherReport, check_teacher, load_teacher
from cm_diffusers.training.tracking import Meter, log_samples, start_tracker

logger = logging.getLogger(__name__)

# What may differ between a checkpoint's config and the run that resumes it.
FREE_TO_CHANGE = frozenset(
    "output_dir resume logging_steps sample_steps num_samples sample_nfes tracker checkpoint_steps checkpoint_limit "
    "teacher_check few_step_sigmas on_bad_image max_bad_steps distributed_timeout "
    # How the work is done, not what is computed, up to rounding; the global batch is compared instead of its parts.
    "batch_size gradient_accumulation_steps num_workers allow_tf32 compile channels_last "
    "gradient_checkpointing".split()
)
DROPOUT = 3  # keeps the dropout masks apart from what else is drawn with the run's seed


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
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.accelerator = make_accelerator(config)
        if config.resume is None:
            on_main(self.accelerator, lambda: checkpoints.refuse_to_start_anew(self.checkpoint_dir))
        set_seed(config.seed)

        self.teacher = self._load_teacher(config.teacher if teacher is None else teacher)
        unet, self.scheduler = self._make_student()
        self.dataset = self._prepare_data(train_dataset, unet)
        self.dataset_identity = self.dataset.identity()
        set_seed(config.seed, device_specific=True)

        self._prepare_networks(unet)
        scheduler_config = self.scheduler.config
        self.levels = make_levels(config, scheduler_config.sigma_min, scheduler_config.sigma_max, scheduler_config.rho)
        self.mu = mu_schedule(config, self.levels)
        self.phases = make_phases(
            config, self.teacher, self.scheduler, self.levels, self.student, self.target_ema, self.accelerator.device
        )
        self.batches = Batches(
            self.dataset, config.batch_size, config.seed, config.num_workers, self.accelerator.process_index,
            self.accelerator.num_processes,
        )  # fmt: skip
        self.step, self._saved = 0, Path()
        self.watch = Watch(self.accelerator, self.output_dir / "bad-steps", config.max_bad_steps)
        self.meter = Meter(
            self.accelerator, self.global_batch_size, (scheduler_config.sigma_min, scheduler_config.sigma_max)
        )

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
                    config.dataset, name=config.dataset_name, split=config.dataset_split, streaming=config.streaming,
                    data_files=config.data_files,
                )  # fmt: skip
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
        return prepare_dataset(
            dataset, spec, image_column=config.image_column, label_column=config.label_column,
            on_bad_image=config.on_bad_image, num_classes=num_classes,
        )  # fmt: skip

    def _prepare_networks(self, unet: Any) -> None:
        config = self.config
        unet = lay_out(config, unet.to(self.accelerator.device).train())
        if self.teacher is not None:
            self.teacher.unet = lay_out(config, in_precision(self.teacher.unet.to(self.accelerator.device), config))
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.ema = EMA(unet)
        self.target_ema = EMA(unet) if config.target == "ema" and config.mu else None
        if self.target_ema is not None:
            lay_out(config, self.target_ema.network)
        self.student, self.optimizer = self.accelerator.prepare(unet, make_optimizer(config, unet))
        self.unet = self.accelerator.unwrap_model(self.student)
        for average in self.averages().values():
            shard_like_student(self.accelerator, average.network)

    # Training -------------------------------------------------------------------------------------------------------

    def train(self) -> ConsistencyPipeline:
        """Run to the end, save the student to `config.output_dir` and return it as a pipeline.

        The saved weights are the evaluation EMA's.

        Raises:
            `Preempted`: a `SystemExit` with code 75, after SIGTERM; a checkpoint was written.
            `FloatingPointError`: when too many steps in a row had no finite gradient.
            `CheckpointError`: if the checkpoint to resume from is damaged, or one cannot be written.
        """
        total = self.phases[-1].start + self.phases[-1].steps
        self._resume()
        self.check_teacher()
        start_tracker(self.accelerator, self.config)
        self.meter.restart_clock()
        with (
            contextlib.closing(iter(self.batches)) as batches,
            self._progress_bar(total) as bar,
            self.watch.listening(),
        ):
            while self.step < total:
                phase = next(p for p in self.phases if self.step < p.start + p.steps)
                if self.step == phase.start:
                    self._enter(phase, bar)
                record = self.advance(phase, batches)
                bar.update()
                stop = self.watch.after(record)
                self._report(phase, bar)
                if stop:
                    self._stop()
        self.watch.settle()
        pipeline = self.pipeline()
        on_main(self.accelerator, lambda: self.save(pipeline))
        end_training(self.accelerator)
        return pipeline

    def _progress_bar(self, total: int) -> tqdm:
        shown: dict[str, Any] = {} if self.accelerator.is_main_process else {"disable": True}
        return tqdm(total=total, initial=self.step, desc="train", smoothing=0, **shown)

    def _stop(self) -> None:
        self.watch.settle()
        folder = self.save_checkpoint()
        end_training(self.accelerator)
        message = f"Asked to end (SIGTERM): the run is saved in {folder}, go on with `resume: auto`."
        logger.warning(message)
        raise Preempted(message)

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

    def advance(self, phase: Phase, batches: Iterator[dict[str, Tensor]]) -> StepRecord:
        """Take one step, with nothing around it."""
        record = self._optimise(phase, batches)
        self._follow(phase)
        self.step += 1
        return record

    def _optimise(self, phase: Phase, batches: Iterator[dict[str, Tensor]]) -> StepRecord:
        """One optimiser step over all its micro-steps."""
        step = self.step - phase.start
        rate = phase.learning_rate_at(step)
        set_learning_rate(self.optimizer, self.config, rate, self.step)
        inputs: list[dict[str, Tensor]] = []
        means = []
        norm = torch.zeros((), device=self.accelerator.device)
        for micro in range(self.config.gradient_accumulation_steps):
            with self.meter.clock("data"):
                inputs.append(self._next(batches))
            torch.manual_seed(mixed(DROPOUT, self.config.seed, self.step, micro, self.accelerator.process_index))
            with self.accelerator.accumulate(self.student):
                with self.meter.clock("forward"):
                    losses = self.losses(phase, step, inputs[-1])
                with self.meter.clock("backward"):
                    loss = losses.values.mean()
                    self.accelerator.backward(loss)
                self.meter.add_losses(losses)
                means.append(loss.detach())
                with self.meter.clock("optimizer"):
                    if self.accelerator.sync_gradients:
                        norm = self._gradient_norm()
                        take_step(self.optimizer, ~norm.isfinite())
                    self.optimizer.zero_grad()
        self.meter.add_step(norm)
        values = {"phase": phase.name, "learning_rate": rate, "config": self.config.to_dict()}
        return StepRecord(self.step, inputs, torch.stack(means), norm, ~norm.isfinite(), values)

    def _next(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"The dataset ended at step {self.step}: it cannot be read again, or is below one batch.")
        return self.to_device(batch)

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as the networks take it; the seeds stay on the CPU."""
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True, skip_keys=["seed"])
        if self.config.channels_last:
            batch["images"] = batch["images"].contiguous(memory_format=torch.channels_last)
        return batch

    def losses(self, phase: Phase, step: int, batch: dict[str, Tensor]) -> Losses:
        """The losses of one micro-step, `step` steps into `phase`, for a batch on the device."""
        images, random = batch["images"], SampleRandom(batch["seed"], batch["images"].device)
        with autocast(self.accelerator):
            return phase.objective.losses(images, step, random, **self._conditioning(batch, random))

    def _gradient_norm(self) -> Tensor:
        """Clip the gradient; returns its norm before."""
        norm = self.accelerator.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm or math.inf)
        return torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _follow(self, phase: Phase) -> None:
        """Move the averages towards the new weights."""
        step = self.step - phase.start
        if self.target_ema is not None and phase is self.phases[-1]:
            self.target_ema.update(self.unet, self.mu(step))
        self.ema.update(self.unet, self._ema_decay(step))

    def _ema_decay(self, step: int) -> float:
        batch, config = self.global_batch_size, self.config
        return decay_for_half_life(config.ema_half_life, batch, (step + 1) * batch, config.ema_rampup)

    def _conditioning(self, batch: dict[str, Tensor], random: SampleRandom) -> dict[str, Tensor]:
        labels = batch.get("class_labels")
        if labels is None or self.unet.config.num_class_embeds is None:
            return {}
        if self.config.label_dropout:
            dropped = send(random.uniform() < self.config.label_dropout, labels.device)
            labels = labels.masked_fill(dropped, self.config.null_class_label or 0)
        return {"class_labels": labels}

    @torch.no_grad()
    def check_teacher(self) -> TeacherReport | None:
        """See that the teacher denoises these images; `None` if there is no teacher to check.

        Raises:
            `ValueError`: if it does not.
        """
        if self.teacher is None or not self.config.teacher_check or self.config.source != "teacher":
            return None
        # 64 images of 64 x 64 x 4, and more where they are smaller.
        count = max(8, min(256, 2**20 // math.prod(self.dataset.transform.spec.shape)))
        batch = send_to_device(first_images(self.dataset, count), self.accelerator.device)
        labels = batch.get("class_labels")
        conditional = labels is not None and self.unet.config.num_class_embeds is not None
        return check_teacher(self.teacher, batch["images"], **({"class_labels": labels} if conditional else {}))

    # What a run leaves behind ---------------------------------------------------------------------------------------

    def _report(self, phase: Phase, bar: tqdm) -> None:
        config, step, done = self.config, self.step, self.step - phase.start
        last = done == phase.steps
        if step % config.logging_steps == 0 or last:
            values = {
                "lr": phase.learning_rate_at(done - 1), "ema_decay": self._ema_decay(done - 1),
                "skipped_steps": self.watch.skipped,
            }  # fmt: skip
            if phase is self.phases[-1]:
                values["num_levels"] = self.levels.num_levels(done - 1)
                values["mu"] = self.mu(done - 1) if self.target_ema is not None else 0.0
            self.meter.log(phase.name, step, values, bar)
        if config.sample_steps and (step % config.sample_steps == 0 or last):
            log_samples(self.accelerator, self.pipeline(), config, step, self.output_dir / "samples")
            self.meter.restart_clock()
        if config.checkpoint_steps and (step % config.checkpoint_steps == 0 or (last and phase is self.phases[-1])):
            self.save_checkpoint()
            self.meter.restart_clock()

    def pipeline(self) -> ConsistencyPipeline:
        """The student with its evaluation weights. Called on all ranks."""
        scheduler = ConsistencyScheduler.from_config(self.scheduler.config)
        return ConsistencyPipeline(whole(self.ema.network), scheduler, self.config.null_class_label)

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
        """Write everything that the next step depends on, and drop old checkpoints. Called on all ranks.

        Raises:
            `CheckpointError`: if it cannot be written. Older ones stay.
        """
        folder = checkpoints.checkpoint_path(self.checkpoint_dir, self.step)
        if folder == self._saved:
            return folder
        networks = self._networks()
        weights = {name: state.whole_weights(network) for name, network in networks.items()}
        optimizer = state.whole_optimizer(self.unet, self.optimizer.optimizer)
        scaler = self.accelerator.scaler
        run = {
            **self._run(), "step": self.step, "data": gather_object([self.batches.state()]),
            "scaler": None if scaler is None else scaler.state_dict(),
        }  # fmt: skip

        def write(partial: Path) -> None:
            state.write(partial, weights, optimizer)
            (partial / checkpoints.STATE).write_text(json.dumps(run, indent=2))

        def write_and_prune() -> None:
            checkpoints.write_files(folder, write)
            checkpoints.prune(folder, self.config.checkpoint_limit)

        on_main(self.accelerator, write_and_prune)
        self._saved = folder
        return folder

    def _networks(self) -> dict[str, Any]:
        """What is trained, and what follows it."""
        return {"student": self.unet} | {name: average.network for name, average in self.averages().items()}

    def averages(self) -> dict[str, EMA]:
        """The frozen copies that follow the student."""
        return {"ema": self.ema} | ({"target": self.target_ema} if self.target_ema is not None else {})

    def _resume(self) -> None:
        if self.config.resume is None:
            return
        resume, root = self.config.resume, self.checkpoint_dir
        run = self._run()
        found = on_main(self.accelerator, lambda: find_matching(resume, root, run))
        if found is None:
            logger.info("No checkpoint in %s: starting anew.", self.output_dir)
            return
        folder, saved = found
        is_main, distributed = self.accelerator.is_main_process, self.accelerator.num_processes > 1
        networks = self._networks()
        for name, network in networks.items():
            state.restore_weights(network, folder / f"{name}.safetensors", is_main, distributed)
        state.restore_optimizer(self.unet, self.optimizer.optimizer, folder, is_main, distributed)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        if self.batches.is_stream:
            self.batches.restore(saved["data"][self.accelerator.process_index])
        else:
            self.batches.restore({"batches": self.step * self.config.gradient_accumulation_steps})
        logger.info("Resumed from %s.", folder)

    def _run(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed."""
        run = {"config": self.config.to_dict(), "global_batch_size": self.global_batch_size}
        if self.batches.is_stream:  # whose parts belong to processes and their workers
            run["processes"], run["workers"] = self.accelerator.num_processes, self.batches.num_workers
            run["batch_size"] = self.config.batch_size
        return {**run, "dataset": self.dataset_identity}


def find_matching(resume: str, root: Path, run: dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, if it belongs to the same run.

    Raises:
        `CheckpointError`: if it is missing or damaged.
        `ValueError`: if its run was another, naming each difference.
    """
    found = checkpoints.find(resume, root)
    if found is None:
        return None
    folder, saved = found
    differences = []
    for spec in dataclasses.fields(ConsistencyConfig):
        was, now = saved["config"].get(spec.name, spec.default), run["config"][spec.name]
        if spec.name not in FREE_TO_CHANGE and was != now:
            differences.append(f"{spec.name} was {was!r} and is {now!r}")
    for name in (run.keys() | saved.keys()) - {"config", "step", "data", "scaler"}:
        if saved.get(name) != run.get(name):
            differences.append(f"the {name.replace('_', ' ')} was {saved.get(name)!r} and is {run.get(name)!r}")
    if differences:
        raise ValueError(f"Checkpoint {folder} belongs to another run: {'; '.join(sorted(differences))}.")
    return folder, saved
