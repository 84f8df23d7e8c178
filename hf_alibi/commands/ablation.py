"""`hf-alibi ablation`: the same training with one part of the recipe changed a row, over several seeds."""

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments

from ..conversion.settings import ConversionArguments
from ..errors import InputError
from ..reporting.curves import markdown_table
from ..reporting.plots import loss_by_row, require_matplotlib
from ..reporting.results import Results, environment, replacing, write_results
from ..training.settings import AblationArguments, DataArguments, FinetuneArguments
from ..utils import METRICS_FILE
from .finetune import train
from .settings import load_settings, make_settings, resolve_settings

__all__ = ["ablation"]

_RUN = (FinetuneArguments, ConversionArguments, DataArguments, TrainingArguments)
_WEIGHTS = "*.safetensors"


def ablation(argv: Sequence[str]) -> Results:
    """Train every row of `CONFIG.yaml --field value ...` at every seed, and write one table.

    All rows share the settings, those of `hf-alibi finetune`, but for what a row changes. Each row's settings are
    parsed before the first is trained. Complete runs in `output_dir` are read and not repeated, so that an interrupted
    ablation resumes. Of each run settings and metrics stay, and no weights.

    Returns what `results.json` holds. Raises InputError if something given cannot be used.
    """
    args, *shared = load_settings((AblationArguments, *_RUN), argv)
    require_matplotlib()
    values = resolve_settings(shared)
    output_dir = Path(values["output_dir"])
    runs = {(name, seed): output_dir / _folder_name(name) / f"seed-{seed}" for seed in args.seeds for name in args.rows}
    if len(set(runs.values())) < len(runs):
        raise InputError(f"rows {', '.join(args.rows)} and seeds {args.seeds} do not have folders of their own; rename")
    settings = {
        run: make_settings(_RUN, {**values, **args.rows[run[0]], "seed": run[1], "output_dir": str(folder)})
        for run, folder in runs.items()
    }
    metrics = {run: _metrics(folder, settings[run]) for run, folder in runs.items()}
    results: Results = {
        "kind": "ablation",
        "settings": {"shared": values, "rows": args.rows, "control": args.control},
        "environment": environment(),
        "runs": [
            {
                "row": name,
                "seed": seed,
                "nats_per_token": of_run["eval_loss"],
                "tokens": of_run["tokens_seen"],
                "seconds": of_run["seconds"],
            }
            for (name, seed), of_run in metrics.items()
        ],
        "rows": list(_rows(args, metrics)),
    }
    write_results(results, output_dir)
    loss_by_row(results, output_dir / "ablation.png")
    table = ablation_table(results)
    with replacing(output_dir / "ablation.md") as path:
        path.write_text(table, encoding="utf-8")
    Console(markup=False, highlight=False, soft_wrap=True).print(table)
    return results


def ablation_table(results: Results) -> str:
    """The rows of an ablation as a table in Markdown: means over seeds, with the spread between them."""
    control = results["settings"]["control"]
    header = ["row", "held-out loss", "perplexity", f"/ {control}" if control else "ratio", "tokens", "minutes"]
    cells = [
        [
            row["row"],
            _spread(row["nats_per_token"], row["nats_deviation"]),
            f"{row['perplexity']:.2f}",
            _spread(row["ratio"], row["ratio_deviation"]),
            f"{row['tokens']:,}",
            f"{row['minutes']:.1f}",
        ]
        for row in results["rows"]
    ]
    seeds = len({run["seed"] for run in results["runs"]})
    note = f"Means over {seeds} seed{'s' if seeds > 1 else ''}, ± their standard deviation."
    return f"{markdown_table(header, cells)}\n\n{note}\n"


def _spread(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _metrics(folder: Path, settings: tuple[Any, ...]) -> Mapping[str, Any]:
    """Metrics of a run, which is done now if it was not yet."""
    file = folder / METRICS_FILE
    if not file.is_file():
        metrics = train(*settings)
        for weights in folder.rglob(_WEIGHTS):
            weights.unlink()
        return metrics
    metrics = json.loads(file.read_text(encoding="utf-8"))
    given = {**resolve_settings(settings), "output_dir": None}
    if {**metrics["config"], "output_dir": None} != given:
        raise InputError(f"{folder} holds a run with other settings; give another output_dir, or remove that run")
    if metrics["eval_loss"] is None:
        raise InputError(f"{folder} holds a run without held-out loss; hold out some text")
    return dict(metrics)


def _rows(args: AblationArguments, metrics: Mapping[tuple[str, int], Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row of the table for each row of the ablation, with means and deviations over seeds."""
    for name in args.rows or ():
        runs = [metrics[name, seed] for seed in args.seeds]
        losses = [run["eval_loss"] for run in runs]
        ratios = [
            math.exp(run["eval_loss"] - metrics[args.control, seed]["eval_loss"])
            for run, seed in zip(runs, args.seeds, strict=True)
            if args.control is not None
        ]
        yield {
            "row": name,
            "nats_per_token": statistics.fmean(losses),
            "nats_deviation": _deviation(losses),
            "perplexity": math.exp(statistics.fmean(losses)),
            "ratio": statistics.fmean(ratios) if ratios else None,
            "ratio_deviation": _deviation(ratios),
            "tokens": runs[0]["tokens_seen"],
            "minutes": statistics.fmean(run["seconds"] for run in runs) / 60,
        }


def _deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def _folder_name(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-") or "row"
