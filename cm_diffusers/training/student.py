"""Making a student of a teacher: a copy of its network, in a form that one-step generation can be learned in."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from cm_diffusers.network_config import read_preconditioning
from cm_diffusers.networks import GUIDANCE_CHANNELS, frequencies
from cm_diffusers.preconditioning import (
    STOCK_TIME_SCALE,
    CMPreconditioning,
    EDMPreconditioning,
    FlowPreconditioning,
    Preconditioning,
    VPPreconditioning,
)
from cm_diffusers.schedulers import ConsistencyScheduler

logger = logging.getLogger(__name__)

# What the time of a student with a smooth one ends at, where its teacher's ends at 1,000.
SMOOTH_TIME = 10.0
# Of the fit of a first time layer to a time that is as fine as the old, and to a smooth one, whose features hardly
# differ: there, a smaller ridge buys no better fit, but weights of 50, whose sums have no digits left in bfloat16.
RIDGE, SMOOTH_RIDGE = 1e-6, 1e-3


def make_student(
    unet: nn.Module, scheduler: Any, convert: bool, smooth: bool = False, student: Any = None, **overrides: Any
) -> tuple[nn.Module, ConsistencyScheduler]:
    """A student's network and scheduler, made from a teacher's.

    - A predicted variance is cut off: consistency functions have none.
    - An EDM network becomes a stock consistency network, which diffusers itself can run: the sign of its output is
      folded into the last layer, and its time embedding is refitted to the other time (exact up to a small error that
      training removes) unless it has that time already.
    - A flow map gets a second time.
    - With `convert`, a VP network that predicts epsilon becomes one that predicts v. Its weights have to be trained
      for that by a [`~cm_diffusers.training.objectives.conversion.ConversionObjective`].
    - With `smooth`, too, its time becomes one that it can be differentiated by, see [`smooth_time`]. That, too, needs
      training.

    Args:
        unet (`nn.Module`): the teacher's network; left as it is.
        scheduler (`SchedulerMixin`): the teacher's scheduler.
        convert (`bool`): bound the prediction and adopt another time.
        smooth (`bool`): the student will be differentiated by its time.
        student (`nn.Module`, *optional*): the network to begin with; a copy of the teacher's in float32 when `None`.
        overrides: of [`ConsistencyScheduler`].
    """
    preconditioning = read_preconditioning(scheduler)
    if student is None:
        student = copy.deepcopy(unet).float().requires_grad_(True)
        for weight in frequencies(student):
            weight.requires_grad_(False)
    cut_variance(student)
    if overrides.get("flow_map"):
        add_second_time(student)
    if getattr(preconditioning, "prediction_type", None) == "epsilon" and convert:
        overrides["prediction_type"] = "v_prediction"
    if smooth and convert:
        return student, _with_smooth_time(student, scheduler, preconditioning, overrides)
    if smooth and smooth_time(preconditioning).get("time_scale") != preconditioning.denoising.time_scale:
        logger.warning("Without a conversion the student keeps a time that is too rough to be differentiated.")
    becomes_stock = convert and overrides.get("boundary") in (None, "edm") and hasattr(student, "time_embedding")
    if isinstance(preconditioning, EDMPreconditioning) and becomes_stock:
        student_scheduler = ConsistencyScheduler.from_teacher(scheduler, family="consistency", **overrides)
        if preconditioning.time_scale != STOCK_TIME_SCALE:
            refit_time_embedding(student, preconditioning, student_scheduler.preconditioning)
        if preconditioning.sign < 0:
            flip_sign(student)
        return student, student_scheduler
    return student, ConsistencyScheduler.from_teacher(scheduler, **overrides)


def needs_conversion(teacher_scheduler: Any, student_scheduler: ConsistencyScheduler) -> bool:
    """Whether a student has to learn to say what its teacher says.

    It has if it predicts something else (v, as D multiplies an error of epsilon by sigma), or sees time less finely.
    """
    old, new = read_preconditioning(teacher_scheduler).denoising, student_scheduler.preconditioning.denoising
    kinds = [getattr(family, "prediction_type", None) for family in (old, new)]
    return kinds[0] != kinds[1] or new.time_scale < old.time_scale


def smooth_time(family: Preconditioning) -> dict[str, Any]:
    """The fields of a scheduler by which a family's networks have a time that hardly turns while sigma doubles.

    Networks see time through sines of up to one radian per unit. Where time goes to 1,000, or is 250 * ln(sigma), they
    answer neighbouring noise levels alike only on average: derivatives by sigma are ten times the differences that
    they stand for, and continuous-time methods turn students into noise (Lu & Song 2024, section 4.1).
    """
    if isinstance(family, EDMPreconditioning | CMPreconditioning):
        return {"family": "edm", "time_scale": 1.0}
    if isinstance(family, VPPreconditioning):
        return {"time_scale": SMOOTH_TIME / len(family.alphas_cumprod)}
    if isinstance(family, FlowPreconditioning):
        return {"time_scale": SMOOTH_TIME / family.num_train_timesteps}
    return {}


def _with_smooth_time(
    student: Any, scheduler: Any, family: Preconditioning, overrides: dict[str, Any]
) -> ConsistencyScheduler:
    """The student's scheduler, and in place its first time layer, as near to the old one as smooth times can be."""
    positional = getattr(student.config, "time_embedding_type", None) == "positional"
    fields = smooth_time(family) if positional else {}
    if not fields:
        logger.warning("The network's own embedding of time may be too rough to be differentiated.")
    found = ConsistencyScheduler.from_teacher(scheduler, **{**overrides, **fields})
    if fields and found.preconditioning.time_scale != family.denoising.time_scale:
        refit_time_embedding(student, family, found.preconditioning, SMOOTH_RIDGE)
    return found


@torch.no_grad()
def cut_variance(unet: Any) -> None:
    """Remove the predicted variance of a network with twice as many channels out as in, in place."""
    channels = unet.config.in_channels
    if unet.config.out_channels != 2 * channels:
        return
    last = unet.conv_out
    conv = nn.Conv2d(last.in_channels, channels, last.kernel_size, last.stride, last.padding).to(last.weight)
    conv.weight.copy_(last.weight[:channels])
    conv.bias.copy_(last.bias[:channels])  # type: ignore[union-attr]
    unet.conv_out = conv
    unet.register_to_config(out_channels=channels)


@torch.no_grad()
def add_second_time(unet: Any) -> None:
    """Let a network be told a second time as `class_labels`, in place; at first it does not listen.

    It stays a stock diffusers class, whose own `class_embed_type="timestep"` this is.

    Raises:
        `ValueError`: for networks that have another use of `class_labels`, or no such type.
    """
    config = unet.config
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise ValueError(
            "A flow map's second time goes in as `class_labels`, and this network is class-conditional: diffusers' "
            "UNets cannot take both. Train a method without `flow_map`."
        )
    if config.time_embedding_type != "positional":
        raise ValueError(
            f"A flow map needs a network with a positional time embedding, not {config.time_embedding_type!r}."
        )
    first, second = unet.time_embedding.linear_1, unet.time_embedding.linear_2
    embedding = TimestepEmbedding(first.in_features, second.out_features).to(first.weight)
    embedding.linear_2.weight.zero_()
    embedding.linear_2.bias.zero_()
    unet.class_embedding = embedding
    unet.register_to_config(class_embed_type="timestep")


@torch.no_grad()
def add_guidance(unet: Any) -> None:
    """Let a text-to-image network be told its guidance scale, in place; at first it does not listen.

    It stays a stock diffusers class, whose own `time_cond_proj_dim` this is.
    """
    first = unet.time_embedding.linear_1
    projection = nn.Linear(GUIDANCE_CHANNELS, first.in_features, bias=False).to(first.weight)
    projection.weight.zero_()
    unet.time_embedding.cond_proj = projection
    unet.register_to_config(time_cond_proj_dim=GUIDANCE_CHANNELS)


@torch.no_grad()
def flip_sign(unet: Any) -> None:
    """Negate the network's output, in place."""
    unet.conv_out.weight.neg_()
    unet.conv_out.bias.neg_()


@torch.no_grad()
def refit_time_embedding(
    unet: Any, old: Preconditioning, new: Preconditioning, ridge: float = RIDGE, num_points: int = 4096
) -> float:
    """Give the network's first time layer a new time, in place, by linear least squares over the range of sigma.

    Both times are smooth functions of ln sigma, and the layer sees them through sines and cosines of many frequencies,
    so that the new layer reproduces the old one's output almost exactly; as far as the new time is fine enough.

    Args:
        old, new ([`~cm_diffusers.preconditioning.Preconditioning`]): what tells the network its time, until now and
            from now on.
        ridge (`float`): keeps the weights small where the features are nearly dependent.
        num_points (`int`): noise levels of the fit.

    Returns:
        `float`: root mean square error of the layer's output, relative to its standard deviation.
    """
    sigma = torch.linspace(
        math.log(new.sigma_range[0]), math.log(new.sigma_range[1]), num_points, dtype=torch.float64
    ).exp()
    layer = unet.time_embedding.linear_1
    device = layer.weight.device

    def features(times: Tensor) -> Tensor:
        embedded = unet.time_proj(times.to(device, torch.float32)).double().cpu()
        return torch.cat([embedded, torch.ones(num_points, 1, dtype=torch.float64)], dim=1)

    weight = torch.cat([layer.weight, layer.bias[:, None]], dim=1).double().cpu()
    wanted = features(old.c_noise(sigma)) @ weight.T
    design = features(new.c_noise(sigma))
    gram = design.T @ design + ridge * num_points * torch.eye(design.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(gram, design.T @ wanted)
    layer.weight.copy_(fitted[:-1].T)
    layer.bias.copy_(fitted[-1])
    return float((design @ fitted - wanted).std() / wanted.std())
