"""Making a student of a teacher: a copy of its network, in a form that one-step generation can be learned in."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from cm_diffusers.network_config import read_preconditioning
from cm_diffusers.preconditioning import STOCK_TIME_SCALE, CMPreconditioning, EDMPreconditioning
from cm_diffusers.schedulers import ConsistencyScheduler


def make_student(
    unet: nn.Module, scheduler: Any, convert: bool, **overrides: Any
) -> tuple[nn.Module, ConsistencyScheduler]:
    """A student's network and scheduler, made from a teacher's.

    - A predicted variance is cut off: consistency functions have none.
    - An EDM network becomes a stock consistency network, which diffusers itself can run: the sign of its output is
      folded into the last layer, and its time embedding is refitted to the other time (exact up to a small error that
      training removes) unless it has that time already.
    - A flow map gets a second time.
    - With `convert`, a VP network that predicts epsilon becomes one that predicts v. Its weights have to be trained
      for that by a [`~cm_diffusers.training.objectives.conversion.ConversionObjective`].

    Args:
        unet (`nn.Module`): the teacher's network; left as it is.
        scheduler (`SchedulerMixin`): the teacher's scheduler.
        convert (`bool`): bound the prediction and adopt stock time.
        overrides: of [`ConsistencyScheduler`].
    """
    preconditioning = read_preconditioning(scheduler)
    student = copy.deepcopy(unet).float().requires_grad_(True)
    cut_variance(student)
    if overrides.get("flow_map"):
        add_second_time(student)
    if needs_conversion(scheduler) and convert:
        overrides["prediction_type"] = "v_prediction"
    becomes_stock = convert and overrides.get("boundary") in (None, "edm") and hasattr(student, "time_embedding")
    if isinstance(preconditioning, EDMPreconditioning) and becomes_stock:
        student_scheduler = ConsistencyScheduler.from_teacher(scheduler, family="consistency", **overrides)
        if preconditioning.time_scale != STOCK_TIME_SCALE:
            refit_time_embedding(student, preconditioning, student_scheduler.preconditioning)
        if preconditioning.sign < 0:
            flip_sign(student)
        return student, student_scheduler
    return student, ConsistencyScheduler.from_teacher(scheduler, **overrides)


def needs_conversion(scheduler: Any) -> bool:
    """Whether the network predicts epsilon, whose error D multiplies by sigma."""
    return getattr(read_preconditioning(scheduler), "prediction_type", None) == "epsilon"


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
def flip_sign(unet: Any) -> None:
    """Negate the network's output, in place."""
    unet.conv_out.weight.neg_()
    unet.conv_out.bias.neg_()


@torch.no_grad()
def refit_time_embedding(unet: Any, old: EDMPreconditioning, new: CMPreconditioning, num_points: int = 4096) -> float:
    """Give the network's first time layer a new time, in place, by linear least squares over the range of sigma.

    Both times are smooth functions of ln sigma, and the layer sees them through sines and cosines of many frequencies,
    so that the new layer reproduces the old one's output almost exactly.

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
    # A ridge keeps the weights small where the features are nearly dependent.
    gram = design.T @ design + 1e-6 * num_points * torch.eye(design.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(gram, design.T @ wanted)
    layer.weight.copy_(fitted[:-1].T)
    layer.bias.copy_(fitted[-1])
    return float((design @ fitted - wanted).std() / wanted.std())
