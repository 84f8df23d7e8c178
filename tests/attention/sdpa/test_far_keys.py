"""Which keys a head must read: never too few for the tolerance, no pair twice, none of the future."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.windows import pairs_read
from hf_alibi.attention.sdpa import far_keys as reach
from hf_alibi.attention.sdpa.far_keys import Kept, Span, far_spans, kept_blocks


def far_pairs(queries, keys, block):
    """bool (queries, keys): keys more than a block before the first query of the query's block."""
    first = torch.arange(queries) // block * block + keys - queries
    return torch.arange(keys) < (first - block)[:, None]


def key_blocks(queries, keys, block):
    """(keys,) index of the block that each key is in: near keys start where a block does."""
    return (torch.arange(keys) + -(keys - queries) % block) // block


@st.composite
def kept_groups(draw):
    """What `kept_blocks` may say, at random: any far block kept or not, any group missing."""
    block = draw(st.sampled_from([1, 2, 3, 4]))
    queries, cached = draw(st.integers(1, 40)), draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    count = -(-queries // block)
    far = torch.arange(count) - 1 + cached // block + (cached % block > 0)
    per_group = draw(st.integers(1, 6))
    # Only the last block may be short, and no group has both it and others.
    ends = [*range(0, queries // block, per_group), queries // block]
    groups = []
    for first, end in zip(ends, [*ends[1:], count], strict=True):
        stop = int(far[first:end].max()) if first < end else 0
        if stop <= 0 or (draw(st.booleans()) and draw(st.booleans())):
            continue
        start = draw(st.integers(0, stop - 1))
        share = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
        kept = torch.rand(end - first, stop - start, generator=generator) < share
        # Most often keys that are kept lie just behind the near ones.
        behind = far[first:end, None] - start - torch.arange(stop - start)
        kept |= behind <= draw(st.integers(0, 3))
        groups.append(Kept(first, start, kept & (behind > 0), far[first:end]))
    return block, queries, queries + cached, groups


@settings(max_examples=400, deadline=None)
@given(case=kept_groups())
def test_spans_read_every_kept_block_once_and_never_near_or_future_keys(case):
    block, queries, keys, groups = case
    read = pairs_read(far_spans(groups, queries, keys, block), queries, keys)
    far = far_pairs(queries, keys, block)
    assert read.max() <= 1
    assert not read[~far].any()
    column = key_blocks(queries, keys, block)
    for group in groups:
        for index, row in enumerate(group.blocks):
            kept = torch.isin(column, group.start + row.nonzero()[:, 0])
            begin = (group.first + index) * block
            assert read[begin : begin + block, kept].all()


def test_spans_of_a_plain_window_are_one_call():
    """A fixed example, so that a window is a window and not many single blocks."""
    far = torch.arange(4, 8)
    kept = (far[:, None] - torch.arange(7) <= 2) & (far[:, None] > torch.arange(7))
    assert far_spans([Kept(5, 0, kept, far)], 36, 36, 4) == [Span(20, 4, 4, 8, 8, 4)]


def test_a_first_token_that_all_queries_keep_does_not_make_the_window_wide():
    far = torch.arange(8, 12)
    kept = (far[:, None] - torch.arange(11) == 1) | (torch.arange(11) == 0)
    window, remote = far_spans([Kept(9, 0, kept, far)], 52, 52, 4)
    assert (window.keys, window.step, remote.blocks) == (4, 4, 1)
    assert remote.columns.tolist() == [0, 1, 2, 3]


def near_log_sum_exp(logits, near):
    return logits.masked_fill(~near, -math.inf).logsumexp(-1)


def mass_left_out(query, key, slope, scaling, read):
    """Largest share of a row's weights on keys that are not read, in float64; NaN where it cannot be told."""
    queries, keys = read.shape
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    logits = query.double() @ key.double().mT * scaling - slope * distance
    weights = logits.masked_fill(distance < 0, -math.inf).softmax(-1)
    return weights.masked_fill(read, 0.0).sum(-1).max().item()


@st.composite
def heads_of_data(draw):
    """Queries and keys of one head: norms of all sizes, sinks, far outliers, wide blocks."""
    queries, cached, width = draw(st.integers(1, 60)), draw(st.integers(0, 40)), draw(st.sampled_from([1, 3, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    keys = queries + cached
    query, key = (torch.randn(2, n, width, generator=generator) for n in (queries, keys))
    query = query * draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    key = key * draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    common = torch.randn(width, generator=generator)
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, keys - 1))
        some = slice(begin, begin + draw(st.integers(1, 6)))
        kind = draw(st.sampled_from(["outlier", "aligned", "opposite", "sink", "equal", "growing"]))
        if kind == "outlier":
            key[:, some] *= 1000
        elif kind in ("aligned", "opposite"):
            chosen = query[:, draw(st.integers(0, queries - 1)), None]
            key[:, some] = chosen * draw(st.sampled_from([1.0, 30.0])) * (1 if kind == "aligned" else -1)
        elif kind == "sink":
            key[:, some], query = common * 5, query + common
        elif kind == "equal":
            key[:] = common
        else:  # logits that fall from the first key on, against the bias
            key = key + common * draw(st.sampled_from([0.1, 1.0])) * torch.arange(keys, 0, -1)[:, None]
            query = query + common
    return query, key


@settings(max_examples=400, deadline=None)
@given(
    data=heads_of_data(),
    slope=st.sampled_from([0.0, 1e-40, 1e-4, 0.02, 0.1, 0.5, 1.0, 3.0, 20.0, 1e4]),
    block=st.sampled_from([1, 2, 4, 8]),
    group=st.sampled_from([1, 8, 16, 2048]),
    tolerance=st.sampled_from([1e-17, 1e-8, 1e-3, 0.1, 0.6]),
    negative=st.booleans(),
)
def test_what_is_left_out_weighs_less_than_the_tolerance_in_every_row(data, slope, block, group, tolerance, negative):
    query, key = data
    batch, queries, width = query.shape
    keys = key.shape[1]
    scaling = -(width**-0.5) if negative else width**-0.5
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    near = (distance >= 0) & ~far_pairs(queries, keys, block)
    logits = query.double() @ key.double().mT * scaling - slope * distance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "_GROUP", group)
        kept = kept_blocks(
            query,
            key,
            (query.norm(dim=-1), key.norm(dim=-1).amax(dim=0)),
            near_log_sum_exp(logits, near).float(),
            slope=slope,
            scaling=scaling,
            block=block,
            tolerance=tolerance,
        )
        read = pairs_read(far_spans(kept, queries, keys, block), queries, keys)
    assert read.max() <= 1
    assert not read[~far_pairs(queries, keys, block)].any()
    for row in range(batch):
        assert mass_left_out(query[row], key[row], slope, scaling, near | read.bool()) <= tolerance


def spans_of(query, key, slope, block=4, tolerance=1e-8, near_sum=True):
    """Far pairs that are read, (queries, keys), of one sequence; from the sum over near keys, or over all."""
    queries, keys = query.shape[1], key.shape[1]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    near = (distance >= 0) & ~(far_pairs(queries, keys, block) & near_sum)
    lse = near_log_sum_exp(query.double() @ key.double().mT - slope * distance, near).float()
    norms = query.norm(dim=-1), key.norm(dim=-1).amax(dim=0)
    kept = kept_blocks(query, key, norms, lse, slope=slope, scaling=1.0, block=block, tolerance=tolerance)
    return pairs_read(far_spans(kept, queries, keys, block), queries, keys)


def test_nothing_is_left_out_where_the_slope_is_zero():
    query, key = torch.randn(2, 1, 40, 8)
    assert torch.equal(spans_of(query, key, 0.0), far_pairs(40, 40, 4).long())


def test_less_is_read_the_looser_the_tolerance():
    query, key = torch.randn(2, 1, 400, 8) / 3
    read = [int(spans_of(query, key, 0.5, tolerance=tolerance).sum()) for tolerance in (1e-12, 1e-8, 1e-3, 0.1)]
    assert read == sorted(read, reverse=True)
    assert read[0] > 1.5 * read[2] > 2.5 * read[3]


def test_a_sink_is_read_and_the_keys_between_are_not(monkeypatch):
    monkeypatch.setattr(reach, "_GROUP", 16)
    query, key = torch.zeros(2, 1, 100, 8)
    query[..., 0], key[:, 0, 0] = 10.0, 30.0
    read = spans_of(query, key, 1.0)
    assert read[64:, :4].all()
    assert not read[64:, 4:20].any()
    assert not read[80:, 4:36].any()


def test_a_group_whose_far_keys_are_all_ruled_out_beside_one_that_reads():
    """The first blocks have no far keys at all, and the last queries do: 1025 to 1535 tokens by real block sizes."""
    query, key = torch.randn(2, 1, 9, 8)
    assert torch.equal(spans_of(query, key, 0.01), far_pairs(9, 9, 4).long())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key"])
def test_what_cannot_be_compared_is_read(bad, which):
    query, key = torch.randn(2, 1, 60, 8) / 3
    plain = spans_of(query, key, 8.0)
    {"query": query, "key": key}[which][0, 17, 3] = bad
    read = spans_of(query, key, 8.0)
    far = far_pairs(60, 60, 4)
    assert not plain.any()
    if which == "key":
        assert torch.equal(read[:, 17] > 0, far[:, 17])
    else:
        assert torch.equal(read[17] > 0, far[17])


def test_what_is_read_does_not_depend_on_the_last_token():
    query, key = torch.randn(2, 1, 61, 8)
    before = spans_of(query, key, 1.0)
    assert 0 < before.sum() < far_pairs(61, 61, 4).sum()
    key[:, -1] *= 1e7
    assert torch.equal(spans_of(query, key, 1.0)[:-1], before[:-1])


def mass_by_what_is_read(query, key, slope, tolerance, block=4, near_sum=True):
    queries, keys = query.shape[1], key.shape[1]
    near = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) & ~far_pairs(queries, keys, block)
    read = spans_of(query, key, slope, block, tolerance, near_sum).bool()
    assert not read.equal(far_pairs(queries, keys, block))
    return mass_left_out(query[0], key[0], slope, 1.0, near | read)


@pytest.mark.parametrize("size", [1e4, 1e6, 2e7])
def test_rounding_of_large_logits_leaves_out_nothing_that_counts(monkeypatch, size):
    """Keys that are all equal leave the bound no reserve, and float32 rounds logits of 1e7 by nats."""
    monkeypatch.setattr(reach, "_GROUP", 1)
    query, key = torch.randn(1, 1000, 4), torch.randn(4).expand(1, 1000, -1)
    query, key = (torch.nn.functional.normalize(x, dim=-1) * size**0.5 for x in (query, key))
    assert mass_by_what_is_read(query, key, 0.5, 0.1, block=1, near_sum=False) <= 0.1


@pytest.mark.parametrize("tolerance", [0.2, 1e-3])
@pytest.mark.parametrize("size", [0.0, 5.0])
def test_the_bound_is_tight_where_all_logits_are_equal(monkeypatch, tolerance, size):
    """No more is read than must be: what is left out takes half of the tolerance and more, given the row's true sum."""
    monkeypatch.setattr(reach, "_GROUP", 1)
    query = key = torch.ones(1, 600, 1) * size**0.5
    assert tolerance / 2 < mass_by_what_is_read(query, key, 0.05, tolerance, block=2, near_sum=False) <= tolerance


def test_no_more_norms_than_far_keys_are_needed_to_leave_all_out():
    """Queries and keys of norm 1: beyond 19 nats and 2 of the logits nothing can count."""
    query, key = (torch.nn.functional.normalize(torch.randn(1, 200, 8), dim=-1) for _ in range(2))
    assert not spans_of(query, key, 6.0).any()
    assert spans_of(query, key, 2.0).any()
