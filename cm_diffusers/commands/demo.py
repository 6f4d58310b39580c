"""`cm-diffusers demo`: a student in the browser."""

from __future__ import annotations

from collections.abc import Sequence

from cm_diffusers.commands.options import Parser, choose_device


def demo(arguments: Sequence[str]) -> None:
    """`cm-diffusers demo`: serves the page until it is interrupted, or writes it as a Space."""
    parser = Parser("demo")
    parser.add_argument("model", metavar="PATH", help="folder or Hub id of the student")
    parser.add_argument("--teacher", help="folder or Hub id of the teacher, shown beside the student")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, help="port to serve at; by default a free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also serve under a public address, through Gradio")
    parser.add_argument("--device", help="cpu, cuda, mps ...; by default the best there is")
    parser.add_argument(
        "--space", metavar="FOLDER", help="write a Space that shows PATH and --teacher, Hub ids, instead of serving"
    )
    options = parser.parse_args(arguments)
    from cm_diffusers.demo import build_demo, load_models, write_space

    if options.space:
        write_space(options.space, options.model, options.teacher)
        print(f"Wrote {options.space}. Publish it with: hf upload NAME {options.space} --repo-type space")
        return
    models = load_models(options.model, options.teacher, choose_device(options.device))
    build_demo(*models).launch(server_name=options.host, server_port=options.port, share=options.share)
