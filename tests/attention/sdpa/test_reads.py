"""What `record_reads` tells is what the spans say, counted pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.attention import layer, qkv, run
from helpers.windows import attend, causal_distance, pairs_of, small_blocks, windowed_attention
from hf_alibi.attention.sdpa.reads import Reads, record_reads
from hf_alibi.attention.sdpa.segments import Segment


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 60),
    cached=st.integers(0, 40),
    group=st.sampled_from([8, 2048]),
    sink=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pairs_and_windows_are_those_counted_one_by_one(batch, queries, cached, group, sink, seed):
    query, key, value = qkv(batch, 4, 2, queries, queries + cached, 4, seed=seed)
    if sink:
        query[..., 0] += 3.0
        key[:, :, 0, 0] += 100.0
    with small_blocks(group=group) as reports, record_reads() as reads:
        attend(query, key, value, [3.0, 1.0, 0.3, 0.01])
    (read,) = reads
    distance = causal_distance(queries, queries + cached)
    causal = int((distance >= 0).sum()) * batch
    assert (read.batch, read.queries, read.keys) == (batch, queries, queries + cached)
    assert read.causal_pairs == causal
    for head in range(4):
        pairs = pairs_of(reports[0], head)
        assert read.pairs[head] == batch * int(pairs.sum())
        assert read.windows[head] == int(distance[pairs].max())
        assert read.kept[head] == read.pairs[head] / causal


def test_every_segment_is_one_record_in_their_order():
    query, key, value = qkv(2, 2, 2, 400, 400, 8)
    segments = [
        Segment(slice(0, 1), slice(100, 400), slice(100, 400)),
        Segment(slice(1, 2), slice(0, 150), slice(0, 150)),
        Segment(slice(1, 2), slice(200, 350), slice(150, 350)),
    ]
    with record_reads() as reads:
        windowed_attention(query, key, value, torch.tensor([0.5, 0.001]), 1.0, segments=segments)
    assert [(read.batch, read.queries, read.keys) for read in reads] == [(1, 300, 300), (1, 150, 150), (1, 150, 200)]
    assert [read.kept[1] for read in reads] == [1.0, 1.0, 1.0]
    assert reads[0].kept[0] < 1.0


def test_the_kept_share_counts_pairs_not_calls():
    read = Reads(batch=2, queries=3, keys=5, pairs=(24, 12), windows=(4, 1))
    assert read.causal_pairs == 24
    assert read.kept == (1.0, 0.5)


def work():
    attend(*qkv(1, 1, 1, 20, 20, 4), [0.1])


def test_records_nest_and_end_with_their_block():
    work()
    with record_reads() as outer:
        with record_reads() as inner:
            pass
        work()
        assert (len(outer), len(inner)) == (1, 0)
        with record_reads() as second:
            work()
        work()
        with pytest.raises(KeyError), record_reads() as failed:
            raise KeyError
        work()
    work()
    assert (len(outer), len(inner), len(second), len(failed)) == (4, 0, 1, 0)
    assert outer[1] == second[0]


def test_the_backward_pass_is_not_recorded_again():
    inputs = [x.requires_grad_() for x in qkv(1, 1, 1, 200, 200, 4)]
    with record_reads() as reads:
        attend(*inputs, [0.5]).sum().backward()
    assert len(reads) == 1


@pytest.mark.parametrize("mask", [None, "padding"])
def test_the_sdpa_backend_is_recorded(mask):
    inputs = qkv(1, 4, 2, 400, 400, 8)
    if mask:
        mask = torch.ones(1, 1, 400, 400, dtype=torch.bool).tril()
        mask[..., :90] = False
    with record_reads() as reads:
        run("sdpa", *inputs, mask, layer(4))
        run("eager", *inputs, mask, layer(4))
    tokens = 400 if mask is None else 310
    assert [(read.queries, read.keys) for read in reads] == [(tokens, tokens)]
