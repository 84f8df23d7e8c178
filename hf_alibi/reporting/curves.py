"""How the numbers of a result file are read: as lines over length, with a name each, and as text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .results import Results

__all__ = [
    "curve",
    "curve_name",
    "curves",
    "format_interval",
    "format_value",
    "listed",
    "markdown_table",
    "protocol_lengths",
    "protocol_title",
    "protocols",
    "stride_words",
    "times",
    "tokens_seen",
]

_TIMES = "\N{MULTIPLICATION SIGN}"


def protocols(results: Results) -> list[str]:
    """The protocols of a result, the one first that shows what distant context does."""
    return list(dict.fromkeys(row["protocol"] for row in results["rows"]))


def protocol_title(results: Results, protocol: str) -> str:
    """Name of a protocol with its stride."""
    if protocol == "sliding":
        return f"Sliding window, stride {stride_words(results)}"
    return {"non_overlapping": "Non-overlapping windows"}.get(protocol, protocol)


def stride_words(results: Results) -> str:
    """How far a sliding window moves on, in words."""
    stride = results["settings"]["stride"]
    return "an eighth of the length" if stride is None else f"{stride} tokens"


def tokens_seen(results: Results, protocol: str) -> list[str]:
    """How many tokens a scored token sees before it at each length under a protocol, such as "225–256"."""
    seen = {
        row["length"]: (row["fewest_seen"], row["most_seen"])
        for row in results["rows"]
        if row["protocol"] == protocol and row["context"] != "cropped"
    }
    return [f"{fewest}–{most}" if fewest < most else str(most) for _, (fewest, most) in sorted(seen.items())]


def protocol_lengths(results: Results, protocol: str) -> list[int]:
    """Lengths evaluated under a protocol."""
    return sorted({row["length"] for row in results["rows"] if row["protocol"] == protocol})


def curves(results: Results) -> list[tuple[str, str]]:
    """Models with their contexts, each baseline right after its model."""
    pairs = dict.fromkeys((row["model"], row["context"]) for row in results["rows"])
    models = list(dict.fromkeys(model for model, _ in pairs))
    return sorted(pairs, key=lambda pair: models.index(pair[0]))


def curve(results: Results, model: str, protocol: str, context: str) -> list[Mapping[str, Any]]:
    """Rows of one model, protocol and context, shortest length first."""
    wanted = {"model": model, "protocol": protocol, "context": context}
    rows = [row for row in results["rows"] if wanted.items() <= row.items()]
    return sorted(rows, key=lambda row: row["length"])


def curve_name(results: Results, model: str, context: str) -> str:
    """What a model in a context is called: the model alone, "..., cropped to 256", or with the label of a baseline."""
    if context == "full":
        return model
    if context == "cropped":
        return f"{model}, cropped to {results['settings']['train_length']}"
    return f"{model}, {results['models'][model]['baselines'][context]}"


def times(length: int, train_length: int) -> str:
    """A length in units of the training length."""
    return f"{length / train_length:.3g} {_TIMES}"


def format_value(value: float | None) -> str:
    """Four significant digits and at most three decimals, or a hyphen if there is no number.

    >>> format_value(6.0), format_value(19.7321), format_value(1330.4), format_value(None)
    ('6.000', '19.73', '1330', '-')
    """
    if value is None:
        return "-"
    return f"{value:.{max(0, 3 - math.floor(math.log10(max(value, 1.0))))}f}"


def format_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A value with its interval, to the digits that the value has.

    >>> format_interval(19.7321, 19.1, 20.4), format_interval(None, None, None)
    ('19.73 [19.10, 20.40]', '-')
    """
    if value is None or low is None or high is None:
        return format_value(value)
    return f"{format_value(value)} [{format_value(low)}, {format_value(high)}]"


def listed(items: Sequence[object], last: str = "and") -> str:
    """Items in a row of words.

    >>> listed([256, 512, 1024])
    '256, 512 and 1024'
    """
    *first, end = map(str, items)
    return f"{', '.join(first)} {last} {end}" if first else end


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table: the first column left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *escaped))
