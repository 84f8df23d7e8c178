"""The command line: `hf-alibi convert CONFIG.yaml ...`, and likewise the other commands."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from .errors import InputError

__all__ = ["main"]

_USAGE = """\
usage: hf-alibi COMMAND CONFIG.yaml [--field value ...]

commands:
  convert       turn a pretrained model into an ALiBi model by the whole recipe, and compare
  ablation      train with one part of that recipe changed at a time, over several seeds
  finetune      convert a model to ALiBi (or leave it alone) and train it
  extrapolate   trained models and their baselines at lengths beyond training
  benchmark     time and memory of ALiBi against what a model used before

`hf-alibi COMMAND --help` lists every field; `hf-alibi --version` prints the version."""

_INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for input that cannot be used, 2 for wrong usage.

    Input errors and errors of the operating system are one line on stderr; any other exception is a bug and
    keeps its traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    out = Console(markup=False, highlight=False, soft_wrap=True)
    err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    if words and words[0] in ("-h", "--help"):
        out.print(_USAGE)
        return 0
    if words == ["--version"]:
        out.print(f"hf-alibi {_version()}")
        return 0
    if not words or words[0] not in _COMMANDS:
        given = f"no command {words[0]!r}" if words else "no command given"
        err.print(f"hf-alibi: error: {given}; commands: {', '.join(_COMMANDS)}; see hf-alibi --help")
        return 2
    try:
        _COMMANDS[words[0]](words[1:])
    except (InputError, OSError) as error:
        err.print(f"hf-alibi: error: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        err.print("hf-alibi: interrupted")
        return _INTERRUPTED
    return 0


# The commands import what they need when they run: --help and usage errors need no torch.
def _convert(argv: Sequence[str]) -> None:
    from transformers.utils.logging import disable_progress_bar

    from .commands.convert import cost, run

    disable_progress_bar()
    result = run(argv)
    if not _is_main_process():
        return
    for name in ("training", "control"):
        if result[name] is not None:
            _conclude(result[name])
    _print(cost(result))


def _ablation(argv: Sequence[str]) -> None:
    from transformers.utils.logging import disable_progress_bar

    from .commands.ablation import ablation

    disable_progress_bar()
    ablation(argv)


def _finetune(argv: Sequence[str]) -> None:
    from transformers.utils.logging import disable_progress_bar

    from .commands.finetune import finetune

    disable_progress_bar()  # of loading and writing files; training has its own
    metrics = finetune(argv)
    if _is_main_process():
        _conclude(metrics)


def _conclude(metrics: Mapping[str, Any]) -> None:
    """Draw the loss curve of a run and print how it ended."""
    from .reporting.plots import loss_curve

    output_dir = Path(metrics["config"]["output_dir"])
    try:
        loss_curve(metrics, output_dir / "loss.png")
    except InputError as error:  # no matplotlib: the run itself is complete
        _print(f"no loss.png: {error}")
    if metrics["eval_loss"] is not None:
        _print(f"held-out loss {metrics['eval_loss']:.4f} nats per token after {metrics['steps']} steps")
    _print(f"saved to {output_dir}")


def _is_main_process() -> bool:
    from accelerate import PartialState  # type: ignore[import-untyped]

    return bool(PartialState().is_main_process)


def _print(text: str) -> None:
    Console(markup=False, highlight=False, soft_wrap=True).print(text)


def _extrapolate(argv: Sequence[str]) -> None:
    from .commands.extrapolate import extrapolate

    extrapolate(argv)


def _benchmark(argv: Sequence[str]) -> None:
    from transformers.utils.logging import disable_progress_bar

    from .commands.benchmark import benchmark

    disable_progress_bar()
    benchmark(argv)


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "convert": _convert,
    "ablation": _ablation,
    "finetune": _finetune,
    "extrapolate": _extrapolate,
    "benchmark": _benchmark,
}


def _version() -> str:
    try:
        return version("hf-alibi")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
