"""Loading a teacher, and testing on real images that it is read the way it was trained."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor, nn

from cm_diffusers.network_config import CONSISTENCY_SCHEDULERS, describe_network, read_preconditioning
from cm_diffusers.networks import sharing_weights
from cm_diffusers.preconditioning import Denoiser, Preconditioning, VPPreconditioning
from cm_diffusers.training.text_to_image import TextToImage

logger = logging.getLogger(__name__)


@dataclass
class Teacher:
    """A pretrained diffusion model: its network, its scheduler and where it came from.

    `text` is what stands before the network where it makes images of text.
    """

    unet: nn.Module
    scheduler: Any
    name: str
    text: TextToImage | None = None

    @property
    def is_consistency_model(self) -> bool:
        """Whether its network is a consistency function already, which says nothing of the way there."""
        return type(self.scheduler).__name__ in CONSISTENCY_SCHEDULERS

    @property
    def preconditioning(self) -> Preconditioning:
        return read_preconditioning(self.scheduler)

    @property
    def denoiser(self) -> Denoiser:
        """D(x; sigma) ~ E[x0 | x]."""
        return Denoiser(self.unet, self.preconditioning)


def load_teacher(
    source: Any, revision: str | None = None, prediction_type: str | None = None, dtype: torch.dtype = torch.float32
) -> Teacher:
    """A teacher from whatever the user has.

    Args:
        source: a folder or Hub id of a pipeline, a pipeline, or a pair `(unet, scheduler)`. What takes text has to be
            a pipeline, of Stable Diffusion or SDXL.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        prediction_type (`str`, *optional*): replaces the one in the scheduler's config.
        dtype (`torch.dtype`): in which a folder's network is loaded. What stands before it is in float32.

    Returns:
        [`Teacher`]: frozen. It shares the weights of a network that was passed, which stays as it is itself.

    Raises:
        `TypeError`: if `source` is none of these, or its network is none of diffusers', or takes text without one.
        `ValueError`: if it cannot be loaded, or its network or its scheduler is not supported.
    """
    pipeline: Any = None
    unet: Any
    if isinstance(source, tuple | list):
        if len(source) != 2:
            raise TypeError(f"A pair (unet, scheduler) has two parts, got {len(source)}.")
        (unet, scheduler), name = source, type(source[0]).__name__
    elif isinstance(source, str) or hasattr(source, "__fspath__"):
        pipeline = _load_pipeline(str(source), revision, dtype)
        unet, scheduler, name = pipeline.unet, pipeline.scheduler, str(source)
    elif hasattr(source, "unet") and hasattr(source, "scheduler"):
        pipeline, unet, scheduler, name = source, source.unet, source.scheduler, type(source).__name__
    else:
        raise TypeError(
            f"`teacher` must be a path, a Hub id, a pipeline or (unet, scheduler), got {type(source).__name__}."
        )
    unet = getattr(unet, "_orig_mod", unet)  # of `torch.compile`
    if getattr(getattr(scheduler, "config", None), "flow_map", False):
        raise ValueError(
            "A flow map cannot be a teacher: it says where a jump ends, and not only which way the ODE goes."
        )
    check_network(unet)
    text = None
    if unet.config.get("cross_attention_dim") is not None:
        if pipeline is None:
            raise TypeError(f"{type(unet).__name__} takes text embeddings: pass the whole pipeline.")
        text = TextToImage(pipeline)
    elif encoder := {"vae", "vqvae"} & getattr(pipeline, "components", {}).keys():
        raise ValueError(
            f"The UNet of {name} makes latents, which its {encoder.pop()} turns into images: latents are supported "
            "of pipelines from text to images alone."
        )
    if prediction_type is not None:
        if "prediction_type" not in scheduler.config:
            raise ValueError(f"{type(scheduler).__name__} knows one prediction type: leave it out.")
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type)
    read_preconditioning(scheduler)
    return Teacher(sharing_weights(unet).requires_grad_(False).eval(), scheduler, name, text)


def check_network(unet: Any) -> None:
    """See that a network is one that is called as those of diffusers are, and saved as they are.

    Raises:
        `TypeError`: if it is of another kind.
        `ValueError`: if it takes or gives what no image is made of.
    """
    kind = type(unet)
    if not isinstance(unet, ModelMixin):
        raise TypeError(f"The network must be a UNet of diffusers, got {kind.__name__}; if that wraps one, pass it.")
    if getattr(diffusers, kind.__name__, None) is not kind:
        logger.warning("%s is no class of diffusers: its student is saved, but nothing will load it.", kind.__name__)
    config = unet.config
    if config.get("time_embedding_type") == "learned":
        raise ValueError("`time_embedding_type='learned'` is not supported: such a network knows whole times alone.")
    if config.get("class_embed_type") and not config.get("num_class_embeds") and isinstance(unet, UNet2DModel):
        raise ValueError(
            f"`class_embed_type={config.class_embed_type!r}` is supported with `num_class_embeds` alone: the network "
            "is told something else than a class."
        )
    taken, given = config.get("in_channels"), config.get("out_channels")
    if given not in (taken, 2 * (taken or 0)):
        raise ValueError(f"The network maps {taken} channels to {given}; expected {taken} or twice that.")


def identify_teacher(teacher: Teacher | None) -> dict[str, Any] | None:
    """What tells a teacher from another: how its network is read, and a digest of some of every weight's values."""
    from cm_diffusers.evaluation.digests import weights_digest

    if teacher is None:
        return None
    some = {
        f"{name} {tuple(weight.shape)}": weight.flatten()[:: max(1, weight.numel() // 8)][:8]
        for name, weight in teacher.unet.state_dict().items()
    }
    fields = describe_network({**teacher.scheduler.config, "_class_name": type(teacher.scheduler).__name__})
    return {"scheduler": json.loads(json.dumps(fields)), "weights": weights_digest(some)}


def takes_text(source: Any, revision: str | None = None) -> bool:
    """Whether what `load_teacher` takes makes images of text; of a folder or Hub id, its index alone is read.

    Raises:
        `ValueError`: if that cannot be read.
    """
    if isinstance(source, str) or hasattr(source, "__fspath__"):
        from diffusers import DiffusionPipeline

        try:
            return "text_encoder" in DiffusionPipeline.load_config(str(source), revision=revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot load a pipeline from {str(source)!r}: {error}") from error
    return hasattr(source, "text_encoder")


def _load_pipeline(path: str, revision: str | None, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    from cm_diffusers.pipelines import ConsistencyPipeline
    from cm_diffusers.pipelines.weights import load_weights

    try:
        config = DiffusionPipeline.load_config(path, revision=revision)
        ours = config.get("_class_name") == ConsistencyPipeline.__name__
        loader = ConsistencyPipeline if ours else DiffusionPipeline
        if "cm_diffusers" in str(config.get("scheduler")) and not Path(path).is_dir():
            path, revision = ConsistencyPipeline.download(path, revision=revision), None  # diffusers' own refuses it
        precision = {"unet": dtype, "default": torch.float32}
        pipeline = load_weights(loader, path, revision=revision, use_safetensors=True, dtype=precision)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load a pipeline with safetensors weights from {path!r}: {error}") from error
    if not hasattr(pipeline, "unet"):
        raise ValueError(f"The pipeline {type(pipeline).__name__} in {path!r} has no UNet.")
    return pipeline


# The teacher check --------------------------------------------------------------------------------------------------

# The middle of the range, where any denoiser worth distilling is good: an epsilon network is noisy far above, and all
# networks are alike far below.
CHECKED_SIGMAS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
# A wrong conditioning must be better by so much before it is believed.
MARGIN = 0.97
# The linear denoiser is the best there is for white noise as data; real images allow much less.
MOST_EXCESS = 1.05
FACTORS = (0.6, 0.75, 1.35, 1.7)


@dataclass
class TeacherReport:
    """What the check measured.

    Args:
        sigmas (`list[float]`): noise levels.
        errors (`list[float]`): mean squared error of D against the images at each.
        bounds (`list[float]`): what the best linear denoiser of white data of the same variance would leave.
    """

    sigmas: list[float]
    errors: list[float]
    bounds: list[float]

    def table(self) -> str:
        rows = zip(self.sigmas, self.errors, self.bounds, strict=True)
        return "\n".join(f"  sigma {s:6.3f}   error {e:9.5f}   linear denoiser {b:9.5f}" for s, e, b in rows)

    @property
    def excess(self) -> float:
        """Median over sigma of error / bound: below 1 for a denoiser."""
        ratios = [e / bound if bound else math.inf for e, bound in zip(self.errors, self.bounds, strict=True)]
        return sorted(ratios)[len(ratios) // 2] if all(map(math.isfinite, ratios)) else math.inf

    @property
    def typical_error(self) -> float:
        """Geometric mean over sigma of the errors."""
        if not all(map(math.isfinite, self.errors)):
            return math.inf
        return math.exp(sum(math.log(max(error, 1e-12)) for error in self.errors) / len(self.errors))


@torch.no_grad()
def measure_teacher(teacher: Denoiser, images: Tensor, factor: float = 1.0, **conditioning: Any) -> TeacherReport:
    """D's error on real images over the noise level.

    Args:
        teacher ([`~cm_diffusers.preconditioning.Denoiser`]): D.
        images (`Tensor` of shape `(batch, channels, height, width)`): real images in the teacher's range.
        factor (`float`): D is told this multiple of the true noise level.
    """
    generator = torch.Generator().manual_seed(0)
    base = teacher.preconditioning
    assert isinstance(base, Preconditioning)
    low, high = base.sigma_range
    sigmas = [sigma for sigma in CHECKED_SIGMAS if low <= sigma * min(FACTORS) and sigma * max(FACTORS) <= high]
    told = Denoiser(teacher.network, _ToldSigma(base, factor))
    variance = float(images.var())
    errors, bounds = [], []
    for sigma in sigmas:
        sample = images + sigma * torch.randn(images.shape, generator=generator).to(images)
        errors.append(float((told(sample, sigma, **conditioning) - images).square().mean()))
        bounds.append(variance * sigma**2 / (variance + sigma**2))
    return TeacherReport(sigmas, errors, bounds)


@dataclass(frozen=True)
class _ToldSigma:
    """A family whose network is told a multiple of the true noise level."""

    base: Preconditioning
    factor: float

    def scalings(self, sigma: Tensor) -> Any:
        return self.base.scalings(sigma)._replace(c_noise=self.base.c_noise(sigma * self.factor).to(torch.float32))


def check_teacher(teacher: Teacher, images: Tensor, only_warn: bool = False, **conditioning: Any) -> TeacherReport:
    """Refuse a teacher whose D is not a denoiser on real images.

    Args:
        only_warn (`bool`): say what is wrong, and go on.

    Raises:
        `ValueError`: naming what is probably wrong: the prediction type, the noise schedule, or the images.
    """
    report = measure_teacher(teacher.denoiser, images, **conditioning)
    if not report.sigmas:
        logger.warning("The teacher's range of sigma holds none of the levels at which teachers are checked.")
        return report
    found = (
        f"The teacher {teacher.name} does not denoise these images as its scheduler's config says.\n{report.table()}\n"
    )
    if not report.excess < MOST_EXCESS:
        return _object(found + _explain(teacher, images, **conditioning), report, only_warn)
    told = {factor: measure_teacher(teacher.denoiser, images, factor, **conditioning) for factor in FACTORS}
    best = min(FACTORS, key=lambda factor: told[factor].typical_error)
    if told[best].typical_error < MARGIN * report.typical_error:
        better = (
            f"It denoises better when told {best:g} times the true noise level, so the config's noise schedule (its "
            "betas or its time) is not the one it was trained with. Pass (unet, scheduler) with the right one, or "
            "switch the check off with `teacher_check=False`."
        )
        return _object(found + better, report, only_warn)
    logger.info("Teacher check passed: D's error on real images\n%s", report.table())
    return report


def _object(message: str, report: TeacherReport, only_warn: bool) -> TeacherReport:
    if not only_warn:
        raise ValueError(message)
    logger.warning(message)
    return report


def _explain(teacher: Teacher, images: Tensor, **conditioning: Any) -> str:
    base = teacher.preconditioning
    if isinstance(base, VPPreconditioning):
        for other in ("epsilon", "v_prediction", "sample"):
            if other == base.prediction_type:
                continue
            guess = dataclasses.replace(base, prediction_type=other)
            if measure_teacher(Denoiser(teacher.unet, guess), images, **conditioning).excess < MOST_EXCESS:
                return (
                    f"It does when read as `prediction_type={other!r}`; the config says {base.prediction_type!r}. "
                    f"Set `teacher_prediction_type={other!r}`."
                )
    low, high = float(images.min()), float(images.max())
    return (
        f"No other prediction type fits. Check that the scheduler belongs to this network, and that images in "
        f"[{low:.2f}, {high:.2f}] of this kind are what it was trained on; `teacher_check=False` skips the check."
    )
