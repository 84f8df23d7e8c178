"""The report of a comparison in words and tables, made from a result file alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import Results, replacing

__all__ = ["format_value", "protocol_title", "table_rows", "write_report"]

# Gaps below this are called equal: seeds alone move a perplexity by more.
_EQUAL = 0.005

_TIMES = "\N{MULTIPLICATION SIGN}"

_INTRODUCTION = (
    "The same {tokens} tokens of held-out text are scored at every length and for every model; only the "
    "context before them varies. Every token counts once and equally."
)

_PROTOCOLS = {
    "sliding": (
        "Windows of the given length move by {stride} tokens and score only their last {stride} targets, "
        "which have at most {before} tokens of context less than the length. A difference between two "
        "lengths is what the model makes of the tokens further away."
    ),
    "non_overlapping": (
        "Windows lie end to end and score all their targets, the first of which have almost no context. "
        "Longer windows have fewer such targets, so this perplexity falls with length even for a model "
        "that uses only the few tokens before a target (the early-token curse): a falling curve here is "
        "no evidence that distant context is used."
    ),
}

# What a ratio of perplexities below and above 1 means under each protocol.
_READINGS = {
    "sliding": ("the added context helps", "the added context hurts"),
    "non_overlapping": ("it falls, as it does where fewer targets lack context", "the added context hurts"),
}

_WHY_CROPPED = (
    "A cropped model still reads the most recent {train_length} tokens, which hold most of what helps to "
    "predict the next one. So cropping, which needs no training, is a strong baseline in perplexity; a "
    "model that extrapolates has to be measured against it, not only against one that fails."
)

_LIMITS = (
    "A flat perplexity curve shows that length does no harm. It is not long-context use: a model that "
    "ignored everything beyond the training length would have one too. Whether distant facts are found "
    "takes a retrieval test.",
    "Differences of a percent or so can come from the seed of the training and from the choice of text: "
    "this is one run on one text.",
    "Perplexities compare only between models with the same tokenizer; bits per byte compare between tokenizers too.",
    "Where documents are shorter than the window, the added context is other documents.",
)


def write_report(results: Results, path: Path) -> None:
    """Write the Markdown report of an extrapolation run to `path`.

    Images are linked as `perplexity.png` and `position_loss.png` beside it.
    """
    sections = [
        "# Perplexity beyond the training length",
        _compared(results),
        *(_protocol_section(results, protocol) for protocol in _protocols(results)),
        "![Perplexity against evaluation length, one panel a protocol](perplexity.png)",
        "## What the numbers say",
        "\n".join(f"- {sentence}" for sentence in _statements(results)),
        *_cropped_note(results),
        "## Loss by position",
        _position_text(results),
        "![Loss against the position in the window](position_loss.png)",
        "## What the numbers do not show",
        "\n".join(f"- {limit}" for limit in _LIMITS),
        "## How it was run",
        _environment(results),
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def protocol_title(results: Results, protocol: str) -> str:
    """Name of a protocol with its stride."""
    if protocol == "sliding":
        return f"Sliding window, stride {results['settings']['stride']}"
    return {"non_overlapping": "Non-overlapping windows"}.get(protocol, protocol)


def table_rows(results: Results, protocol: str, value: str) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each model and context, its name and `value` (a row's field) at each length as text."""
    for model, context in _lines(results):
        line = _line(results, model, protocol, context)
        cells = [format_value(row[value]) if row["status"] == "ok" else "cannot run" for row in line]
        yield _name(results, model, context), cells


def format_value(value: float | None) -> str:
    """Four significant digits and at most three decimals, or a hyphen where there is no number.

    >>> format_value(6.0), format_value(19.7321), format_value(1330.4), format_value(None)
    ('6.000', '19.73', '1330', '-')
    """
    if value is None:
        return "-"
    return f"{value:.{max(0, 3 - math.floor(math.log10(max(value, 1.0))))}f}"


def _compared(results: Results) -> str:
    settings = results["settings"]
    header = ["model", "source", "type", "positions", "attention", "dtype", "parameters"]
    lines = [
        [
            name,
            f"`{model['source']}`",
            model["model_type"],
            model["positions"],
            model["attention"],
            model["dtype"],
            f"{model['parameters']:,}",
        ]
        for name, model in results["models"].items()
    ]
    introduction = _INTRODUCTION.format(tokens=f"{settings['scored_tokens']:,}")
    text = settings.get("text")
    source = f" Text: {text}." if text else ""
    train_length = f" Training length: {settings['train_length']} tokens."
    return f"{introduction}{source}{train_length}\n\n{_table(header, lines)}"


def _protocol_section(results: Results, protocol: str) -> str:
    settings = results["settings"]
    stride = settings["stride"]
    lengths = [f"{length} ({_times(length, settings['train_length'])})" for length in sorted(settings["lengths"])]
    parts = [
        f"## {protocol_title(results, protocol)}",
        _PROTOCOLS.get(protocol, "").format(stride=stride, before=stride - 1),
    ]
    for value, title in (("perplexity", "Perplexity per token"), ("bits_per_byte", "Bits per byte")):
        lines = [[name, *cells] for name, cells in table_rows(results, protocol, value)]
        parts += [f"{title} (lower is better):", _table(["model", *lengths], lines)]
    return "\n\n".join(parts)


def _statements(results: Results) -> Iterator[str]:
    """Yield sentences computed from the numbers, for every model and protocol, whichever way they go."""
    for model in results["models"]:
        yield from _cannot_run(results, model)
        for protocol in _protocols(results):
            yield from _length_ratio(results, model, protocol)
    for protocol in _protocols(results):
        yield from _against_cropped(results, protocol)


def _cannot_run(results: Results, model: str) -> Iterator[str]:
    lines = _line(results, model, _protocols(results)[0], "full")
    stopped = [row for row in lines if row["status"] != "ok"]
    if not stopped:
        return
    reason = stopped[0]["status"].removeprefix("cannot run: ")
    limit = results["models"][model].get("position_limit")
    where = f" past {limit} tokens" if limit else ""
    missing = ", ".join(str(row["length"]) for row in stopped)
    yield f"**{model}** cannot run{where} ({reason}): it has no value at {missing}."


def _length_ratio(results: Results, model: str, protocol: str) -> Iterator[str]:
    """Compare the greatest length that a model runs at with the training length."""
    train_length = results["settings"]["train_length"]
    ran = [row for row in _line(results, model, protocol, "full") if row["status"] == "ok"]
    start = next((row for row in ran if row["length"] == train_length), None)
    if start is None or ran[-1]["length"] <= train_length:
        return
    ratio = ran[-1]["perplexity"] / start["perplexity"]
    helps, hurts = _READINGS.get(protocol, ("lower", "higher"))
    yield (
        f"**{model}**, {protocol_title(results, protocol).lower()}: perplexity at "
        f"{_times(ran[-1]['length'], train_length)} the training length is {format_value(ratio)} of that at 1 "
        f"{_TIMES} ({format_value(ran[-1]['perplexity'])} against {format_value(start['perplexity'])}; "
        f"lower is better): {_verdict(ratio, better=helps, worse=hurts)}."
    )


def _against_cropped(results: Results, protocol: str) -> Iterator[str]:
    """Compare each model at the greatest length with each cropped baseline."""
    longest = max(results["settings"]["lengths"])
    at_end = [row for row in results["rows"] if row["protocol"] == protocol and row["length"] == longest]
    for cropped in (row for row in at_end if row["context"] == "cropped" and row["status"] == "ok"):
        baseline = _name(results, cropped["model"], "cropped")
        for row in at_end:
            if row["context"] != "full" or row["status"] != "ok":
                continue
            ratio = row["perplexity"] / cropped["perplexity"]
            yield (
                f"**{row['model']}** at {longest} tokens against **{baseline}**, "
                f"{protocol_title(results, protocol).lower()}: {format_value(row['perplexity'])} against "
                f"{format_value(cropped['perplexity'])}, "
                f"{_verdict(ratio, better=_percent(ratio, 'lower'), worse=_percent(ratio, 'higher'))}."
            )


def _verdict(ratio: float, *, better: str, worse: str) -> str:
    """Say in words on which side of 1 a ratio of perplexities lies."""
    if abs(ratio - 1) < _EQUAL:
        return f"no difference to speak of (within {_EQUAL:.1%})"
    return f"{better} (better)" if ratio < 1 else f"{worse} (worse)"


def _percent(ratio: float, word: str) -> str:
    """Say how far a ratio lies from 1: as a percentage, or as a factor where that is easier to read."""
    return f"{ratio:.3g} times as high" if ratio >= 3 else f"{abs(ratio - 1):.1%} {word}"


def _cropped_note(results: Results) -> list[str]:
    if not any(row["context"] == "cropped" for row in results["rows"]):
        return []
    return [_WHY_CROPPED.format(train_length=results["settings"]["train_length"])]


def _position_text(results: Results) -> str:
    windows = ", ".join(
        f"{model}: {curve['windows']} windows of {curve['length']} tokens"
        for model, curve in results["position_loss"].items()
    )
    return (
        "Mean loss of the targets with a given number of tokens before them, over the non-overlapping "
        f"windows of the greatest length that a model runs at ({windows}). Few windows make the first "
        "positions noisy."
    )


def _environment(results: Results) -> str:
    environment, settings = results["environment"], results["settings"]
    packages = ", ".join(
        f"{name} {version}" for name, version in environment["packages"].items() if version is not None
    )
    commit = environment["git_commit"] or "not a checkout"
    return (
        f"Python {environment['python']}, {packages}; device: {environment['device']}; commit: {commit}. "
        f"Lengths {', '.join(map(str, settings['lengths']))}; {settings['scored_tokens']} tokens scored; "
        f"stride {settings['stride']}. All numbers are in `results.json` and `results.csv`."
    )


def _protocols(results: Results) -> list[str]:
    return list(dict.fromkeys(row["protocol"] for row in results["rows"]))


def _lines(results: Results) -> list[tuple[str, str]]:
    """Models with their contexts, each baseline right after its model."""
    pairs = dict.fromkeys((row["model"], row["context"]) for row in results["rows"])
    models = list(dict.fromkeys(model for model, _ in pairs))
    return sorted(pairs, key=lambda pair: models.index(pair[0]))


def _line(results: Results, model: str, protocol: str, context: str) -> list[Mapping[str, Any]]:
    """Rows of one model, protocol and context, shortest length first."""
    wanted = {"model": model, "protocol": protocol, "context": context}
    rows = [row for row in results["rows"] if wanted.items() <= row.items()]
    return sorted(rows, key=lambda row: row["length"])


def _name(results: Results, model: str, context: str) -> str:
    return f"{model}, cropped to {results['settings']['train_length']}" if context == "cropped" else model


def _times(length: int, train_length: int) -> str:
    return f"{length / train_length:.3g} {_TIMES}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table: the first column left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *escaped))
