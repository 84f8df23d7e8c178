"""Windowed attention against the dense float64 reference: block edges, hostile data, gradients, memory, what is read."""

import math
from contextlib import contextmanager

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import LargestTensor, expected, largest, qkv
from test_reach import pairs_read
from torch.nn.functional import scaled_dot_product_attention

from hf_alibi.attention import reach, windowed
from hf_alibi.attention.reading import record_reads
from hf_alibi.attention.segments import Segment
from hf_alibi.attention.windowed import exact_tolerance, windowed_attention

# Largest error allowed in float32, to outputs for values of size 1 and to gradients relative to the largest one.
EXACT = 5e-6

# One head for each kind of work: blocks of 64, of 128, of 512, and too flat for blocks up to a length of 8000.
MIXED = [0.7, 0.25, 0.05, 0.004]


def whole(query, key):
    return [Segment(slice(None), slice(0, query.shape[2]), slice(0, key.shape[2]))]


def attend(query, key, value, slopes, tolerance=None):
    slopes = torch.as_tensor(slopes, dtype=torch.float64)
    scaling = query.shape[-1] ** -0.5
    return windowed_attention(query, key, value, slopes, scaling, segments=whole(query, key), tolerance=tolerance)


def truth_of(query, key, value, slopes):
    return expected(query, key, value, head_slopes=torch.as_tensor(slopes, dtype=torch.float64))


def with_gradients(attention, inputs, upstream):
    """Output and the gradients of queries, keys and values."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))


def upstream_of(query, seed=9):
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(seed))


def check(inputs, slopes, output_error=EXACT, gradient_error=EXACT, tolerance=None):
    """Outputs and gradients equal the reference's."""
    upstream = upstream_of(inputs[0]).to(inputs[0].dtype)
    output, *gradients = with_gradients(lambda *x: attend(*x, slopes, tolerance), inputs, upstream)
    truth, *truths = with_gradients(lambda *x: truth_of(*x, slopes), [x.double() for x in inputs], upstream)
    assert output.dtype == inputs[0].dtype
    assert largest(output, truth) < output_error
    for gradient, exact in zip(gradients, truths, strict=True):
        # One key has no gradient but rounding.
        assert largest(gradient, exact) < gradient_error * max(exact.abs().max().item(), 1.0)


@pytest.mark.parametrize(
    ("length", "batch", "width"),
    [
        *((1, 3, 16), (2, 2, 8), (63, 3, 16), (64, 2, 64), (65, 1, 8), (127, 2, 16), (128, 3, 8), (129, 1, 64)),
        *((255, 2, 8), (256, 1, 16), (257, 3, 16), (511, 1, 8), (512, 2, 8), (513, 1, 64), (1023, 1, 16)),
        *((1024, 1, 8), (1025, 2, 8), (1535, 1, 8), (1537, 1, 8), (2047, 1, 8), (2049, 1, 16)),
    ],
)
def test_lengths_around_block_edges(length, batch, width):
    check(qkv(batch, 4, 2, length, length, width), MIXED)


@pytest.mark.parametrize("heads", [1, 4, 9, 12])
@pytest.mark.parametrize("grouped", [False, True])
def test_head_counts(heads, grouped):
    key_heads = {4: 2, 9: 3, 12: 4}.get(heads, 1) if grouped else heads
    width = {1: 64, 4: 8, 9: 16, 12: 64}[heads]
    check(qkv(2, heads, key_heads, 600, 600, width), reference.slopes(heads))


@pytest.mark.parametrize(
    "slopes",
    [
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.3, 0.0, 0.002],
        [0.02, 0.02, 0.02, 0.02],
        [0.004, 0.7, 0.25, 0.05],
        [0.001, 0.002, 0.7, 0.003],
        [30.0, 1e4, 0.061, 0.0626],
        [1e-50, 1e-40, 1e-9, 1e30],
    ],
)
@pytest.mark.parametrize(("queries", "keys", "key_heads"), [(700, 700, 4), (700, 700, 1), (300, 431, 2)])
def test_any_slopes(slopes, queries, keys, key_heads):
    check(qkv(1, 4, key_heads, queries, keys, 8), slopes)


@pytest.mark.parametrize(
    ("queries", "cached"), [(2, 1300), (64, 1), (65, 600), (129, 64), (200, 333), (513, 512), (700, 511), (700, 1025)]
)
@pytest.mark.parametrize("slopes", [MIXED, [0.0, 0.03, 0.1, 2.0]])
def test_a_chunk_after_a_cache(queries, cached, slopes):
    check(qkv(2, 4, 2, queries, queries + cached, 8), slopes)


@pytest.mark.parametrize("length", [6200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_long_sequences_at_sampled_rows(length):
    """Upstream gradients at the sampled rows alone give gradients of all keys and values."""
    slopes = torch.tensor([0.5, 0.06, 0.01, 0.004, 0.003])
    rows = torch.tensor([0, 1, 63, 511, 512, 1024, 2047, 2048, 4095, 4096, 5999, length - 57, length - 1])
    query, key, value = qkv(1, 5, 1, length, length, 16)
    upstream = torch.zeros(query.shape)
    upstream[:, :, rows] = upstream_of(query[:, :, rows])
    output, *gradients = with_gradients(lambda *x: attend(*x, slopes), (query, key, value), upstream)

    def sampled(query, key, value):
        distance = (rows[:, None] - torch.arange(length)).double()
        logits = query[:, :, rows] @ key.mT / 4 - slopes.double()[:, None, None] * distance
        return logits.masked_fill(distance < 0, -math.inf).softmax(-1) @ value

    inputs = [x.double() for x in (query, key, value)]
    truth, *truths = with_gradients(sampled, inputs, upstream[:, :, rows].double())
    assert largest(output[:, :, rows], truth) < EXACT
    for gradient, exact in zip(gradients, truths, strict=True):
        assert largest(gradient, exact) < EXACT * exact.abs().max().item()


@pytest.mark.parametrize(("queries", "keys"), [(513, 513), (1100, 1100), (300, 555)])
def test_float64(queries, keys):
    inputs = [x.double() for x in qkv(2, 4, 2, queries, keys, 16)]
    check(inputs, MIXED, output_error=1e-12, gradient_error=1e-12)


def causal_bias(slopes, length):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf).float()[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "length"), [(12, 4, 700), (4, 4, 1100)])
def test_half_types_are_as_good_as_the_plain_kernel(dtype, heads, key_heads, length):
    """Against PyTorch's kernel without any bias, and with the bias as a dense matrix, which makes larger gradients."""
    inputs = qkv(1, heads, key_heads, length, length, 64, dtype=dtype)
    upstream = upstream_of(inputs[0]).to(dtype)
    slopes, group = reference.slopes(heads).float(), heads // key_heads
    bias = causal_bias(slopes, length)

    def kernel(query, key, value, **kwargs):
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, **kwargs)

    def errors(attention, slopes):
        truths = with_gradients(lambda *x: truth_of(*x, slopes), [x.double() for x in inputs], upstream)
        results = with_gradients(attention, inputs, upstream)
        assert all(result.dtype == dtype for result in results)
        return [(largest(a, b), b.abs().max().item()) for a, b in zip(results, truths, strict=True)]

    ours = errors(lambda *x: attend(*x, slopes), slopes)
    plain = errors(lambda *x: kernel(*x, is_causal=True), torch.zeros(heads))
    dense = errors(lambda *x: kernel(*x, attn_mask=bias), slopes)
    for (error, size), (plain_error, plain_size), (dense_error, _) in zip(ours, plain, dense, strict=True):
        assert error <= 1.5 * plain_error * max(1.0, size / plain_size)
        assert error <= 1.5 * dense_error
    assert ours[0][0] <= 1.5 * plain[0][0]


@pytest.mark.parametrize("layout", ["transposed", "width_not_last", "every_other", "packed", "expanded"])
def test_layouts(layout):
    """As models hand them over, and worse; gradients come back in whatever layout the caller used."""
    batch, heads, length, width = 2, 4, 330, 8
    query, key, value = qkv(batch, heads, heads, length, length, width)
    if layout == "transposed":
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    elif layout == "width_not_last":
        strided = [x.mT.contiguous().mT for x in (query, key, value)]
    elif layout == "every_other":
        strided = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in (query, key, value)]
    elif layout == "packed":
        strided = torch.cat([x.transpose(1, 2) for x in (query, key, value)], dim=-1).transpose(1, 2)
        strided = strided.split(width, dim=-1)
    else:
        key, value = (x[:1].expand(batch, -1, -1, -1) for x in (key, value))
        strided = [query, key, value]
    for slopes in (MIXED, [0.0, 0.1, 0.2, 0.3]):
        upstream = upstream_of(query)
        given = with_gradients(lambda *x: attend(*x, slopes), strided, upstream.mT.contiguous().mT)  # noqa: B023
        plain = [x.contiguous() for x in (query, key, value)]
        tidy = with_gradients(lambda *x: attend(*x, slopes), plain, upstream)  # noqa: B023
        assert all(largest(a, b) < 1e-6 for a, b in zip(given, tidy, strict=True))


def test_upstream_gradients_that_are_expanded():
    """What `output.sum().backward()` hands over has no strides at all."""
    inputs = [x.requires_grad_() for x in qkv(1, 4, 2, 200, 200, 8)]
    attend(*inputs, MIXED).sum().backward()
    truths = [x.detach().double().requires_grad_() for x in inputs]
    truth_of(*truths, MIXED).sum().backward()
    for x, truth in zip(inputs, truths, strict=True):
        assert largest(x.grad, truth.grad) < EXACT * max(1.0, truth.grad.abs().max().item())


def test_bias_cached_in_inference_mode_can_train_later():
    windowed._near_distances.cache_clear()
    inputs = qkv(1, 4, 2, 300, 300, 8)
    with torch.inference_mode():
        attend(*inputs, MIXED)
    check(inputs, MIXED)


def test_a_second_derivative_is_refused():
    inputs = [x.requires_grad_() for x in qkv(1, 2, 2, 200, 200, 8)]
    (gradient,) = torch.autograd.grad(attend(*inputs, [0.3, 0.001]).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.sum().backward()


# Blocks so small that everything that can be read occurs within a hundred tokens


@contextmanager
def small_blocks(block_min=4, block_max=16, nats=8.0, flat=1.0, group=16, threads=1):
    """Inside, gives what windowed attention says of each segment that it works on."""
    reports = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windowed, "_BLOCK_MIN", block_min)
        patch.setattr(windowed, "_BLOCK_MAX", block_max)
        patch.setattr(windowed, "_BLOCK_NATS", nats)
        patch.setattr(windowed, "_FLAT_NATS", flat)
        patch.setattr(reach, "_GROUP", group)
        patch.setattr(windowed, "report_reads", lambda **report: reports.append(report))
        patch.setattr(torch, "get_num_threads", lambda: threads)
        yield reports


def is_near(span, offset):
    """Whether a span ends at its own queries, so that the future is hidden in it."""
    return span.columns is None and span.key + span.keys == offset + span.query + span.rows


def kinds(report):
    """Which kinds of work there was."""
    offset = report["keys"] - report["queries"]
    found = set()
    for head in range(report["heads"]):
        if head not in report["spans"]:
            found.add("flat")
        for span in report["spans"].get(head, []):
            if is_near(span, offset):
                found.add("triangle" if span.keys == span.rows else "near" if span.step else "near, one block")
            else:
                found.add("remote" if span.columns is not None else "band" if span.step else "clipped")
    return found


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


# With offsets of all kinds, and with a long first token's sink (remote), flat heads alone and in pairs.
EACH_KIND = {
    (72, 72): {"flat", "triangle", "near", "band", "clipped", "remote"},
    (45, 45): {"flat", "triangle", "near", "near, one block", "band", "clipped", "remote"},
    (42, 95): {"near", "near, one block", "band", "remote"},
    (43, 50): {"near", "near, one block", "band", "clipped", "remote"},
}


@pytest.mark.parametrize(("queries", "keys"), EACH_KIND)
@pytest.mark.parametrize("key_heads", [6, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_are_those_of_the_forward_pass_in_every_kind_of_work(queries, keys, key_heads, threads):
    query, key, value = qkv(2, 6, key_heads, queries, keys, 4, dtype=torch.float64)
    query[..., 0] += 4.0
    key[:, :, 0, 0] += 100.0
    inputs = [x.requires_grad_() for x in (query, key, value)]
    slopes = [0.005, 3.0, 1.5, 5.0, 0.001, 0.0]
    with small_blocks(threads=threads) as reports:
        assert torch.autograd.gradcheck(lambda *x: attend(*x, slopes), inputs, fast_mode=True)
        assert largest(attend(*inputs, slopes), truth_of(*inputs, slopes)) < 1e-12
    assert kinds(reports[-1]) >= EACH_KIND[queries, keys]


@st.composite
def hostile(draw):
    """Queries, keys and values of up to four heads, with up to three things that break guesses about attention."""
    batch, groups, key_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, cached = draw(st.integers(1, 90)), draw(st.one_of(st.just(0), st.integers(0, 50)))
    heads, keys, width = groups * key_heads, queries + cached, draw(st.sampled_from([1, 4, 8]))
    query, key, value = qkv(batch, heads, key_heads, queries, keys, width, seed=draw(st.integers(0, 2**30)))
    slope = st.sampled_from([0.0, 1e-40, 1e-6, 0.003, 0.02, 0.1, 0.5, 1.0, 2.0, 10.0, 1e4])
    slopes = draw(st.lists(slope, min_size=heads, max_size=heads))
    if draw(st.booleans()):
        slopes = slopes[:1] * heads
    common = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(1)), dim=0)
    spoils = st.sampled_from(
        ["far", "aligned", "equal", "sink", "large queries", "no queries", "no keys", "wide", "growing", "large values"]
    )
    for spoil in draw(st.lists(spoils, max_size=3)):
        place = draw(st.integers(0, keys - 1))
        sign = draw(st.sampled_from([1.0, -1.0]))
        if spoil == "far":
            key[:, :, place] *= 1000 * sign
        elif spoil == "aligned":
            chosen = query[:, :: len(slopes) // key_heads, draw(st.integers(0, queries - 1))]
            key[:, :, place] = chosen * sign * draw(st.sampled_from([3.0, 30.0, 1000.0]))
        elif spoil == "equal":
            key[:] = common * draw(st.sampled_from([1.0, 30.0]))
        elif spoil == "sink":
            place = draw(st.sampled_from([0, place]))
            query = query + 3 * common
            key[:, :, place] = common * draw(st.sampled_from([5.0, 20.0, 100.0])) * width**0.5
        elif spoil == "large queries":
            query = query * 100
        elif spoil == "no queries":
            query = query * 0
        elif spoil == "no keys":
            key = key * 0
        elif spoil == "wide":
            key[:, :, place : place + 8] *= 30
        elif spoil == "growing":  # cancels the bias of the first head
            key = key + common * torch.arange(keys, 0, -1)[:, None] * min(slopes[0], 10.0) * width**0.5 / 2
            query = query + 2 * common
        else:
            value[:, :, place] *= 1e4
    return query, key, value, slopes


sizes = st.fixed_dictionaries(
    {
        "block_min": st.sampled_from([2, 4, 8]),
        "block_max": st.sampled_from([8, 16]),
        "nats": st.sampled_from([1.0, 4.0, 16.0]),
        "flat": st.sampled_from([0.0, 0.5, 4.0]),
        "group": st.sampled_from([1, 8, 16, 2048]),
        "threads": st.sampled_from([1, 2, 3]),
    }
)


def rounding(query, key, value, slope, truth_weights):
    """Of each row of a head in float32: eps × the logits that count, (batch, queries, 1), for values of size 1."""
    queries, keys = query.shape[1], key.shape[1]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    logits = query.norm(dim=-1) * key.norm(dim=-1).amax(dim=-1, keepdim=True) * query.shape[-1] ** -0.5
    biases = (slope * distance * (truth_weights > 1e-9)).amax(dim=-1)
    return torch.finfo(query.dtype).eps * (1 + logits + biases)[..., None]


def plain_float32(query, key, value, slope):
    """One head as anybody would write it."""
    queries, keys = query.shape[1], key.shape[1]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    logits = query @ key.mT * query.shape[-1] ** -0.5 - slope * distance
    return logits.masked_fill(distance < 0, -math.inf).softmax(-1) @ value


@settings(max_examples=150, deadline=None)
@given(data=hostile(), size=sizes, tolerance=st.sampled_from([None, None, 1e-3, 1e-1]))
def test_any_data_stays_within_the_tolerance(data, size, tolerance):
    """The output is that of the pairs which were read, to rounding; what was left out is under the tolerance."""
    query, key, value, slopes = data
    group = query.shape[1] // key.shape[1]
    upstream = upstream_of(query)
    with small_blocks(**size) as reports:
        output, *gradients = with_gradients(lambda *x: attend(*x, slopes, tolerance), data[:3], upstream)
    (report,) = reports
    share = exact_tolerance(query.dtype) if tolerance is None else tolerance
    truths = [torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value)]
    plains = [torch.zeros_like(x) for x in (query, key, value)]
    worst = 0.0
    for head, slope in enumerate(slopes):
        slope = torch.tensor(slope)
        own = slice(head, head + 1), slice(head // group, head // group + 1)
        one = [x[:, [head // group if len(plains) and x is not query else head]] for x in (query, key, value)]
        read = pairs_of(report, head)
        doubles = [x.double() for x in one]
        # Against what was read, and against everything.
        seen = read.expand(len(query), -1, -1)
        kept = with_gradients(
            lambda *x: expected(*x, seen, head_slopes=slope[None]),  # noqa: B023
            doubles,
            upstream[:, own[0]].double(),
        )
        exact = expected(*doubles, head_slopes=slope[None])
        ...
