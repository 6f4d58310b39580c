"""Caches that hold what text-to-image networks are shown and told: what they are made from, and for which runs.

A row has the mean and the standard deviation of the VAE's posterior (`latent_mean`, `latent_std`), the embeddings of a
caption (`prompt_embeds`, and `pooled_prompt_embeds` for SDXL), and the `sizes` that SDXL is told.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from cm_diffusers.training.config import ConsistencyConfig
from cm_diffusers.training.images import ImageSpec, ImageTransform
from cm_diffusers.training.latent_cache import MANIFEST, PLAN, CachedLatents
from cm_diffusers.training.record import public_name
from cm_diffusers.training.resuming import compare
from cm_diffusers.training.runtime import in_turns, on_main
from cm_diffusers.training.text_to_image import TextToImage

logger = logging.getLogger(__name__)

# Options that say how a picture is read. They are a cache's for good.
OF_PICTURES = ("image_column", "caption_column", "center_crop", "random_flip")
# Options that say which part of a dataset is read, or what is read of its pictures. A cache has neither.
WITHOUT_MEANING = ("dataset_name", "dataset_split", "data_files", "streaming", "eval_steps")


def origin(
    config: ConsistencyConfig, teacher: str, text: TextToImage, transform: ImageTransform,
    dataset_identity: dict[str, Any], dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """What the rows of a cache are computed from.

    Args:
        config ([`ConsistencyConfig`]): says how.
        teacher (`str`): its name.
        text ([`~cm_diffusers.training.text_to_image.TextToImage`]): its encoders.
        transform ([`~cm_diffusers.training.images.ImageTransform`]): of the dataset's items.
        dataset_identity (`dict`): of the dataset.
        dtype (`str`): in which rows are stored.
    """
    columns = {"image_column": transform.image_column, "caption_column": transform.caption_column}
    return {
        "teacher": public_name(teacher), "encoders": text.digests(),
        "dataset": {"name": public_name(config.dataset), **dataset_identity},
        "pictures": {**dataclasses.asdict(transform.spec), **columns}, "seed": config.seed,
        "dtypes": {"encoders": config.teacher_dtype, "rows": dtype},
    }  # fmt: skip


def is_cache(path: str) -> bool:
    """Whether this is the folder of a cache, finished or not."""
    folder = Path(path).expanduser()
    return any((folder / name).is_file() for name in (MANIFEST, PLAN))


def open_cache(path: str, processes: Any) -> CachedLatents:
    """The cache in a folder. All of it is read once, by all processes together, to see that it is whole.

    Args:
        path (`str`): of the folder.
        processes (`Accelerator` or `PartialState`): all of which call this.

    Raises:
        `ValueError`: if it is not finished.
        [`~cm_diffusers.training.latent_cache.CacheError`]: if it is not what was written.
    """
    folder = Path(path).expanduser()
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"The cache {folder} is not finished: go on with `cm-diffusers precompute`.")

    on_main(processes, lambda: CachedLatents(folder, verify=False).fields)
    cache = CachedLatents(folder, verify=False)
    in_turns(processes, cache.num_shards, cache.check_shard, "cache")
    return cache


def check_cache(
    config: ConsistencyConfig, cache: CachedLatents, spec: ImageSpec, text: TextToImage | None
) -> CachedLatents:
    """The cache, if it is what a run would make of pictures itself.

    Args:
        config ([`ConsistencyConfig`]): the run's.
        cache ([`~cm_diffusers.training.latent_cache.CachedLatents`]): the one given.
        spec ([`~cm_diffusers.training.images.ImageSpec`]): the pictures that the run would read.
        text ([`~cm_diffusers.training.text_to_image.TextToImage`], *optional*): its teacher's encoders.

    Raises:
        `ValueError`: if it was made by other encoders or of other pictures, or an option cannot have its effect.
    """
    folder, made = cache.folder, cache.identity()["made_from"]
    if text is None:
        raise ValueError(f"The cache {folder} holds latents and prompts: it needs a text-to-image teacher.")
    if differences := compare("the teacher", made.get("encoders"), text.digests()):
        raise ValueError(f"The cache {folder} is made by other encoders than the run's: {'; '.join(differences)}.")
    cached, wanted = (made["pictures"]["height"], made["pictures"]["width"]), (spec.height, spec.width)
    if cached != wanted:
        raise ValueError(
            f"`resolution` must be that of the cache {folder}, whose pictures are {cached[0]} x {cached[1]}; the "
            f"run's are {wanted[0]} x {wanted[1]}."
        )
    _check_options(config, folder, made["pictures"])
    if not config.sample_prompts:
        logger.warning("A cache holds no captions: samples are drawn without a prompt. Set `sample_prompts`.")
    return cache


def _check_options(config: ConsistencyConfig, folder: Path, pictures: dict[str, Any]) -> None:
    defaults = {spec.name: spec.default for spec in dataclasses.fields(config)}
    for name in WITHOUT_MEANING:
        if getattr(config, name) != defaults[name]:
            raise ValueError(
                f"`{name}` needs pictures, and {folder} is a cache of latents: leave it at {defaults[name]!r}, got "
                f"{getattr(config, name)!r}."
            )
    for name in OF_PICTURES:
        if getattr(config, name) not in (defaults[name], pictures[name]):
            raise ValueError(
                f"`{name}` was {pictures[name]!r} when the cache {folder} was made, and cannot be "
                f"{getattr(config, name)!r} now."
            )
