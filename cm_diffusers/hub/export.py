"""Students for those who do not have this package: stock diffusers pipelines, and ONNX."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, DDPMPipeline
from torch import Tensor, nn

from cm_diffusers.network_config import height_and_width
from cm_diffusers.networks import network_output
from cm_diffusers.pipelines import ConsistencyPipeline

ONNX_FILE = "model.onnx"


def export_to_diffusers(pipeline: ConsistencyPipeline, folder: str | Path) -> type:
    """Write a student as a pipeline of stock diffusers, if there is one that computes the same.

    - EDM and consistency students become a `ConsistencyModelPipeline`, with the same images to the bit. In several
      steps it does not know levels stored in `few_step_sigmas`: pass it
      [`~cm_diffusers.ConsistencyScheduler.stock_timesteps`].
    - Variance-preserving students with `boundary="lcm"` become a `DDPMPipeline` under `LCMScheduler`, with the same
      images up to rounding. In several steps it takes those of `original_inference_steps`, see
      [`~cm_diffusers.ConsistencyScheduler.to_lcm`].

    Args:
        pipeline ([`ConsistencyPipeline`]): the student.
        folder (`str` or `Path`): where the stock pipeline goes.

    Returns:
        `type`: the class that loads it.

    Raises:
        `ValueError`: if no stock pipeline computes the same, saying why.
    """
    scheduler = pipeline.scheduler
    if pipeline.is_stock:
        pipeline.save_pretrained(folder)
        _drop_own_keys(Path(folder))
        return ConsistencyModelPipeline
    reasons = ["its `sample_size` is not one number, as in ConsistencyModelPipeline"] if scheduler.is_stock else []
    try:
        lcm = scheduler.to_lcm()
    except ValueError as error:
        reasons.append(str(error).rstrip("."))
    if pipeline.unet.config.num_class_embeds is not None:
        reasons.append("DDPMPipeline passes no class labels")
    if tuple(scheduler.config.image_range) != (-1.0, 1.0):
        reasons.append(f"its images lie in {list(scheduler.config.image_range)}, and those of stock ones in [-1, 1]")
    if reasons:
        raise ValueError(
            f"No stock pipeline computes this student: {'; '.join(reasons)}. Stock are students of EDM and "
            "consistency networks, and unconditional variance-preserving ones trained with `boundary: lcm`; none of "
            "continuous levels."
        )
    pipeline.unet.register_to_config(_name_or_path="")  # a folder of this machine
    DDPMPipeline(pipeline.unet, lcm).save_pretrained(folder)
    return DDPMPipeline


def _drop_own_keys(folder: Path) -> None:
    """Leave in the scheduler's config what its stock class knows, so that stock diffusers has nothing to warn of."""
    from diffusers import CMStochasticIterativeScheduler

    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    known = {"_class_name", "_diffusers_version", *CMStochasticIterativeScheduler().config}
    kept = {name: value for name, value in config.items() if name in known}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


class OneStep(nn.Module):
    """A student's one step as a network: from unit-variance noise to images in [0, 1].

    Args:
        pipeline ([`ConsistencyPipeline`]): the student.
    """

    def __init__(self, pipeline: ConsistencyPipeline) -> None:
        super().__init__()
        self.unet = copy.deepcopy(pipeline.unet).float().eval()
        config = pipeline.scheduler.config
        (self.low, self.high), first = config.image_range, torch.tensor([config.sigma_max])
        scheduler, self.flow_map = pipeline.scheduler, config.flow_map
        function = scheduler.preconditioning if self.flow_map else scheduler.boundary
        # Of one noise level they are numbers.
        self.scalings = function.scalings(first)
        self.noise_std = scheduler.first_std(config.sigma_max) * float(scheduler.state_scale(first))
        self.target_timestep = scheduler.preconditioning.scalings(torch.tensor([config.sigma_min])).c_noise
        self.rest = config.sigma_min / config.sigma_max if self.flow_map else 0.0

    def forward(self, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Images of the shape of `noise`, `(batch, channels, height, width)`; labels of shape `(batch,)`."""
        conditioning: dict[str, Any] = {} if class_labels is None else {"class_labels": class_labels}
        if self.flow_map:
            conditioning = {"class_labels": self.target_timestep.expand(noise.shape[0])}
        c_skip, c_out, input_scale, c_noise = self.scalings
        sample = noise * self.noise_std
        output = network_output(self.unet, sample / input_scale, c_noise.expand(noise.shape[0]), **conditioning)
        images = (c_skip * sample + c_out * output).clamp(self.low, self.high)
        images = images + self.rest * (sample - images)
        return ((images - self.low) / (self.high - self.low)).clamp(0, 1)


@torch.no_grad()
def export_to_onnx(pipeline: ConsistencyPipeline, folder: str | Path) -> Path:
    """Write a student's one step as `model.onnx`, for batches of any size.

    Its inputs are `noise`, of unit variance, and `class_labels` (int64) for class-conditional students; its output is
    `images`, in [0, 1].

    Args:
        pipeline ([`ConsistencyPipeline`]): the student, on any device and in any precision; exported in float32.
        folder (`str` or `Path`): where it goes.

    Raises:
        `ImportError`: without onnx and onnxscript (`pip install 'cm_diffusers[onnx]'`).
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Export to ONNX needs `pip install 'cm_diffusers[onnx]'`.") from error
    network = OneStep(pipeline).cpu()
    config = pipeline.unet.config
    inputs = [torch.randn(2, config.in_channels, *height_and_width(config.sample_size))]
    names = ["noise"]
    if config.num_class_embeds is not None:
        inputs.append(torch.zeros(2, dtype=torch.long))
        names.append("class_labels")
    batch = torch.export.Dim("batch")
    file = Path(folder) / ONNX_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        network, tuple(inputs), str(file), input_names=names, output_names=["images"], dynamo=True, verbose=False,
        dynamic_shapes=tuple({0: batch} for _ in inputs), external_data=False,
    )  # fmt: skip
    return file
