"""Segments and rests describe a mask entry by entry, and attention by them is attention under the mask."""

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.attention import expected, largest, layer, qkv, run
from helpers.masks import packed, padded, triangle, without
from helpers.reference import slopes as alibi_slopes
from hf_alibi.attention.sdpa import segments as segments_module
from hf_alibi.attention.sdpa.reads import record_reads
from hf_alibi.attention.sdpa.segments import OtherQueries, Segment, segments_of

EXACT = 5e-6


def sliding(length, window):
    token = torch.arange(length)
    return triangle(length) & (token[:, None] - token < window)


def check_description(allowed, found, short):
    """Every query and key: in a segment as the segment says, in a rest anything, elsewhere nothing."""
    segments, rests = found
    described = torch.zeros(allowed[:, 0].shape, dtype=torch.bool)
    times = torch.zeros(allowed[:, 0].shape[:2], dtype=torch.long)
    for segment in segments:
        queries, keys = segment.queries, segment.keys
        times[segment.batch, queries] += 1
        described[segment.batch, queries, keys] = triangle(queries.stop - queries.start, keys.stop - keys.start)
        assert queries.stop - queries.start >= short
    for rest in rests:
        times[rest.batch, rest.queries] += 1
        described[rest.batch, rest.queries] = allowed[rest.batch, 0, rest.queries]
    sees = allowed[:, 0].any(dim=-1)
    assert torch.equal(described, allowed[:, 0])
    assert torch.equal(times, sees.long())
    return segments, rests


def segments_in(*masks):
    allowed = torch.stack(masks)[:, None]
    return check_description(allowed, segments_of(allowed), 128)


def whole(batch, start, stop, first=None):
    sequences = slice(None) if batch is None else slice(batch, batch + 1)
    return Segment(sequences, slice(start, stop), slice(start if first is None else first, stop))


def test_causal():
    assert segments_in(triangle(200), triangle(200)) == ([whole(0, 0, 200), whole(1, 0, 200)], [])


def test_padding():
    segments, rests = segments_in(padded(300, left=70), padded(300, right=90), padded(300, left=40, right=50))
    assert segments == [whole(0, 70, 300), whole(1, 0, 210), whole(2, 40, 250)]
    # Right padding sees the tokens before it.
    assert rests == [OtherQueries(slice(1, 2), slice(210, 300)), OtherQueries(slice(2, 3), slice(250, 300))]


def test_padding_queries_that_see_nothing_are_nowhere():
    mask = padded(300, left=70, right=30)
    mask[270:] = False
    assert segments_in(mask) == ([whole(None, 70, 270)], [])


def test_packed_documents_of_which_some_are_short():
    segments, rests = segments_in(packed(200, 20, 30, 150), packed(128, 272))
    assert segments == [whole(0, 0, 200), whole(0, 250, 400), whole(1, 0, 128), whole(1, 128, 400)]
    assert rests == [OtherQueries(slice(0, 1), slice(200, 250))]


def test_holes():
    """What comes before a hole is a segment; what sees across it is not."""
    assert segments_in(without(triangle(300), 150, 151)) == (
        [whole(None, 0, 150)],
        [OtherQueries(slice(None), slice(150, 300))],
    )
    # Queries in a hole see a run of keys, but not up to their own.
    assert segments_in(without(triangle(300), *range(150, 160))) == (
        [whole(None, 0, 150)],
        [OtherQueries(slice(None), slice(150, 300))],
    )


def test_a_hole_after_the_first_key_leaves_nothing():
    allowed = without(triangle(300), 1)[None, None]
    assert segments_of(allowed) is None


def test_a_chunk_after_a_static_cache_that_is_not_full():
    mask = torch.zeros(150, 1000, dtype=torch.bool)
    mask[:, 20:530] = triangle(150, 510)
    assert segments_in(mask) == ([Segment(slice(None), slice(0, 150), slice(20, 530))], [])


def test_sliding_windows_have_a_segment_only_where_they_begin():
    assert segments_in(sliding(400, 200)) == ([whole(None, 0, 200)], [OtherQueries(slice(None), slice(200, 400))])
    assert segments_of(sliding(400, 100)[None, None]) is None


def test_short_sequences_are_left_to_the_dense_form():
    assert segments_of(triangle(127)[None, None]) is None
    assert segments_of(triangle(128)[None, None]) is not None


def test_masks_of_heads_are_left_to_the_dense_form_unless_all_are_one():
    one = triangle(200)[None, None]
    assert segments_of(one.repeat(1, 4, 1, 1)) is None
    assert segments_of(one.expand(1, 4, 200, 200)) == segments_of(one)


@st.composite
def masks(draw):
    """(batch, 1, queries, keys): padding, packing, windows, chunks, blank rows, single entries turned over."""
    batch, keys = draw(st.integers(1, 2)), draw(st.integers(1, 24))
    queries = draw(st.integers(1, keys))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    allowed = triangle(queries, keys).repeat(batch, 1, 1)
    kinds = st.sampled_from(["left", "right", "unfilled", "packed", "window", "blank rows", "flip", "noise", "repeat"])
    for kind in draw(st.lists(kinds, max_size=4)):
        row, place = draw(st.integers(0, batch - 1)), draw(st.integers(0, keys))
        if kind == "left":
            allowed[row, :, :place] = False
        elif kind == "right":
            allowed[row, :, place:] = False
        elif kind == "unfilled":
            allowed[row] = allowed[row].roll(-(place // 4), -1) & (torch.arange(keys) < keys - place // 4)
        elif kind == "packed":
            own = torch.arange(keys - queries, keys)
            allowed[row] &= (own[:, None] < place) == (torch.arange(keys) < place)
        elif kind == "window":
            allowed[row] &= torch.arange(keys - queries, keys)[:, None] - torch.arange(keys) <= place
        elif kind == "blank rows":
            allowed[row, place // 2 : place] = False
        elif kind == "flip":
            allowed[row, place % queries, draw(st.integers(0, keys - 1))] ^= True
        elif kind == "noise":
            allowed[row] ^= torch.rand(queries, keys, generator=generator) < draw(st.sampled_from([0.02, 0.5]))
        else:
            allowed[row, place % queries] = allowed[row, draw(st.integers(0, queries - 1))]
    return allowed[:, None]


@settings(max_examples=500, deadline=None)
@given(allowed=masks(), short=st.integers(1, 4), entries=st.sampled_from([1, 50, 2**24]))
def test_any_mask_is_described_exactly(allowed, short, entries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments_module, "_SHORT", short)
        patch.setattr(segments_module, "_ENTRIES", entries)
        found = segments_of(allowed)
    if found is not None:
        segments, _ = check_description(allowed, found, short)
        assert segments
    elif short == 1:
        runs = allowed[:, 0].int().diff(prepend=torch.zeros(*allowed[:, 0].shape[:2], 1), dim=-1).eq(1).sum(-1)
        assert not (runs == 1).any()


def test_what_was_found_is_kept_until_the_mask_changes():
    allowed = torch.stack([triangle(300), triangle(300)])[:, None]
    first = segments_of(allowed)
    assert segments_of(allowed) is first
    allowed[1, :, :, :50] = False
    assert segments_of(allowed)[0] == [whole(0, 0, 300), whole(1, 50, 300)]
    allowed.fill_(True)
    assert segments_of(allowed) is None
    assert segments_of(allowed) is None


def test_views_that_change_the_mask_count_as_changes():
    allowed = torch.stack([triangle(300), triangle(300)])[:, None]
    segments_of(allowed)
    allowed[0, 0].masked_fill_(torch.arange(300) < 9, False)
    assert segments_of(allowed)[0][0] == whole(0, 9, 300)


def test_equal_masks_are_not_taken_for_each_other():
    one, other = triangle(300)[None, None], padded(300, left=10)[None, None]
    assert segments_of(one) != segments_of(other)
    assert segments_of(one) == segments_of(one.clone())


def test_masks_do_not_live_on():
    allowed = triangle(300)[None, None].clone()
    segments_of(allowed)
    gone = weakref.ref(allowed)
    del allowed
    gc.collect()
    assert gone() is None


def test_masks_made_in_inference_mode():
    """They have no version, so that nothing may be kept."""
    with torch.inference_mode():
        allowed = triangle(300)[None, None].clone()
        assert segments_of(allowed)[0] == [whole(None, 0, 300)]
        allowed[..., :20] = False
        assert segments_of(allowed)[0] == [whole(None, 20, 300)]
    assert segments_of(allowed)[0] == [whole(None, 20, 300)]


# Through the backend


def truth_of(query, key, value, seen, slopes):
    """Textbook attention under any mask: the distance to a key counts the keys seen after it; zeros without any key."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    distance = seen.long().flip(-1).cumsum(-1).flip(-1) - 1
    logits = query @ key.mT * query.shape[-1] ** -0.5 - slopes[:, None, None] * distance
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen
    return weights @ value


def noise(queries, keys):
    drawn = torch.rand(queries, keys, generator=torch.Generator().manual_seed(4)) < 0.9
    return triangle(queries, keys) & drawn


def blank(mask, *rows):
    mask = mask.clone()
    mask[list(rows)] = False
    return mask


LENGTH = 330

# Masks of a batch, and of how many queries in it the segments are.
CASES = {
    "causal": ([triangle(LENGTH)] * 2, 660),
    "left": ([padded(LENGTH, left=150), padded(LENGTH, left=1)], 180 + 329),
    "right": ([padded(LENGTH, right=150), padded(LENGTH, right=1)], 180 + 329),
    "both": ([padded(LENGTH, left=60, right=100), padded(LENGTH)], 170 + 330),
    "packed": ([packed(130, 10, 60, 130), packed(200, 130)], 260 + 330),
    "packed and padded": ([packed(130, 200) & padded(LENGTH, right=60), packed(150, 150, 30)], 130 + 140 + 300),
    "holes": ([without(triangle(LENGTH), 170, 300), without(triangle(LENGTH), 3)], 170),
    "rows that see nothing": ([blank(triangle(LENGTH), 0, 135, 329), blank(padded(LENGTH, left=9), 200)], 327 + 320),
    "sliding": ([sliding(LENGTH, 140), sliding(LENGTH, 300)], 440),
    "noise in one": ([noise(LENGTH, LENGTH), triangle(LENGTH)], 330),
    "chunk": ([triangle(150, LENGTH), padded(LENGTH, left=40)[-150:]], 300),
    "static cache": ([torch.nn.functional.pad(triangle(140, 310), (0, 20))] * 2, 280),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", ["one mask", "expanded", "own masks"])
def test_attention_by_segments_is_attention_under_the_mask(case, heads):
    parts, in_segments = CASES[case]
    seen = torch.stack(parts)[:, None]
    if heads != "one mask":
        seen = seen.expand(-1, 4, -1, -1)
    if heads == "own masks":
        seen, in_segments = seen.clone(), 0
        seen[:, 1, :, 5] = False
    batch, _, queries, keys = seen.shape
    query, key, value = qkv(batch, 4, 2, queries, keys, 8)
    slopes = [0.6, 0.15, 0.03, 0.0]
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(7))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    with record_reads() as reads:
        output = run("sdpa", *inputs, seen, layer(4, slopes))
    output.backward(upstream)
    truths = [x.detach().double().requires_grad_() for x in inputs]
    truth = truth_of(*truths, seen, torch.tensor(slopes).double())
    truth.backward(upstream.double())
    assert sum(read.queries for read in reads) == in_segments
    assert largest(output, truth) < EXACT
    nothing = ~seen.any(dim=-1).expand(output.shape[:3])
    assert not output[nothing].any()
    assert not inputs[0].grad[nothing].any()
    for x, exact in zip(inputs, truths, strict=True):
        assert x.grad.isfinite().all()
        assert largest(x.grad, exact.grad) < EXACT * exact.grad.abs().max().item()


def test_the_truth_here_is_that_of_the_reference():
    query, key, value = (x.double() for x in qkv(1, 4, 2, 50, 50))
    seen = padded(50, left=7)[None]
    position = torch.arange(50)[None] - 7
    ours = truth_of(query, key, value, seen[:, None], alibi_slopes(4))
    assert largest(ours, expected(query, key, value, seen, position)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_under_padding(dtype):
    seen = torch.stack([padded(LENGTH, left=100, right=30), triangle(LENGTH)])[:, None]
    inputs = qkv(2, 4, 2, LENGTH, LENGTH, 16, dtype=dtype)
    output = run("sdpa", *inputs, seen, layer(4))
    truth = truth_of(*(x.double() for x in inputs), seen, alibi_slopes(4))
    assert output.dtype == dtype
    assert largest(output, truth) < {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize("case", ["causal", "right", "packed"])
def test_one_mask_for_all_sequences_of_a_batch(case):
    seen = CASES[case][0][0][None, None]
    inputs = qkv(3, 4, 2, LENGTH, LENGTH, 8)
    truth = truth_of(*(x.double() for x in inputs), seen, alibi_slopes(4))
    assert largest(run("sdpa", *inputs, seen), truth) < EXACT


def test_padding_that_holds_no_numbers_is_not_read():
    seen = torch.stack([padded(LENGTH, left=100), triangle(LENGTH)])[:, None]
    query, key, value = qkv(2, 4, 2, LENGTH, LENGTH, 8)
    before = run("sdpa", query, key, value, seen)
    for x in (query, key, value):
        x[0, :, :100] = math.nan
    assert torch.equal(run("sdpa", query, key, value, seen), before)


def test_a_mask_that_changes_between_calls():
    """As all layers share one mask, so do steps that write into it."""
    inputs = qkv(1, 4, 2, LENGTH, LENGTH, 8)
    seen = triangle(LENGTH)[None, None].clone()
    for left in (0, 30, 170):
        seen[..., :left] = False
        truth = truth_of(*(x.double() for x in inputs), seen, alibi_slopes(4))
        assert largest(run("sdpa", *inputs, seen), truth) < EXACT
