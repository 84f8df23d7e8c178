"""`hf-alibi verify`: an engine compared with transformers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from ..errors import InputError, VerificationError
from ..export.names import TARGET_NAMES

__all__ = ["command"]


def command(argv: Sequence[str]) -> None:
    """Compare by `TARGET FOLDER [FILE] ...` and print what was found."""
    parser = argparse.ArgumentParser(
        prog="hf-alibi verify",
        description="Compare logits and greedy text of an engine with those of transformers, in float32.",
    )
    parser.add_argument("target", metavar="TARGET", choices=TARGET_NAMES, help=f"one of {', '.join(TARGET_NAMES)}")
    parser.add_argument("folder", metavar="FOLDER", help="of the converted model")
    parser.add_argument("file", metavar="FILE", nargs="?", help="what was exported; nothing for vllm")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        help="of the prompts, in tokens [10, 1000, and 100 past the limit that the model had]",
    )
    parser.add_argument("--new_tokens", type=int, default=16, help="written after each prompt [16]")
    parser.add_argument("--text_file", help="prompts are its beginning [random tokens]")
    parser.add_argument("--tensor_parallel", type=int, default=1, help="ranks of vLLM [1]")
    args = vars(parser.parse_args(argv))
    from ..export.parity import verify_export

    out = Console(markup=False, highlight=False, soft_wrap=True)
    try:
        out.print(_report(verify_export(**args, progress=True)))
    except VerificationError as error:
        raise InputError(f"not verified: {error}") from error


def _report(result: Mapping[str, Any]) -> str:
    if (perplexity := result.get("perplexity")) is not None:
        ratio = perplexity["engine"] / perplexity["transformers"] - 1
        return (
            f"{result['engine']}: perplexity {perplexity['engine']:.3f}, transformers {perplexity['transformers']:.3f} "
            f"with the whole weights: {ratio:+.2%}, at most {result['bound']:+.0%}"
        )
    lines = ["prompt    largest difference of logits    same greedy", "tokens    after it   at 32 tokens       text"]
    for row in result["rows"]:
        said = "yes" if row["same_text"] else "to a tie"
        lines.append(f"{row['tokens']:<8,}  {row['difference_at_once']:<9.1e}  {row['difference']:<17.1e}  {said}")
        if row["rounding"] is not None:
            lines.append(f"          from float64, of which transformers in float32 is off by {row['rounding']:.1e}")
    controls = [row["control"] for row in result["rows"] if row["control"] is not None]
    control = f"; without the bias it would be {min(controls):.1e} or more" if controls else ""
    return "\n".join([*lines, f"{result['engine']} agrees with transformers within {result['bound']:.0e}{control}"])
