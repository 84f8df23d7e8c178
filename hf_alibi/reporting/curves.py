"""How the numbers of a result file are read: as curves over length, with a name each, and as text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.probes import KNOWN
from ..evaluation.protocol import CROPPED, FULL, NON_OVERLAPPING, OK, SLIDING

__all__ = [
    "Comparison",
    "format_interval",
    "format_value",
    "listed",
    "markdown_table",
    "times",
]

_TIMES = "\N{MULTIPLICATION SIGN}"


class Comparison(dict[str, Any]):
    """Results as `hf-alibi extrapolate` writes them, read as curves over length."""

    def protocols(self) -> list[str]:
        """The protocols of a result, the one first that shows what distant context does."""
        return list(dict.fromkeys(row["protocol"] for row in self["rows"]))

    def protocol_title(self, protocol: str) -> str:
        """Name of a protocol with its stride."""
        if protocol == SLIDING:
            return f"Sliding window, stride {self.stride_words()}"
        return {NON_OVERLAPPING: "Non-overlapping windows"}.get(protocol, protocol)

    def probe_tasks(self, *, known: bool = True) -> list[str]:
        """The tasks that models were asked.

        If they were asked only what they know, without the tasks that no model knows; with `known` False, these.
        """
        if "probes" not in self:
            return []
        probe = self["probes"]
        right = {
            row["task"]
            for row in probe["rows"]
            if row["depth"] is None and row["status"] == OK and row["found"] >= KNOWN * row["cases"]
        }
        return [task for task in probe["tasks"] if (not probe["if_known"] or task in right) == known]

    def stride_words(self) -> str:
        """How far a sliding window moves on, in words."""
        stride = self["settings"]["stride"]
        return "an eighth of the length" if stride is None else f"{stride} tokens"

    def tokens_seen(self, protocol: str) -> list[str]:
        """How many tokens a scored token sees before it at each length under a protocol, such as "225–256"."""
        seen = {
            row["length"]: (row["fewest_seen"], row["most_seen"])
            for row in self["rows"]
            if row["protocol"] == protocol and row["context"] != CROPPED
        }
        return [f"{fewest}–{most}" if fewest < most else str(most) for _, (fewest, most) in sorted(seen.items())]

    def protocol_lengths(self, protocol: str) -> list[int]:
        """Lengths evaluated under a protocol."""
        return sorted({row["length"] for row in self["rows"] if row["protocol"] == protocol})

    def curves(self) -> list[tuple[str, str]]:
        """Models with their contexts, each baseline right after its model."""
        pairs = dict.fromkeys((row["model"], row["context"]) for row in self["rows"])
        models = list(dict.fromkeys(model for model, _ in pairs))
        return sorted(pairs, key=lambda pair: models.index(pair[0]))

    def curve(self, model: str, protocol: str, context: str) -> list[Mapping[str, Any]]:
        """Rows of one model, protocol and context, shortest length first."""
        wanted = {"model": model, "protocol": protocol, "context": context}
        rows = [row for row in self["rows"] if wanted.items() <= row.items()]
        return sorted(rows, key=lambda row: row["length"])

    def curve_name(self, model: str, context: str) -> str:
        """What a model in a context is called: the model, "..., cropped to 256", or with the label of a baseline."""
        if context == FULL:
            return model
        if context == CROPPED:
            return f"{model}, cropped to {self['settings']['train_length']}"
        return f"{model}, {self['models'][model]['baselines'][context]}"


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
