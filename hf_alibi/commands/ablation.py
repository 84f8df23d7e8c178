"""`hf-alibi ablation`: the same training with one part of the recipe changed a row, over several seeds."""

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments

from ..conversion.settings import ConversionArguments
from ..errors import InputError
from ..evaluation.baselines import ALL, BASELINES, check_names
from ..evaluation.checked_model import check_model
from ..evaluation.protocol import OK, SLIDING
from ..evaluation.settings import ComparisonArguments, ExtrapolateArguments
from ..reporting.curves import Comparison, markdown_table
from ..reporting.plots import loss_by_row, require_matplotlib
from ..reporting.results import Results, environment, write_results
from ..training.data import load_tokens, run_tokenizer
from ..training.settings import AblationArguments, DataArguments, FinetuneArguments
from ..utils import METRICS_FILE, replacing
from .extrapolate import compare
from .finetune import train
from .settings import load_settings, make_settings, resolve_settings

__all__ = ["ablation"]

_RUN = (FinetuneArguments, ConversionArguments, DataArguments, TrainingArguments)
_WEIGHTS = "*.safetensors"
_EVALUATION = "evaluation"
_PERPLEXITY = "perplexity"


def ablation(argv: Sequence[str]) -> Results:
    """Train every row of `CONFIG.yaml --field value ...` at every seed, and write one table.

    All rows share the settings, those of `hf-alibi finetune`, but for what a row changes. Each row's settings are
    parsed before the first is trained. Complete runs in `output_dir` are read and not repeated, so that an interrupted
    ablation resumes. With `lengths` each model is also evaluated as `hf-alibi extrapolate` does, probes and baselines
    included, for a second table. Of each run settings, metrics and evaluation stay, and no weights.

    Returns what `results.json` holds. Raises InputError if something given cannot be used.
    """
    args, comparison, *shared = load_settings((AblationArguments, ComparisonArguments, *_RUN), argv)
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
    if comparison.lengths:
        check_names(comparison.baselines or ())
        for name in args.rows:
            _check_text(comparison, name, settings[name, args.seeds[0]])
    metrics, evaluations = {}, []
    for run, folder in runs.items():
        metrics[run] = _metrics(folder, settings[run])
        if comparison.lengths:
            evaluations.append(_evaluation(comparison, run[0], folder, settings[run]))
        for weights in folder.rglob(_WEIGHTS):
            weights.unlink()
    results: Results = {
        "kind": "ablation",
        "settings": {"shared": values, "rows": args.rows, "control": args.control, "comparison": asdict(comparison)},
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
        "by_length": list(_by_length(evaluations)),
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
    parts = [markdown_table(header, cells), *_length_table(results["by_length"]), note]
    return "\n\n".join(parts) + "\n"


def _length_table(by_length: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What each row comes to at each length: perplexities, and shares found."""
    columns = list(dict.fromkeys((each["value"], each["length"]) for each in by_length))
    found = {(each["row"], each["value"], each["length"]): each["mean"] for each in by_length}
    if not found:
        return
    cells = [
        [row, *(_cell(value, found.get((row, value, length))) for value, length in columns)]
        for row in dict.fromkeys(each["row"] for each in by_length)
    ]
    yield markdown_table(["row", *(f"{value} at {length}" for value, length in columns)], cells)


def _cell(value: str, mean: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" if value == _PERPLEXITY else f"{mean:.0%}"


def _spread(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _metrics(folder: Path, settings: tuple[Any, ...]) -> Mapping[str, Any]:
    """Metrics of a run, which is done now if it was not yet."""
    file = folder / METRICS_FILE
    if not file.is_file():
        return train(*settings)
    metrics = json.loads(file.read_text(encoding="utf-8"))
    given = {**resolve_settings(settings), "output_dir": None}
    if {**metrics["config"], "output_dir": None} != given:
        raise InputError(f"{folder} holds a run with other settings; give another output_dir, or remove that run")
    if metrics["eval_loss"] is None:
        raise InputError(f"{folder} holds a run without held-out loss; hold out some text")
    return dict(metrics)


def _check_text(comparison: ComparisonArguments, row: str, settings: Sequence[Any]) -> None:
    """Raise InputError if the held-out text of a row does not suit its evaluation."""
    finetuned, _, data, training = settings
    args = _evaluated(comparison, row, Path(training.output_dir), finetuned.block_size)
    tokenizer = run_tokenizer(data, finetuned.model_name_or_path)
    args.protocol().check(len(load_tokens(data, tokenizer).held_out))


def _evaluated(comparison: ComparisonArguments, row: str, folder: Path, train_length: int) -> ExtrapolateArguments:
    """The settings of a row's evaluation."""
    return ExtrapolateArguments.of(
        comparison,
        models={row: str(folder)},
        train_length=train_length,
        output_dir=str(folder / _EVALUATION),
    )


def _evaluation(comparison: ComparisonArguments, row: str, folder: Path, settings: Sequence[Any]) -> Results:
    """The evaluation of a run, which is done now if it was not yet."""
    finetuned, _, data, _ = settings
    args = _evaluated(comparison, row, folder, finetuned.block_size)
    file = Path(args.output_dir, "results.json")
    if file.is_file():
        results: Results = json.loads(file.read_text(encoding="utf-8"))
        given = json.loads(json.dumps({"settings": asdict(args.protocol()), "probes": _asked(args)}))
        if all(results.get(part, {}).get(name) == value for part in given for name, value in given[part].items()):
            return results
    elif list(folder.glob(_WEIGHTS)):
        # Of the baselines those that are made for this row's model.
        shell = check_model(row, str(folder), dtype=args.dtype, attn_implementation=None).shell
        fitting = [name for name in args.baselines or () if name == ALL or BASELINES[name].fits(shell)]
        return compare(replace(args, baselines=fitting), data)
    raise InputError(
        f"{folder} holds a run without this evaluation, and no weights; give another output_dir, or remove that run"
    )


def _asked(args: ExtrapolateArguments) -> dict[str, Any]:
    probe = args.probe()
    return {} if probe is None else asdict(probe)


def _by_length(evaluations: Iterable[Results]) -> Iterator[dict[str, Any]]:
    """Means over seeds: perplexities in the sliding window (geometric), and the share of each probe that was found."""
    found: dict[tuple[str, str, int], list[float | None]] = {}
    for results in map(Comparison, evaluations):
        for row in results["rows"]:
            if row["protocol"] == SLIDING:
                key = (results.curve_name(row["model"], row["context"]), _PERPLEXITY, row["length"])
                found.setdefault(key, []).append(row["perplexity"])
        for row in results["probes"]["rows"] if "probes" in results else ():
            if row["depth"] is None:
                key = (results.curve_name(row["model"], row["context"]), row["task"], row["length"])
                found.setdefault(key, []).append(row["found"] / row["cases"] if row["status"] == OK else None)
    for (name, value, length), each in found.items():
        known = [one for one in each if one is not None]
        mean = statistics.geometric_mean if value == _PERPLEXITY else statistics.fmean
        yield {"row": name, "value": value, "length": length, "mean": mean(known) if known == each else None}


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
