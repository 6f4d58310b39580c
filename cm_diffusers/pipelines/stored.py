"""How consistency pipelines are saved, loaded and shared: stock on disk, ours in memory."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ConsistencyModelPipeline, DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError

from cm_diffusers.schedulers.scheduling_consistency import STOCK_CLASS, ConsistencyScheduler

# Of `from_pretrained`, what says how to download.
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")

# What the Hub's client and its HTTP library raise, whichever that is, and what the system does.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)


def download_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of `from_pretrained` that say how to download, for the Hub's own client."""
    return {name: options[name] for name in OF_THE_HUB if options.get(name) is not None}


def pop_dtype(options: dict[str, Any]) -> Any:
    """The precision among the options of `from_pretrained`, by the one or the other of its names; else `None`."""
    found = [options.pop(name) for name in ("dtype", "torch_dtype") if name in options]
    return found[0] if found else None


def suits_stock_pipeline(unet: Any, scheduler: Any) -> bool:
    """Whether `ConsistencyModelPipeline` computes the same with a student's network. It reads one `sample_size`."""
    return scheduler.is_stock and isinstance(unet.config.sample_size, int)


class StoredPipeline(DiffusionPipeline):
    """A pipeline of a `unet` and a [`ConsistencyScheduler`], which is saved under stock names where it can be."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As everywhere in diffusers. The scheduler is read as what it is here, not as the stock class that it names:
        that would warn of levels which it does not know, and which count here.
        """
        place = str(pretrained_model_name_or_path)
        if "scheduler" not in kwargs:
            with contextlib.suppress(OSError, ValueError):  # which are told below
                config = ConsistencyScheduler.load_config(place, subfolder="scheduler", **download_options(kwargs))
                if config.get("_class_name") == STOCK_CLASS:
                    kwargs["scheduler"] = ConsistencyScheduler.from_config(config)
        return super().from_pretrained(place, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """This pipeline over the components of another, without copying them, in the precision that they have.

        Args:
            pipeline (`DiffusionPipeline`): a `ConsistencyModelPipeline` or a pipeline of this package.
            kwargs: components and config values that replace the other's; `dtype` converts both, as everywhere in
                diffusers.
        """
        dtype = pop_dtype(kwargs)
        made = cls(**{**pipeline.components, "null_class_label": pipeline.config.get("null_class_label"), **kwargs})
        return made if dtype is None else made.to(dtype=dtype)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As everywhere in diffusers, without the place that the network was loaded from, which is of this machine."""
        self.unet.register_to_config(_name_or_path="")
        super().save_pretrained(save_directory, *args, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write `model_index.json`; under stock names when stock diffusers computes the same."""
        index = json.loads(self.to_json_string())
        index.pop("_name_or_path", None)  # a folder of this machine
        if index.get("null_class_label") is None:
            index.pop("null_class_label", None)
        index["_class_name"] = "ConsistencyPipeline"  # whichever way of sampling saved it
        if self.is_stock:
            index["_class_name"] = ConsistencyModelPipeline.__name__
            index["scheduler"] = ["diffusers", STOCK_CLASS]
        Path(json_file_path).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def is_stock(self) -> bool:
        """Whether `ConsistencyModelPipeline` computes the same."""
        return suits_stock_pipeline(self.unet, self.scheduler)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the pipeline with a model card. Returns the address of the commit.

        Args:
            repo_id (`str`): `name`, `user/name` or `organisation/name`.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr` of
                [`~cm_diffusers.hub.push_to_hub`].

        Raises:
            [`~cm_diffusers.hub.push.PushError`]: if the Hub refuses or cannot be reached.
        """
        import tempfile

        from cm_diffusers.hub import push_to_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_to_hub(folder, repo_id, **options)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike, **kwargs: Any) -> str:
        """Fetch a repository of the Hub and return its folder.

        diffusers' own `download` refuses repositories whose classes live outside diffusers.

        Args:
            pretrained_model_name (`str`): a Hub id.
            kwargs: of `DiffusionPipeline.download`: `cache_dir`, `force_download`, `local_files_only`, `token`,
                `revision` and `variant`; the others are for other repositories.
        """
        from huggingface_hub import snapshot_download

        variant = kwargs.get("variant")
        weights = f"*.{variant}*.safetensors" if variant else "*.safetensors"
        patterns = ["*.json", weights] + ([f"*.safetensors.index.{variant}.json"] if variant else [])
        return snapshot_download(str(pretrained_model_name), allow_patterns=patterns, **download_options(kwargs))
