"""Confidence intervals of a comparison: of each perplexity, and paired ones of the ratios that the report speaks of."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .intervals import LEVEL, interval, resampled_means, resampling_units
from .protocol import CROPPED, FULL

__all__ = ["Key", "with_intervals"]

_RESAMPLES = 2000
_SEED = 0
# exp overflows a float64 just above this.
_MAX_NATS = 709.0


class Key(NamedTuple):
    """Which number: the fields of its row."""

    model: str
    context: str
    protocol: str
    length: int


def with_intervals(
    rows: Sequence[Mapping[str, Any]],
    losses: Mapping[Key, Tensor],
    documents: Tensor,
    *,
    subjects: Sequence[str],
    train_length: int,
) -> dict[str, Any]:
    """Add 95 % bootstrap intervals to rows, and compare the rows that the report speaks of.

    Args:
        rows: with the fields of `ExtrapolationRow`.
        losses: nats of each scored token, shape (scored tokens,), of each row with numbers.
        documents: the number of the document of each scored token, int64 of the same shape.
        subjects: the models that are compared with all others at each length.
        train_length: each row at a greater length is compared with that of its own line at this length.

    Returns what goes into the results: "rows" with `perplexity_low` and `perplexity_high` (None if there is no
    number), "comparisons" and "intervals", how they were made. A comparison has the fields of both rows' keys and the
    `ratio` of the first perplexity to the second with its interval, `ratio_low` and `ratio_high`: a paired one, both
    perplexities being those of the same tokens in each resample.
    """
    units, description = resampling_units(documents)
    keys = list(losses)
    means = {key: float(losses[key].double().mean()) for key in keys}
    stacked = torch.stack([losses[key] for key in keys]) if keys else torch.empty(0, len(units))
    columns = resampled_means(stacked, units, resamples=_RESAMPLES, seed=_SEED)
    resampled = dict(zip(keys, columns.unbind(1), strict=True))

    def compared(first: Key, second: Key) -> dict[str, Any]:
        low, high = _exp(*interval(resampled[first] - resampled[second]))
        against = {f"against_{field}": value for field, value in second._asdict().items() if field != "protocol"}
        (ratio,) = _exp(means[first] - means[second])
        return {**first._asdict(), **against, "ratio": ratio, "ratio_low": low, "ratio_high": high}

    def bounded(row: Mapping[str, Any]) -> dict[str, Any]:
        key = Key(*(row[field] for field in Key._fields))
        low, high = _exp(*interval(resampled[key])) if key in resampled else (None, None)
        return {**row, "perplexity_low": low, "perplexity_high": high}

    return {
        "rows": [bounded(row) for row in rows],
        "comparisons": [compared(*pair) for pair in _pairs(keys, subjects, train_length)],
        "intervals": {"level": LEVEL, "resamples": _RESAMPLES, "seed": _SEED, **description},
    }


def _pairs(keys: Sequence[Key], subjects: Sequence[str], train_length: int) -> Iterator[tuple[Key, Key]]:
    """Each key with that of its line at the training length; each of a subject with those of all other lines."""
    for key in keys:
        start = key._replace(length=train_length)
        if key.length > train_length and key.context != CROPPED and start in keys:
            yield key, start
        if key.model not in subjects or key.context != FULL:
            continue
        for other in keys:
            if other[:2] != key[:2] and other[2:] == key[2:]:
                yield key, other


def _exp(*nats: float) -> tuple[float, ...]:
    return tuple(math.exp(min(value, _MAX_NATS)) for value in nats)
