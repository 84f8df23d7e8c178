"""The command line: `hf-alibi COMMAND [CONFIG.yaml] [--field value ...]`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from rich.console import Console

from .commands.fields import check_names, field_names, help_lines, split_argv, training_fields
from .errors import InputError

__all__ = ["main"]


class _Command(NamedTuple):
    """A row of the table of commands. Modules are imported when needed: --help and wrong usage take no torch."""

    summary: str
    run: str
    """Module and function, which is given the words after the command."""
    settings: tuple[str, ...] = ()
    """Module and dataclass of the package's own fields; none if the command parses its words itself."""
    trains: bool = False
    """Whether it also takes the fields of `transformers.TrainingArguments`."""


_DATA = "training.settings:DataArguments"
_TRAINING = ("training.settings:FinetuneArguments", "conversion.settings:ConversionArguments", _DATA)
_COMMANDS = {
    "convert": _Command(
        "turn a pretrained model into an ALiBi model by the whole recipe, and compare",
        "commands.convert:command",
        ("evaluation.settings:ControlArguments", *_TRAINING),
        trains=True,
    ),
    "finetune": _Command(
        "convert a model to ALiBi (or leave it alone) and train it",
        "commands.finetune:command",
        _TRAINING,
        trains=True,
    ),
    "extrapolate": _Command(
        "trained models and their baselines at lengths beyond training",
        "commands.extrapolate:extrapolate",
        ("evaluation.settings:ExtrapolateArguments", _DATA),
    ),
    "ablation": _Command(
        "train with one part of the recipe changed at a time, over several seeds",
        "commands.ablation:ablation",
        ("training.settings:AblationArguments", "evaluation.settings:ComparisonArguments", *_TRAINING),
        trains=True,
    ),
    "benchmark": _Command(
        "time and memory of ALiBi against what a model used before",
        "commands.benchmark:benchmark",
        ("benchmark.settings:BenchmarkArguments",),
    ),
    "export": _Command("write a converted model for llama.cpp or ONNX Runtime", "commands.export:command"),
    "verify": _Command("compare vLLM, llama.cpp or ONNX Runtime with transformers", "commands.verify:command"),
}

_USAGE = "\n".join(
    [
        "usage: hf-alibi COMMAND [CONFIG.yaml] [--field value ...]",
        "       hf-alibi export TARGET FOLDER OUT [--field value ...]",
        "       hf-alibi verify TARGET FOLDER [FILE] [--field value ...]",
        "",
        "commands:",
        *(f"  {name:<13} {command.summary}" for name, command in _COMMANDS.items()),
        "",
        "`hf-alibi COMMAND --help` lists the fields; `hf-alibi --version` prints the version.",
    ]
)

_INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for input that cannot be used, 2 for wrong usage.

    Input errors and errors of the operating system are one line on stderr; any other exception is a bug and keeps its
    traceback.
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
    name, rest = words[0], words[1:]
    try:
        _check_readable(rest)
        if _COMMANDS[name].settings and {"-h", "--help", "--help-all"} & set(rest):
            out.print(_help(name, everything="--help-all" in rest, width=out.width))
        else:
            _run(_COMMANDS[name], rest)
    except (InputError, OSError) as error:
        err.print(f"hf-alibi: error: {' '.join(str(error).split())}")
        return 1
    except SystemExit as stop:  # of argparse, in commands that parse their words themselves
        return int(stop.code or 0)
    except KeyboardInterrupt:
        err.print("hf-alibi: interrupted")
        return _INTERRUPTED
    return 0


def _check_readable(words: Sequence[str]) -> None:
    """Raise InputError for words that Python could not decode under this locale, such as LC_ALL=C without UTF-8."""
    for word in words:
        if not word.isascii() and any(0xDC80 <= ord(letter) <= 0xDCFF for letter in word):
            shown = word.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            raise InputError(f"{shown!a} cannot be read under this locale; set LC_ALL=C.UTF-8, or PYTHONUTF8=1")


def _run(command: _Command, argv: Sequence[str]) -> None:
    """Check the names of all fields, which takes a fraction of a second, and run."""
    if not command.settings:
        _load(command.run)(argv)
        return
    own = field_names(_load(path) for path in command.settings)
    check_names(*split_argv(argv), [*own, *(training_fields() if command.trains else ())])
    logging.getLogger("hf_alibi").setLevel(logging.ERROR)  # commands train what they convert
    import_module("transformers.utils.logging").disable_progress_bar()  # of reading and writing files; work has its own
    _load(command.run)(argv)


def _help(name: str, *, everything: bool, width: int) -> str:
    command = _COMMANDS[name]
    usage = f"hf-alibi {name} [CONFIG.yaml] [--field value ...]"
    classes = [_load(path) for path in command.settings]
    if everything:
        full_help, training = _load("commands.settings:full_help"), import_module("transformers").TrainingArguments
        return str(full_help([*classes, training] if command.trains else classes, usage))
    more = " Any field of transformers.TrainingArguments can be given too." if command.trains else ""
    closing = f"The YAML holds the same fields; the command line wins.{more} --help-all says everything of each field."
    return "\n".join([f"usage: {usage}", "", command.summary, "", *help_lines(classes, width), "", closing])


def _load(path: str) -> Any:
    """What `module:name` names in this package."""
    module, name = path.split(":")
    return getattr(import_module(f"{__package__}.{module}"), name)


def _version() -> str:
    try:
        return version("hf-alibi")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
