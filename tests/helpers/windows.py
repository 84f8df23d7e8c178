"""Windowed attention with blocks so small that everything it can read occurs within a hundred tokens."""

from contextlib import contextmanager

import pytest
import torch

from hf_alibi.attention.call import AttentionCall
from hf_alibi.attention.layer_slopes import HeadSlopes
from hf_alibi.attention.sdpa import far_keys, parts, windowed
from hf_alibi.attention.sdpa.reads import report_reads
from hf_alibi.attention.sdpa.segments import Segment
from hf_alibi.attention.tolerance import exact_tolerance


def whole(query, key):
    return [Segment(slice(None), slice(0, query.shape[2]), slice(0, key.shape[2]))]


def windowed_attention(query, key, value, slopes, scaling, *, segments, tolerance=None, sink_tokens=0):
    slopes = HeadSlopes(torch.as_tensor(slopes), sink_tokens=sink_tokens)
    tolerance = exact_tolerance(query.dtype) if tolerance is None else tolerance
    call = AttentionCall(query, key, value, None, slopes, scaling, tolerance)
    return windowed.windowed_attention(call, segments)


def attend(query, key, value, slopes, tolerance=None):
    slopes = torch.as_tensor(slopes, dtype=torch.float64)
    scaling = query.shape[-1] ** -0.5
    return windowed_attention(query, key, value, slopes, scaling, segments=whole(query, key), tolerance=tolerance)


@contextmanager
def small_blocks(block_min=4, block_max=16, nats=8.0, flat=1.0, group=16, threads=1):
    """Inside, gives what windowed attention says of each segment that it works on."""
    reports = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_BLOCK_MIN", block_min)
        patch.setattr(parts, "_BLOCK_MAX", block_max)
        patch.setattr(parts, "_BLOCK_NATS", nats)
        patch.setattr(parts, "_FLAT_NATS", flat)
        patch.setattr(far_keys, "_GROUP", group)
        patch.setattr(windowed, "report_reads", lambda **report: [reports.append(report), report_reads(**report)])
        patch.setattr(windowed, "recording", lambda: True)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        yield reports


def is_near(span, offset):
    """Whether a span ends at its own queries, so that the future is hidden in it."""
    return span.columns is None and span.key + span.keys == offset + span.query + span.rows


def pairs_read(spans, queries, keys):
    """(queries, keys), how often each pair is read, from nothing but what a span says."""
    count = torch.zeros(queries, keys, dtype=torch.long)
    for span in spans:
        for block in range(span.blocks):
            begin = span.key + block * span.step
            columns = torch.arange(begin, begin + span.keys) if span.columns is None else span.columns
            assert len(columns) == span.keys
            assert columns.min() >= 0
            row = span.query + block * span.rows
            assert row + span.rows <= queries
            count[row : row + span.rows].index_add_(1, columns, torch.ones(span.rows, span.keys, dtype=torch.long))
    return count


def pairs_of(report, head):
    """bool (queries, keys), what a head read; no pair twice, and nothing of the future."""
    queries, keys = report["queries"], report["keys"]
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if head not in report["spans"]:
        return causal
    spans = report["spans"][head]
    count = pairs_read(spans, queries, keys)
    assert count[causal].max() <= 1
    far = pairs_read([span for span in spans if not is_near(span, keys - queries)], queries, keys)
    assert not far[~causal].any()
    return count.bool() & causal


def causal_distance(queries, keys):
    """(queries, keys), negative for the future."""
    return torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
