"""`cm-diffusers precompute`: latents and prompt embeddings, computed once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cm_diffusers.commands.config_options import add_config_options, parse_config_options
from cm_diffusers.commands.measuring import process_state
from cm_diffusers.commands.options import Parser

FIELDS = (
    "teacher_revision teacher_dtype dataset_name data_files dataset_split image_column caption_column resolution "
    "center_crop random_flip on_bad_image num_workers batch_size seed distributed_timeout"
).split()
DEFAULTS = {"batch_size": 8}


def precompute(arguments: Sequence[str]) -> None:
    """`cm-diffusers precompute`: a folder that text-to-image runs take as their dataset."""
    parser = _parser()
    values, given = parse_config_options(parser, arguments, FIELDS)
    from cm_diffusers.training import ConsistencyConfig
    from cm_diffusers.training.precompute import precompute
    from cm_diffusers.training.runtime import disconnect

    named = {name: getattr(given, name) for name in ("teacher", "dataset", "output_dir")}
    folder = precompute(ConsistencyConfig(**{**DEFAULTS, **values, **named}), cache_dtype=given.cache_dtype)
    state = process_state()
    if state.is_main_process:
        options = [("teacher", given.teacher), ("dataset", folder)]
        options += [(name, values[name]) for name in ("teacher_revision", "resolution") if name in values]
        train = " ".join(["cm-diffusers distill", *(f"--{name} {shlex.quote(str(value))}" for name, value in options)])
        print(f"Cache saved to {folder}. Train on it with: {train}")
    disconnect(state)


def _parser() -> Parser:
    parser = Parser("precompute")
    parser.epilog = (
        "The dataset is read by its rows: it cannot be streamed. A cache holds one crop, one side and one caption of "
        "each picture. Where they are random (--center_crop false, --random_flip true, several captions), --seed and "
        "the row decide them, once."
    )
    parser.add_argument("--teacher", required=True, metavar="PATH", help="folder or Hub id of the teacher's pipeline")
    parser.add_argument(
        "--dataset", required=True, help="Hub id, folder of images, parquet files, or a saved dataset, with captions"
    )
    parser.add_argument(
        "--output_dir", required=True, metavar="CACHE", help="where the cache goes; what is there of it is kept"
    )
    parser.add_argument(
        "--cache_dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="of latents and embeddings; half precision takes half the space (default: float32)",
    )  # fmt: skip
    add_config_options(parser, FIELDS, DEFAULTS)
    return parser
