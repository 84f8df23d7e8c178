"""95 % confidence intervals: a bootstrap over documents for mean losses, Wilson's for proportions. Pure maths."""

import math
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

__all__ = [
    "BLOCK_TOKENS",
    "FEWEST_DOCUMENTS",
    "LEVEL",
    "interval",
    "resampled_means",
    "resampling_units",
    "share_difference",
    "wilson",
]

LEVEL = 0.95
# Below this number of documents a bootstrap over them says little.
FEWEST_DOCUMENTS = 20
BLOCK_TOKENS = 256

_TAIL = (1 - LEVEL) / 2
# Counts of units in resamples that may stand in memory at a time.
_ENTRIES = 2**22


def resampling_units(documents: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Choose what is drawn again and again: documents, or if these are too few, blocks of neighbouring tokens.

    `documents`, shape (tokens,), has a number for the document of each token. Returns the number of the unit of each
    token, int64 from 0 without gaps and of the same shape, and a description: "unit", "units" (how many), "documents"
    and "block_tokens" (None for documents). Blocks have 256 tokens, or fewer if that would make less than 20 blocks.
    """
    units, found = documents.unique_consecutive(return_inverse=True)
    if len(units) >= FEWEST_DOCUMENTS:
        return found, {"unit": "documents", "units": len(units), "documents": len(units), "block_tokens": None}
    block = max(1, min(BLOCK_TOKENS, len(documents) // FEWEST_DOCUMENTS))
    found = torch.arange(len(documents)) // block
    return found, {"unit": "blocks", "units": int(found[-1]) + 1, "documents": len(units), "block_tokens": block}


def resampled_means(losses: Tensor, units: Tensor, *, resamples: int = 2000, seed: int = 0) -> Tensor:
    """Means of losses under the bootstrap: units are drawn with replacement, every token of a unit counts.

    Args:
        losses: shape (rows, tokens), of the same tokens in each row.
        units: shape (tokens,), int64, the unit of each token, as `resampling_units` gives it.
        resamples: how many.
        seed: of the draws, which are the same for all rows. So a difference between two rows in one resample is that of
            a paired comparison.

    Returns float64 of shape (resamples, rows).
    """
    count = int(units.max()) + 1
    sums = torch.zeros(count, len(losses), dtype=torch.float64)
    for index, row in enumerate(losses):
        sums[:, index] = torch.bincount(units, weights=row.double(), minlength=count)
    sizes = torch.bincount(units, minlength=count).double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    at_a_time = max(1, _ENTRIES // count)
    for first in range(0, resamples, at_a_time):
        drawn = torch.randint(count, (min(at_a_time, resamples - first), count), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(()).double().expand_as(drawn)
        )
        means.append(times @ sums / (times @ sizes)[:, None])
    return torch.cat(means)


def interval(values: Tensor) -> tuple[float, float]:
    """The percentile interval of resampled values, shape (resamples,)."""
    low, high = values.quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=values.dtype)).tolist()
    return low, high


def wilson(found: int, cases: int) -> tuple[float, float]:
    """Wilson's interval for a proportion (Wilson 1927): sensible at 0, at 1 and for few cases.

    >>> [round(end, 3) for end in wilson(10, 10)]
    [0.722, 1.0]
    """
    ends = binomtest(found, cases).proportion_ci(LEVEL, method="wilson")
    return float(ends.low), float(ends.high)


def share_difference(found: int, cases: int, other_found: int, other_cases: int) -> tuple[float, float]:
    """Newcombe's interval for one proportion less another, from their Wilson intervals (Newcombe 1998, method 10).

    >>> [round(end, 3) for end in share_difference(24, 24, 18, 24)]
    [0.06, 0.449]
    """
    share, other = found / cases, other_found / other_cases
    (low, high), (other_low, other_high) = wilson(found, cases), wilson(other_found, other_cases)
    difference = share - other
    return (
        difference - math.hypot(share - low, other_high - other),
        difference + math.hypot(high - share, other - other_low),
    )
