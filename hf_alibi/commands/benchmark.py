"""`hf-alibi benchmark`: time and memory of ALiBi, each as a ratio to what a model used before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from ..benchmark.attention_cases import FORWARD_BACKWARD, attention_cases, memory_cases
from ..benchmark.error_cases import error_cases
from ..benchmark.model_cases import ALL_LAYERS, activation_cases, decode_cases, model_cases, sequence_cases
from ..benchmark.settings import PARTS, BenchmarkArguments, Case
from ..benchmark.timing import OK, Row, device_stopwatch
from ..errors import InputError
from ..reporting.plots import cost_by_length, require_matplotlib
from ..reporting.results import Results, check_output_dir, environment, write_results
from .settings import load_settings, resolve_settings

__all__ = ["benchmark", "growth_rows", "measure"]

_CASES: dict[str, Callable[[BenchmarkArguments, torch.device], Iterator[Case]]] = dict(
    zip(
        PARTS,
        (attention_cases, memory_cases, model_cases, decode_cases, sequence_cases, activation_cases, error_cases),
        strict=True,
    )
)
_TITLES = {
    "errors": "Attention: root mean square error to float64; ratio to that of causal SDPA without bias",
    "attention": "Attention: time; ratio to causal SDPA without bias, its quartiles",
    "growth": "Attention: growth of the cost per token up to the longest length",
    "memory": "Attention: peak memory over that of inputs and output; ratio to causal SDPA without bias",
    "model": "Models with random weights: time; ratio to the unconverted model, its quartiles",
    "decode": "One token after a cache of this length: time; ratio to the unconverted model, its quartiles",
    "sequence": "One sequence: time; ratio of the cost per token to the shortest, its quartiles",
    "activations": "Attention of a real model on text, all layers: time; ratio, those of the best and worst layer",
}
# Growth is from the longest length over this to the longest.
_GROWTH_SPAN = 4
_LABELS = ("subject", "what", "length")


def benchmark(argv: Sequence[str]) -> Results:
    """Run `measure` with the settings of `CONFIG.yaml --field value ...`."""
    return measure(*load_settings((BenchmarkArguments,), argv))


def measure(args: BenchmarkArguments) -> Results:
    """Time all parts and write `benchmark.json`, `benchmark.csv` and `benchmark.png` to `args.output_dir`.

    Settings, output folder, memory, and for activations model and text are checked before the first case. Files are
    written after each part, so that what was measured outlasts an interruption.

    Returns what `benchmark.json` holds. Raises `InputError` if something given cannot be used.
    """
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    require_matplotlib()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _check_memory_limit(args, device)
    parts = [part for part in PARTS if part in (args.parts or PARTS)]
    cases = {part: list(_CASES[part](args, device)) for part in parts}

    stopwatch = device_stopwatch(device, args.repeats, args.seconds)
    results: Results = {
        "kind": "benchmark",
        "settings": _settings(args),
        "environment": environment(seed=args.seed),
        "machine": _machine(),
        "rows": [],
    }
    paths: list[Path] = []
    with _progress(sum(map(len, cases.values()))) as (describe, advance):
        for part in parts:
            for case in cases[part]:
                describe(f"{case.part}: {case.subject}, {case.what}, {case.length} tokens")
                results["rows"] += case.rows(stopwatch)
                advance()
            if part == "attention":
                results["rows"] += growth_rows(results["rows"])
            paths = _write(results, output_dir)
    _print(results["rows"], paths, Console(highlight=False))
    return results


def growth_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """How the cost per token of each variant of attention grows over the last two doublings of length.

    `growth` is the cost per token at the longest length over that at a quarter of it: 1 if cost is linear, 4 if
    it is quadratic.
    """
    longest = max(row["length"] for row in rows if row["part"] == "attention")
    first = longest // _GROWTH_SPAN
    costs = {
        (row["what"], row["variant"], row["length"]): row.get("microseconds_per_token")
        for row in rows
        if row["part"] == "attention"
    }
    for what, variant in dict.fromkeys((what, variant) for what, variant, _ in costs):
        cost, cost_first = (costs.get((what, variant, length)) for length in (longest, first))
        missing = [length for length, value in ((first, cost_first), (longest, cost)) if value is None]
        yield {
            "part": "growth",
            "subject": "attention",
            "what": what,
            "length": longest,
            "variant": variant,
            "status": f"not timed at {' and '.join(map(str, missing))} tokens" if missing else OK,
            "growth": cost / cost_first if cost is not None and cost_first is not None else None,
            "growth_from": first,
        }


def _check_memory_limit(args: BenchmarkArguments, device: torch.device) -> None:
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if args.memory_limit * 2**30 > available:
        raise InputError(
            f"memory_limit is {args.memory_limit:g} GiB and {available / 2**30:.1f} GiB of memory is free; "
            "lower memory_limit"
        )


def _settings(args: BenchmarkArguments) -> dict[str, Any]:
    """The settings as the results show them. Keep only folder names; results may be published."""
    settings = resolve_settings([args])
    for name in ("output_dir", "model_name_or_path", "text"):
        if settings[name] is not None and Path(settings[name]).is_absolute():
            settings[name] = Path(settings[name]).name
    return settings


def _machine() -> dict[str, Any]:
    """What the speed depends on beside what `environment` says."""
    return {
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
    }


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Show a progress bar on stderr; yields the functions that describe the case at work and that end it."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)


def _write(results: Results, output_dir: Path) -> list[Path]:
    paths = list(write_results(results, output_dir, "benchmark"))
    if rows := [row for row in results["rows"] if row["part"] == "attention"]:
        paths.append(output_dir / "benchmark.png")
        cost_by_length(rows, paths[-1])
    return paths


def _print(rows: Sequence[Row], paths: Sequence[Path], console: Console) -> None:
    """Print a table a part, with a section a comparison, and where the files are."""
    # Layers one by one are for the files.
    shown = [row for row in rows if row["part"] != "activations" or row["subject"] == ALL_LAYERS]
    for part, in_part in groupby(shown, key=lambda row: row["part"]):
        table = Table(
            "what", "tokens", Column("variant", no_wrap=True), "value", "ratio", "spread", title=_TITLES[part]
        )
        for (subject, what, length), variants in groupby(in_part, key=lambda row: tuple(map(row.get, _LABELS))):
            table.add_section()
            name = what.replace("_", " + " if what == FORWARD_BACKWARD else " ")
            labels = [name if subject in ("attention", ALL_LAYERS) else f"{subject} {name}", str(length)]
            for row in variants:
                table.add_row(*labels, row["variant"], *_cells(row))
                labels = ["", ""]
        console.print(table)
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)


def _cells(row: Row) -> tuple[str, ...]:
    """Value, ratio and spread; in place of the value, the reason why there is none."""
    if row["status"] != OK:
        return (escape(row["status"]),)
    if "error" in row:
        return f"{row['error']:.2e}", f"{row['ratio']:.3g}", ""
    if "growth" in row:
        return (f"{row['growth']:.2f} × that at {row['growth_from']}",)
    ratio, low, high = (row.get(name) for name in ("ratio", "ratio_low", "ratio_high"))
    spread = "" if low == high else f"{low:.3g} – {high:.3g}"
    value = f"{row['peak_over_inputs']:.2f} ×" if "peak_bytes" in row else f"{row['seconds'] * 1e3:.4g} ms"
    if row.get("pairs_kept") is not None:
        value += f", reads {row['pairs_kept']:.1%} of pairs"
    return value, "" if ratio is None else f"{ratio:.3g}", spread
