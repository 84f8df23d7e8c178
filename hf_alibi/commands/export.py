"""`hf-alibi export`: a converted model as a file for another engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from ..export.names import GGUF_TYPES

__all__ = ["command"]


def command(argv: Sequence[str]) -> None:
    """Export by `gguf FOLDER OUT.gguf ...` or `onnx FOLDER OUT`."""
    parser = argparse.ArgumentParser(
        prog="hf-alibi export", description="Write a converted model for another engine. vLLM serves the folder itself."
    )
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    gguf = targets.add_parser("gguf", help="a file for stock llama.cpp")
    gguf.add_argument("folder", metavar="FOLDER", help="of the converted model")
    gguf.add_argument("out", metavar="OUT.gguf", help="the file to write; it must not exist")
    gguf.add_argument("--type", choices=GGUF_TYPES, default="f16", help="of the weights [f16]")
    gguf.add_argument(
        "--context_length",
        type=int,
        help="tokens that llama.cpp makes room for by default [the limit that the model had before]",
    )
    gguf.add_argument(
        "--tokenizer",
        choices=("true", "false"),
        default="true",
        help="false leaves it out: engines then take token ids only [true]",
    )
    onnx = targets.add_parser("onnx", help="a graph with a cache for ONNX Runtime and optimum")
    onnx.add_argument("folder", metavar="FOLDER", help="of the converted model")
    onnx.add_argument("out", metavar="OUT", help="the folder to write; it must not exist")
    args = parser.parse_args(argv)
    if args.target == "gguf":
        from ..export.gguf import export_gguf

        out = export_gguf(
            args.folder,
            args.out,
            type=args.type,
            context_length=args.context_length,
            tokenizer=args.tokenizer == "true",
            progress=True,
        )
    else:
        from ..export.onnx import export_onnx

        out = export_onnx(args.folder, args.out)
    Console(markup=False, highlight=False, soft_wrap=True).print(
        f"Wrote {out}. Compare it with transformers by: hf-alibi verify {args.target} {args.folder} {out}"
    )
