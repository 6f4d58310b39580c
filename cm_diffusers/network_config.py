"""What a scheduler's config says of its network: its family, and the preconditioning that makes it a denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cm_diffusers.preconditioning import (
    CMPreconditioning,
    EDMPreconditioning,
    FlowPreconditioning,
    Preconditioning,
    VEPreconditioning,
    VPPreconditioning,
)

VP_SCHEDULERS = frozenset(
    """DDPMScheduler DDPMParallelScheduler DDIMScheduler DDIMParallelScheduler PNDMScheduler LMSDiscreteScheduler
    EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler KDPM2DiscreteScheduler
    KDPM2AncestralDiscreteScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler DPMSolverSDEScheduler
    DEISMultistepScheduler UniPCMultistepScheduler SASolverScheduler LCMScheduler TCDScheduler""".split()
)
EDM_SCHEDULERS = frozenset({"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"})
CONSISTENCY_SCHEDULERS = frozenset({"CMStochasticIterativeScheduler", "ConsistencyScheduler"})
SCALED_TIME_SCHEDULER = "ScaledTimeEDMScheduler"  # this package's own, see `schedulers.scheduling_edm`
FLOW_SCHEDULERS = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})
SUPPORTED_SCHEDULERS = (
    VP_SCHEDULERS
    | EDM_SCHEDULERS
    | FLOW_SCHEDULERS
    | CONSISTENCY_SCHEDULERS
    | {"ScoreSdeVeScheduler", SCALED_TIME_SCHEDULER}
)


def height_and_width(sample_size: int | Sequence[int]) -> tuple[int, int]:
    """The size of a network's images in pixels, from the `sample_size` of its config."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return height, width


def check_size(network_config: Any, height: int, width: int) -> None:
    """See that a network can halve images of this size, in pixels, as often as it does.

    Raises:
        `ValueError`: if it cannot.
    """
    multiple = 2 ** (len(network_config.get("down_block_types") or [None]) - 1)
    if height % multiple or width % multiple:
        raise ValueError(f"Height and width must be multiples of {multiple} for this model, got {height} x {width}.")


def class_labels(network_config: Any, null_class_label: int | None = None) -> list[int]:
    """The labels of a network's classes, without the one that stands for 'no class'; none if it is unconditional."""
    return [label for label in range(network_config.num_class_embeds or 0) if label != null_class_label]


def describe_network(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of [`ConsistencyScheduler`]'s config that describe a network, read from any diffusers scheduler's.

    Args:
        scheduler_config (`Mapping`): the config of a diffusers scheduler, with its `_class_name`.

    Raises:
        `ValueError`: if the scheduler or its prediction type is not supported.
    """
    config = dict(scheduler_config)
    name = config.get("_class_name")
    prediction_type = config.get("prediction_type")
    if name not in SUPPORTED_SCHEDULERS:
        raise ValueError(f"Scheduler {name!r} is not supported. Supported: {', '.join(sorted(SUPPORTED_SCHEDULERS))}.")
    if name == "ConsistencyScheduler":
        return {key: config[key] for key in NETWORK_FIELDS if key in config}
    if config.get("use_flow_sigmas"):
        _check_prediction_type(f"{name} with `use_flow_sigmas=True`", prediction_type, ("flow_prediction",))
    if name in FLOW_SCHEDULERS or prediction_type == "flow_prediction":
        if config.get("invert_sigmas"):
            raise ValueError("Flow-matching schedulers with `invert_sigmas=True` are not supported.")
        return {"family": "flow", "num_train_timesteps": config.get("num_train_timesteps", 1000)}
    if name in VP_SCHEDULERS:
        return _describe_vp(name, config)
    if name in EDM_SCHEDULERS or name == SCALED_TIME_SCHEDULER:
        _check_prediction_type(name, prediction_type, ("epsilon", "v_prediction"))
        return {
            "family": "edm",
            "prediction_type": prediction_type,
            **_pick(config, "sigma_min sigma_max sigma_data rho time_scale"),
        }
    if name == "CMStochasticIterativeScheduler":
        return {"family": "consistency", **_pick(config, "num_train_timesteps sigma_min sigma_max sigma_data rho")}
    return {"family": "ve", "image_range": [0.0, 1.0], **_pick(config, "sigma_min sigma_max")}


NETWORK_FIELDS = (
    "family prediction_type num_train_timesteps sigma_min sigma_max sigma_data rho time_scale beta_start beta_end "
    "beta_schedule trained_betas rescale_betas_zero_snr image_range"
).split()
BETA_FIELDS = "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr"


def _pick(config: Mapping[str, Any], names: str) -> dict[str, Any]:
    return {name: config[name] for name in names.split() if name in config}


def _check_prediction_type(scheduler: str, found: Any, supported: tuple[str, ...]) -> None:
    if found not in supported:
        raise ValueError(
            f"{scheduler} has `prediction_type={found!r}`, which is not supported. Supported: {', '.join(supported)}."
        )


def _describe_vp(name: str, config: dict[str, Any]) -> dict[str, Any]:
    import diffusers

    prediction_type = config.get("prediction_type", "epsilon")
    _check_prediction_type(name, prediction_type, ("epsilon", "v_prediction", "sample"))
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"{name} with `timestep_type={config['timestep_type']!r}` is not supported, only 'discrete'.")
    fields = {"family": "vp", "prediction_type": prediction_type, **_pick(config, BETA_FIELDS)}
    if hasattr(fields.get("trained_betas"), "tolist"):
        fields["trained_betas"] = fields["trained_betas"].tolist()
    # Some classes know beta schedules that DDPMScheduler lacks: ask the class itself, and keep its betas.
    try:
        _stock_scheduler(fields)
    except NotImplementedError:
        betas = getattr(diffusers, name).from_config(config).betas
        fields.update(trained_betas=betas.tolist(), rescale_betas_zero_snr=False)
    return fields


def _stock_scheduler(fields: Mapping[str, Any]) -> Any:
    """diffusers' own reading of the beta fields."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(**_pick(fields, BETA_FIELDS))


def preconditioning_from_config(fields: Mapping[str, Any]) -> Preconditioning:
    """The [`Preconditioning`] that a [`ConsistencyScheduler`]'s config, or [`describe_network`], names."""
    family = fields["family"]
    sigma_data, time_scale = fields.get("sigma_data") or 0.5, fields.get("time_scale") or 1.0
    if family == "vp":
        prediction_type = fields.get("prediction_type") or "epsilon"
        _check_prediction_type("A network of family 'vp'", prediction_type, ("epsilon", "v_prediction", "sample"))
        return VPPreconditioning(_stock_scheduler(fields).alphas_cumprod, prediction_type, sigma_data, time_scale)
    if family == "flow":
        return FlowPreconditioning(fields.get("num_train_timesteps") or 1000, sigma_data, time_scale)
    sigma_range = (fields["sigma_min"], fields["sigma_max"])
    if family == "edm":
        prediction_type = fields.get("prediction_type") or "epsilon"
        _check_prediction_type("A network of family 'edm'", prediction_type, ("epsilon", "v_prediction"))
        sign = -1.0 if prediction_type == "v_prediction" else 1.0
        return EDMPreconditioning(sigma_range, sigma_data, sign, time_scale)
    if family == "consistency":
        return CMPreconditioning(sigma_range, sigma_data)
    if family == "ve":
        return VEPreconditioning(sigma_range, tuple(fields.get("image_range") or (0.0, 1.0)), sigma_data)
    raise ValueError(f"`family` must be one of vp, edm, consistency, flow, ve, got {family!r}.")


def read_preconditioning(scheduler: Any) -> Preconditioning:
    """The [`Preconditioning`] of the network that a diffusers scheduler (or its config) was made for."""
    config = getattr(scheduler, "config", scheduler)
    if not isinstance(config, Mapping):
        raise TypeError(f"`scheduler` must be a diffusers scheduler or its config, got {type(scheduler).__name__}.")
    if "_class_name" not in config and hasattr(scheduler, "config"):
        config = {**config, "_class_name": type(scheduler).__name__}
    return preconditioning_from_config(describe_network(config))
