"""The training loop, once for all methods."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from cm_diffusers.pipelines import ConsistencyPipeline
from cm_diffusers.schedulers import ConsistencyScheduler
from cm_diffusers.training import checkpoints, saving
from cm_diffusers.training.averages import Averages
from cm_diffusers.training.companions import make_companions
from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.ema import whole
from cm_diffusers.training.health import Preempted, StepRecord, Watch, is_orphan
from cm_diffusers.training.loading import Batches, first_images
from cm_diffusers.training.optimizers import make_optimizer
from cm_diffusers.training.phases import Networks, Phase, asks_denoiser, make_phases
from cm_diffusers.training.preparation import (
    check_steps,
    identify,
    identify_scheduler,
    make_inputs,
    prepare_data,
    prepare_student,
    prepare_teacher,
    with_learning_rates,
)
from cm_diffusers.training.randomness import SampleRandom
from cm_diffusers.training.record import BESIDE, SAMPLES, TrainingRecord
from cm_diffusers.training.resuming import Memory
from cm_diffusers.training.runtime import (
    check_writable,
    end_training,
    in_precision,
    lay_out,
    make_accelerator,
    on_main,
    precision,
    settle,
)
from cm_diffusers.training.samples import drawing, prompts_to_draw
from cm_diffusers.training.sharding import is_sharded, shard_like_student
from cm_diffusers.training.stepping import Stepper
from cm_diffusers.training.teacher import TeacherReport, check_teacher, identify_teacher, takes_text
from cm_diffusers.training.tracking import Meter, log_samples, save_samples, start_tracker

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


class ConsistencyTrainer:
    """Trains a consistency model: a student of a pretrained diffusers UNet, or a network on its own.

    Everything that can be wrong with the inputs is found here, before training starts.

    Args:
        config ([`ConsistencyConfig`]): the run.
        teacher (*optional*): a folder, Hub id, pipeline, or pair `(unet, scheduler)`; `config.teacher` when `None`.
            Methods that learn from data take only its weights to begin with.
        train_dataset (*optional*): a dataset of `datasets`, a torch dataset of images, or a tensor of shape
            `(n, channels, height, width)`; `config.dataset` when `None`.

    Raises:
        `ValueError`, `TypeError`: for a config, teacher or dataset that cannot work.
        [`~cm_diffusers.hub.push.PushError`]: with `push_to_hub`, if the Hub does not let the run push.

    Example:
        ```py
        config = ConsistencyConfig(method="cd", distance="pseudo_huber", output_dir="my-student")
        pipe = ConsistencyTrainer(config, teacher="google/ddpm-cifar10-32", train_dataset=dataset).train()
        ```
    """

    def __init__(self, config: ConsistencyConfig, teacher: Any = None, train_dataset: Any = None) -> None:
        source = config.teacher if teacher is None else teacher
        self.config = config = config.resolve(takes_text(source, config.teacher_revision))
        self.output_dir = Path(config.output_dir)
        check_writable(self.output_dir)
        self.accelerator = make_accelerator(config)
        if config.resume is None:
            on_main(self.accelerator, lambda: checkpoints.refuse_to_start_anew(self.output_dir / CHECKPOINTS))
        on_main(self.accelerator, self._check_publishing)
        set_seed(config.seed)

        self.teacher = prepare_teacher(config, source, precision(self.accelerator))
        self.text = None if self.teacher is None else self.teacher.text
        unet, self.scheduler = prepare_student(config, self.teacher)
        self.config = config = with_learning_rates(config, unet)
        check_steps(config, self.scheduler)
        self.dataset = prepare_data(config, train_dataset, unet, self.scheduler, self.accelerator, self.text)
        self.dataset_identity = identify(self.dataset)
        self.prompts = [] if self.text is None else prompts_to_draw(config, self.dataset)
        set_seed(config.seed, device_specific=True)

        self.inputs = make_inputs(config, self.teacher, unet, self.dataset)
        self._prepare_networks(unet)
        ends = (self.scheduler.config.sigma_min, self.scheduler.config.sigma_max)
        self.phases = self._make_phases(ends)
        self.batches = Batches(
            self.dataset, config.batch_size, config.seed, config.num_workers, self.accelerator.process_index,
            self.accelerator.num_processes,
        )  # fmt: skip
        networks = {"student": self.unet, **self.averages.networks()}
        self.memory = Memory(
            self.accelerator, self.output_dir / CHECKPOINTS, config.checkpoint_limit, networks, self.optimizer,
            self.companions, self.batches, self._identity(),
        )  # fmt: skip
        self.step, self._seconds_before, self._started = 0, 0.0, time.monotonic()
        self.evaluation = self._prepare_evaluation()
        self.watch = Watch(self.accelerator, self.output_dir / "bad-steps", config.max_bad_steps)
        self.meter = Meter(self.accelerator, self.global_batch_size, ends)
        self.stepper = Stepper(
            config, self.accelerator, self.student, self.optimizer, self.companions, self.meter, self.inputs
        )

    # Preparation ----------------------------------------------------------------------------------------------------

    def _check_publishing(self) -> None:
        if self.config.push_to_hub:
            self.publisher.check()
        elif ignored := self.config.hub_options():
            logger.warning("%s: of no effect on the run without `push_to_hub`.", ", ".join(ignored))

    def _prepare_networks(self, unet: Any) -> None:
        config = self.config
        in_parts = is_sharded(self.accelerator)
        unet = lay_out(config, unet.to(self.accelerator.device).train(), in_parts)
        if self.teacher is not None:
            self.teacher.unet = lay_out(config, in_precision(self.teacher.unet, config).to(self.accelerator.device))
            if self.text is not None:
                self.text.forget_network(self.teacher.unet)
                self.text.prepare(self.accelerator.device, getattr(torch, config.teacher_dtype))
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.averages = Averages(config, unet, self.global_batch_size)
        for average in self.averages.asked().values():
            lay_out(config, average, in_parts)
        self.student, self.optimizer = self.accelerator.prepare(unet, make_optimizer(config, unet))
        self.unet = self.accelerator.unwrap_model(self.student)
        for average in self.averages.networks().values():
            shard_like_student(self.accelerator, average)

    def _make_phases(self, ends: tuple[float, float]) -> list[Phase]:
        """The phases, with what is trained in them beside the student."""
        self.companions = make_companions(self.config, self.teacher, ends, self.accelerator)
        beside = {name: companion.module for name, companion in self.companions.items()}
        # Neither compiled graphs nor hooks that gather weights pass derivatives on.
        forward_mode = not (self.config.compile or is_sharded(self.accelerator))
        networks = Networks(self.student, **self.averages.asked(), **beside, forward_mode=forward_mode)
        return make_phases(self.config, self.teacher, self.scheduler, networks, self.accelerator.device)

    # Training -------------------------------------------------------------------------------------------------------

    def train(self) -> Any:
        """Run to the end, save the student to `config.output_dir` and return it as a pipeline.

        The saved weights are the evaluation EMA's.

        Raises:
            `Preempted`: a `SystemExit` with code 75, after SIGTERM or its launcher's end; a checkpoint was written.
            `FloatingPointError`: when too many steps in a row had no finite gradient.
            `CheckpointError`: if the checkpoint to resume from is damaged, or one cannot be written.
        """
        total = self.total_steps
        on_main(self.accelerator, self._clean)
        settle(self.student, self.config.batch_size, self.accelerator.device)
        if self.config.resume is not None:
            self.step, progress = self.memory.resume(self.config.resume)
            self._seconds_before, self.watch.skipped = progress.get("seconds", 0.0), int(progress.get("skipped", 0))
        self._started = time.monotonic()
        self._resume_evaluation()
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
                stop = self._after(record)
                self._report(phase, bar)
                if stop:
                    self._stop()
        self.watch.settle()
        pipeline = self.pipeline()
        on_main(self.accelerator, lambda: self.save(pipeline))
        if self.config.push_to_hub:
            self.push_to_hub()
        end_training(self.accelerator, self.student)
        return pipeline if self.text is None else self.text.ready(pipeline)

    def _after(self, record: StepRecord) -> bool:
        try:
            return self.watch.after(record)
        except FloatingPointError:
            self.save_checkpoint()
            raise

    def _progress_bar(self, total: int) -> tqdm:
        shown: dict[str, Any] = {} if self.accelerator.is_main_process else {"disable": True}
        return tqdm(total=total, initial=self.step, desc="train", smoothing=0, **shown)

    def _stop(self) -> None:
        self.watch.settle()
        folder = self.save_checkpoint()
        end_training(self.accelerator, self.student)
        why = "Its launcher has ended" if is_orphan() else "Asked to end (SIGTERM)"
        message = f"{why}: the run is saved in {folder}, go on with `resume: auto`."
        logger.warning(message)
        raise Preempted(message)

    @property
    def total_steps(self) -> int:
        """Of all phases."""
        return self.phases[-1].start + self.phases[-1].steps

    @property
    def global_batch_size(self) -> int:
        """Images per step, over all devices and micro-steps."""
        config = self.config
        return config.batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def _enter(self, phase: Phase, bar: tqdm) -> None:
        bar.set_description(phase.name)
        self.averages.restart(self.unet, phase is self.phases[-1])

    def advance(self, phase: Phase, batches: Iterator[dict[str, Tensor]]) -> StepRecord:
        """Take one step, with nothing around it."""
        record = self.stepper(phase, self.step, batches)
        self.averages.follow(self.unet, self.step - phase.start, phase.is_method)
        self.step += 1
        return record

    @torch.no_grad()
    def check_teacher(self) -> TeacherReport | None:
        """See that the teacher denoises these images; `None` if nothing is asked of one.

        Raises:
            `ValueError`: if it does not. Where only a conversion asks it, that is a warning.
        """
        config, teacher = self.config, self.teacher
        if teacher is None or not (config.teacher_check and asks_denoiser(config, teacher, self.phases, self.step)):
            return None
        # 64 images of 64 x 64 x 4, and more where they are smaller.
        largest = max(math.prod(shape) for shape in self.dataset.fields.values())
        count = max(2 if self.text else 8, min(256, 2**20 // largest))
        batch = self.stepper.to_device(first_images(self.dataset, count))
        images, conditioning = self.inputs.of_teacher(batch, SampleRandom(batch["seed"], self.accelerator.device))
        return check_teacher(teacher, images, only_warn=config.source != "teacher", **conditioning)

    # What a run leaves behind ---------------------------------------------------------------------------------------

    def _report(self, phase: Phase, bar: tqdm) -> None:
        config, step, done = self.config, self.step, self.step - phase.start
        last = done == phase.steps
        if step % config.logging_steps == 0 or last:
            values = {
                "lr": phase.learning_rate_at(done - 1), "ema_decay": self.averages.decay_at(done - 1),
                "skipped_steps": self.watch.skipped,
            }  # fmt: skip
            values |= phase.describe(done - 1)
            if phase.is_method:
                values["mu"] = self.averages.mu_at(done - 1)
            self.meter.log(phase.name, step, values, bar)
        if config.sample_steps and (step % config.sample_steps == 0 or last):
            draw = drawing(self.pipeline(), config, self.text, self.prompts)
            log_samples(self.accelerator, draw, config, step, self.output_dir / "samples")
            self.meter.restart_clock()
        if config.eval_steps and (step % config.eval_steps == 0 or last) and phase.is_method:
            self.evaluation(self.pipeline(), step)
            self.meter.restart_clock()
        if config.checkpoint_steps and (step % config.checkpoint_steps == 0 or (last and phase is self.phases[-1])):
            self.save_checkpoint()
            is_student = phase.is_method and step < self.total_steps
            if config.push_to_hub and config.hub_strategy == "checkpoint" and is_student:
                self._publish_meanwhile()
            self.meter.restart_clock()

    def pipeline(self) -> Any:
        """The student with its evaluation weights, of the teacher's kind if it takes text. Called on all ranks."""
        unet, scheduler = whole(self.averages.ema.network), ConsistencyScheduler.from_config(self.scheduler.config)
        if self.text is not None:
            return self.text.with_network(unet, scheduler)
        return ConsistencyPipeline(unet, scheduler, self.config.null_class_label)

    def save(self, pipeline: Any) -> None:
        """Save the student, then what is told of it."""
        saving.save_into(pipeline, self.output_dir)
        for old in BESIDE:
            (self.output_dir / old).unlink(missing_ok=True)
        try:
            self.record(pipeline.unet).save(self.output_dir)
            draw = drawing(pipeline, self.config, self.text, self.prompts)
            save_samples(draw, self.config, self.output_dir / SAMPLES)
        except Exception:  # whatever it is, the student is safe and matters more
            logger.warning("The student is saved, but without its record or samples:", exc_info=True)

    def save_checkpoint(self) -> Path:
        """Write everything that the next step depends on, and drop old checkpoints. Called on all ranks.

        Raises:
            `CheckpointError`: if it cannot be written. Older ones stay.
        """
        return self.memory.save(self.step, {"seconds": self.seconds, "skipped": self.watch.skipped})

    @property
    def seconds(self) -> float:
        """The run's time so far, over all resumes."""
        return self._seconds_before + time.monotonic() - self._started

    def _clean(self) -> None:
        """Delete what runs that were killed have left half done."""
        checkpoints.clean(self.output_dir / CHECKPOINTS)
        saving.clean(self.output_dir)

    def record(self, student: Any) -> TrainingRecord:
        """The facts of the run so far. The `student` is the network that is saved, whole on this process."""
        before = next(phase.start for phase in self.phases if phase.is_method)
        return TrainingRecord.of_run(
            self.config, self.teacher, self.accelerator, student, self.dataset_identity,
            conversion_steps=min(self.step, before), steps=max(self.step - before, 0), seconds=round(self.seconds, 1),
            images=self.step * self.global_batch_size, skipped_steps=self.watch.skipped,
        )  # fmt: skip

    def _publish_meanwhile(self) -> None:
        pipeline = self.pipeline()

        def publish() -> None:
            self.save(pipeline)
            self.publisher.push_meanwhile(self.step)

        on_main(self.accelerator, publish)

    @cached_property
    def publisher(self) -> Any:
        """What brings the student to the Hub."""
        from cm_diffusers.hub.publisher import Publisher

        return Publisher(self.config)

    def push_to_hub(self, **options: Any) -> str:
        """Publish the student in `output_dir`. Called on all ranks.

        Args:
            options: of [`~cm_diffusers.hub.push_to_hub`]; the config's otherwise.

        Returns:
            `str`: the address of the commit.

        Raises:
            [`~cm_diffusers.hub.push.PushError`]: if it cannot be pushed; it is saved all the same.
        """
        return str(on_main(self.accelerator, lambda: self.publisher.push(**options)))

    def _prepare_evaluation(self) -> Any:
        """What measures the student while it trains; `None` where nothing does."""
        if not self.config.eval_steps:
            return None
        from cm_diffusers.evaluation.in_loop import TrainingEvaluation

        return TrainingEvaluation(self.config, self.dataset, self.accelerator, self.text, self.record)

    def _resume_evaluation(self) -> None:
        """Forget what a run has measured that went on from here before."""
        from cm_diffusers.evaluation.in_loop import forget_after

        on_main(self.accelerator, lambda: forget_after(self.output_dir, self.step))
        if self.evaluation is not None:
            self.evaluation.start()

    def _identity(self) -> dict[str, Any]:
        """What has to be the same when the run is resumed."""
        identity = {
            "config": self.config.to_dict(), "global_batch_size": self.global_batch_size,
            "precision": precision(self.accelerator), "dataset": self.dataset_identity,
            "scheduler": identify_scheduler(self.scheduler), "teacher": identify_teacher(self.teacher),
        }  # fmt: skip
        if self.batches.is_stream:  # whose parts belong to processes and their workers
            identity["processes"], identity["workers"] = self.accelerator.num_processes, self.batches.num_workers
            identity["batch_size"] = self.config.batch_size
        return identity
