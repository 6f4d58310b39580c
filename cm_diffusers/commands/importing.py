"""`cm-diffusers import`: published checkpoints as diffusers pipelines."""

from __future__ import annotations

from collections.abc import Sequence

from cm_diffusers.commands.options import Parser


def import_(arguments: Sequence[str]) -> None:
    """`cm-diffusers import`: a folder that is a teacher, or a student to sample from."""
    parser = Parser("import")
    parser.add_argument("checkpoint", metavar="FILE", help="cd_*.pt, ct_*.pt, edm_*.pt or edm-*.pkl; not executed")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="where the pipeline goes")
    parser.add_argument("--kind", choices=("cd", "ct", "edm"), help="what it is; by default the file's name says")
    parser.add_argument("--image_size", type=int, help="pixels; like all below, known for published models")
    parser.add_argument("--attention_head_dim", type=int, help="channels of an attention head")
    parser.add_argument("--qkv_order", choices=("new", "legacy"), help="OpenAI's use_new_attention_order: on or off")
    parser.add_argument("--num_train_timesteps", type=int, help="noise levels a consistency model was trained on")
    options = vars(parser.parse_args(arguments))

    from cm_diffusers.importing import import_checkpoint

    folder, path = options.pop("output_dir"), options.pop("checkpoint")
    pipeline = import_checkpoint(path, **options)
    pipeline.save_pretrained(folder)
    use = "sample" if type(pipeline).__name__ == "ConsistencyPipeline" else "distill --teacher"
    print(f"Saved to {folder}. Use it with: cm-diffusers {use} {folder}")
