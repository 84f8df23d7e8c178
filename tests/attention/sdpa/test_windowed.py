"""Windowed attention against the float64 reference: block edges, hostile data, gradients, memory, what is read."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from helpers import reference
from helpers.attention import LargestTensor, expected, largest, qkv, root_mean_square, upstream_of, with_gradients
from helpers.windows import attend, causal_distance, is_near, pairs_of, small_blocks
from hf_alibi.attention.sdpa import far_keys as reach
from hf_alibi.attention.sdpa import parts
from hf_alibi.attention.sdpa.reads import record_reads
from hf_alibi.attention.tolerance import exact_tolerance

# Largest error allowed in float32, to outputs for values of size 1 and to gradients relative to the largest one.
EXACT = 5e-6

# Blocks of 64, 256 and 512 tokens, and a head too flat for blocks up to a length of 8000 or more.
MIXED = [0.7, 0.2, 0.06, 0.004]


def truth_of(query, key, value, slopes):
    return expected(query, key, value, head_slopes=torch.as_tensor(slopes, dtype=torch.float64))


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


def repeated(query, key, value, **kwargs):
    """PyTorch's kernel, without grouped heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_good_as_plain_attention(dtype):
    """Error to float64 at most 1.5 × that of PyTorch's kernel without any bias; for gradients relative to their size.

    Gradients of queries get a test of their own below: a bias costs the kernel itself up to 1.9 × there, since where
    few keys have the weight, roundings do not average out.
    """
    inputs = qkv(1, 12, 4, 700, 700, 64, dtype=dtype)
    upstream = upstream_of(inputs[0]).to(dtype)

    def errors(attention, slopes):
        results = with_gradients(attention, inputs, upstream)
        truths = with_gradients(lambda *x: truth_of(*x, slopes), [x.double() for x in inputs], upstream)
        assert all(result.dtype == dtype for result in results)
        return [largest(a, b) for a, b in zip(results, truths, strict=True)]

    slopes = reference.slopes(12)
    ours = errors(lambda *x: attend(*x, slopes), slopes)
    plain = errors(lambda *x: repeated(*x, is_causal=True), torch.zeros(12))
    assert all(ours[i] <= 1.5 * plain[i] for i in (0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "length"), [(12, 4, 700), (4, 4, 1100)])
def test_half_types_are_as_good_as_the_kernel_with_a_dense_float32_bias(dtype, heads, key_heads, length):
    """Gradients of keys and values are sums over parts, each of which the kernel rounds."""
    inputs = qkv(1, heads, key_heads, length, length, 64, dtype=dtype)
    upstream = upstream_of(inputs[0]).to(dtype)
    slopes = reference.slopes(heads)
    bias = causal_bias(slopes, length)
    ours = with_gradients(lambda *x: attend(*x, slopes), inputs, upstream)
    dense = with_gradients(lambda *x: repeated(*x, attn_mask=bias), inputs, upstream)
    truths = with_gradients(lambda *x: truth_of(*x, slopes), [x.double() for x in inputs], upstream)
    for factor, result, other, truth in zip((1.1, 1.1, 2.0, 2.0), ours, dense, truths, strict=True):
        assert largest(result, truth) <= factor * largest(other, truth)
        assert root_mean_square(result, truth) <= 1.2 * root_mean_square(other, truth)


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
    parts._near_distances.cache_clear()
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
        # In all sequences and key heads, or in one.
        own = draw(st.sampled_from([key, key[:1], key[-1:], key[:, :1], key[:, -1:]]))
        if spoil == "far":
            own[:, :, place] *= 1000 * sign
        elif spoil == "aligned":
            chosen = query[:, :: len(slopes) // key_heads, draw(st.integers(0, queries - 1))]
            key[:, :, place] = chosen * sign * draw(st.sampled_from([3.0, 30.0, 1000.0]))
        elif spoil == "equal":
            key[:] = common * draw(st.sampled_from([1.0, 30.0]))
        elif spoil == "sink":
            place = draw(st.sampled_from([0, place]))
            query = query + 3 * common
            own[:, :, place] = common * draw(st.sampled_from([5.0, 20.0, 100.0])) * width**0.5
        elif spoil == "large queries":
            query = query * 100
        elif spoil == "no queries":
            query = query * 0
        elif spoil == "no keys":
            own *= 0
        elif spoil == "wide":
            own[:, :, place : place + 8] *= 30
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


def logits_of(query, key, slopes):
    """(batch, heads, queries, keys) in the type of the queries, as anybody would write them."""
    distance = causal_distance(query.shape[2], key.shape[2])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.mT * query.shape[-1] ** -0.5 - slopes.to(query.dtype)[:, None, None] * distance
    return logits.masked_fill(distance < 0, -math.inf)


def plain(query, key, value, slopes):
    return logits_of(query, key, slopes).softmax(-1) @ value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def restricted(query, key, value, slopes, read):
    """Reference over the pairs in `read`, bool (heads, queries, keys)."""
    group = query.shape[1] // key.shape[1]
    heads = [
        expected(
            query[:, head, None],
            key[:, head // group, None],
            value[:, head // group, None],
            seen.expand(len(query), -1, -1),
            head_slopes=slopes[head, None],
        )
        for head, seen in enumerate(read)
    ]
    return torch.cat(heads, dim=1)


def sizes_of_logits(query, key, slopes, weights):
    """(batch, heads, queries, 1): of the logits, and of the bias where there is weight."""
    key_norm = key.norm(dim=-1).amax(dim=-1).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    distance = causal_distance(query.shape[2], key.shape[2]).clamp(min=0)
    bias = (slopes[:, None, None] * distance * (weights > 1e-9)).amax(dim=-1)
    return (1 + query.norm(dim=-1) * key_norm[..., None] * query.shape[-1] ** -0.5 + bias)[..., None]


def rounding(query, key, value, slopes, upstream):
    """What float32 may be off by, for output, queries, keys, values: eps × size of the logits × size of all terms.

    Each is (batch, heads or key heads, tokens), for the norm of a token's error.
    """
    groups = query.shape[1] // key.shape[1]
    weights = logits_of(query, key, slopes).softmax(-1)
    q, up = (x.norm(dim=-1)[..., None] for x in (query, upstream))
    k, v = (x.norm(dim=-1).repeat_interleave(groups, dim=1)[..., None, :] for x in (key, value))
    off = torch.finfo(torch.float32).eps * sizes_of_logits(query, key, slopes, weights) * (weights + 1e-10)
    terms = off * query.shape[-1] ** -0.5 * up * (v + weights @ v.mT)
    of_keys = [(terms * q).sum(dim=2), (off * up).sum(dim=2)]
    return (off @ v.mT)[..., 0], (terms * k).sum(dim=-1), *(x.unflatten(1, (-1, groups)).sum(dim=2) for x in of_keys)


@settings(max_examples=150, deadline=None)
@given(data=hostile(), size=sizes, tolerance=st.sampled_from([None, None, 1e-3, 1e-1]))
def test_any_data_stays_within_the_tolerance(data, size, tolerance):
    """Outputs and gradients are those of the pairs that were read, to rounding; all others weigh less than the
    tolerance in every row."""
    *inputs, slopes = data
    slopes = torch.tensor(slopes, dtype=torch.float64)
    upstream = upstream_of(inputs[0])
    with small_blocks(**size) as reports:
        results = with_gradients(lambda *x: attend(*x, slopes, tolerance), inputs, upstream)
    read = torch.stack([pairs_of(reports[0], head) for head in range(len(slopes))])
    wide = [x.double() for x in inputs]
    share = exact_tolerance(torch.float32) if tolerance is None else tolerance
    weights = logits_of(wide[0], wide[1], slopes).softmax(-1)
    assert weights.masked_fill(read, 0.0).sum(-1).max() <= share

    largest_value = inputs[2].norm(dim=-1).max()
    size = sizes_of_logits(wide[0], wide[1], slopes, weights).max()
    if size > 1e5:
        # Rounding of the logits then decides between keys, in plain attention as well.
        assert (results[0].norm(dim=-1) <= 1.001 * largest_value).all()
        # A backward pass takes the weights as exp(logit - lse). Where that rounds by 88 nats it overflows, in PyTorch's
        # kernels as well.
        assert torch.finfo(torch.float32).eps * size > 40 or all(result.isfinite().all() for result in results)
        return
    truths = with_gradients(lambda *x: restricted(*x, slopes, read), wide, upstream.double())
    bounds = rounding(*wide, slopes, upstream.double())
    for ours, truth, bound in zip(results, truths, bounds, strict=True):
        # Numbers below float32's normal ones are rounded to multiples of the smallest.
        assert ((ours - truth).norm(dim=-1) <= 8 * bound + torch.finfo(torch.float32).tiny).all()
    error = (results[0] - truth_of(*wide, slopes)).norm(dim=-1)
    assert (error <= 2 * share * largest_value + 8 * bounds[0]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [1, 17, 40])
def test_what_is_not_finite_in_a_far_key_is_not_dropped(bad, place):
    """Later queries give NaN where plain attention does, and the same numbers elsewhere (logits of minus infinity)."""
    query, key, value = qkv(1, 3, 3, 90, 90, 4)
    slopes = torch.tensor([3.0, 0.5, 0.005], dtype=torch.float64)
    with small_blocks() as reports:
        attend(query, key, value, slopes)
        assert not pairs_of(reports[0], 0)[89, place]
        key[:, :, place, 1] = bad
        output = attend(query, key, value, slopes)[:, :, place:]
    usual = plain(query, key, value, slopes)[:, :, place:]
    assert usual.isnan().any()
    assert torch.equal(output.isnan(), usual.isnan())
    assert (output - usual).abs().nan_to_num(0.0).max() < 1e-5


@pytest.mark.parametrize("head", [0, 1])
def test_each_key_head_has_its_own_bound(head):
    query, key, value = qkv(1, 4, 2, 90, 90, 4)
    query[..., 0] += 3.0
    key[:, head, 0, 0] += 100.0
    key[:, 1 - head] *= 0.01
    slopes = [1.5] * 4
    with small_blocks():
        assert largest(attend(query, key, value, slopes), truth_of(query, key, value, slopes)) < EXACT


def test_a_query_that_is_not_finite_spoils_no_other():
    query, key, value = qkv(1, 3, 3, 90, 90, 4)
    query[:, :, 50, 2] = math.nan
    slopes = [3.0, 0.5, 0.005]
    with small_blocks():
        output = attend(query, key, value, slopes)
    others = torch.arange(90) != 50
    assert output[:, :, 50].isnan().all()
    assert largest(output[:, :, others], truth_of(query, key, value, slopes)[:, :, others]) < EXACT


# What is read, and what it costs


def test_most_keys_are_skipped_at_8192_tokens():
    query, key, value = qkv(1, 12, 12, 8192, 8192, 64)
    slopes = reference.slopes(12)
    with record_reads() as reads:
        attend(query, key, value, slopes)
        attend(query, key, value, slopes, tolerance=1e-2)
    exact, loose = reads
    assert sum(exact.kept) / 12 < 0.35
    # Slopes of 1/2 and 0.7, then all from 1/4 on.
    steep = [kept for kept, slope in zip(exact.kept, slopes, strict=True) if slope >= 0.25]
    assert len(steep) == 4
    assert max(steep[0], steep[2]) < 0.05
    assert max(steep) < 0.1
    assert exact.windows[0] < 300
    # The flattest head needs all keys.
    assert (min(exact.windows), max(exact.windows)) == (exact.windows[0], 8191)
    assert sum(loose.kept) < sum(exact.kept)
    assert all(less <= more for less, more in zip(loose.kept, exact.kept, strict=True))


def test_everything_is_read_where_slopes_are_zero():
    with record_reads() as reads:
        attend(*qkv(2, 2, 1, 700, 700, 8), [0.0, 0.0])
        attend(*qkv(2, 2, 1, 700, 1500, 8), [0.0, 0.0])
    assert [read.kept for read in reads] == [(1.0, 1.0)] * 2
    assert [read.windows for read in reads] == [(699, 699), (1499, 1499)]


def test_a_looser_tolerance_reads_less_and_errs_more_but_within_it():
    inputs = qkv(1, 1, 1, 1500, 1500, 8)
    truth, kept, errors = truth_of(*inputs, [0.5]), [], []
    tolerances = [None, 1e-4, 1e-2, 0.3]
    with small_blocks(nats=1.0, group=64):
        for tolerance in tolerances:
            with record_reads() as reads:
                errors.append(largest(attend(*inputs, [0.5], tolerance), truth))
            kept.append(reads[0].pairs[0])
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 1.5 * kept[2]
    largest_value = inputs[2].norm(dim=-1).max().item()
    assert errors[0] < EXACT < errors[3]
    assert all(e <= 2 * t * largest_value for e, t in zip(errors[1:], tolerances[1:], strict=True))


def test_memory_grows_linearly_forward_and_backward(monkeypatch):
    """No operation makes more than a few times the queries, near the diagonal or for keys far away."""
    monkeypatch.setattr(parts, "_BLOCK_MAX", 64)
    monkeypatch.setattr(reach, "_GROUP", 256)
    heads, width = 4, 8
    for length in (1024, 4096):
        query, key, value = qkv(1, heads, heads, length, length, width)
        query[..., 0] += 3.0
        key[:, :, 0, 0] += 1e4
        inputs = [x.requires_grad_() for x in (query, key, value)]
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with LargestTensor() as largest_tensor, record_reads() as reads:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = attend(*inputs, [0.7, 0.3, 0.05, 0.001])
            output.sum().backward()
        assert reads[0].windows[0] == length - 1
        assert largest_tensor.entries <= heads * length * width
        assert sum(saved.values()) <= heads * length * (4 * width + 1)


# Who sees whom


@pytest.mark.parametrize("length", [257, 1025, 1537, 2049])
@pytest.mark.parametrize("tolerance", [None, 0.3])
def test_the_future_is_not_seen(length, tolerance):
    """Not even in what is read: not by a last key so large that no bound with it could leave anything out.

    At these lengths no query shares its block with the last one.
    """
    query, key, value = qkv(2, 4, 2, length, length, 8)
    before = attend(query, key, value, MIXED, tolerance)
    key[:, :, -1] *= 1e5
    value[:, :, -1] = 50.0
    after = attend(query, key, value, MIXED, tolerance)
    assert torch.equal(after[:, :, :-1], before[:, :, :-1])
    assert not torch.equal(after[:, :, -1], before[:, :, -1])


def reads_apart(queries, block, group):
    """How many queries come before those that may read what the last one needs."""
    if queries % block:
        return queries - queries % block
    together = max(1, group // block) * block
    return (queries - block) // together * together


@settings(max_examples=60, deadline=None)
@given(data=hostile(), size=sizes, tolerance=st.sampled_from([None, 0.3]), large=st.sampled_from([1.0, 30.0, 1e6]))
def test_the_future_is_not_seen_in_any_data(data, size, tolerance, large):
    """Queries that share their reading with the last one may read other keys, within the tolerance."""
    *inputs, slopes = data
    query, key, value = (x.clone() for x in inputs)
    with small_blocks(**size) as reports:
        before = attend(query, key, value, slopes, tolerance)
        key[:, :, -1] = large * (key[:, :, -1] + 1)
        value[:, :, -1] += 1
        after = attend(query, key, value, slopes, tolerance)
        blocks = {head: parts.block_size(slopes[head]) for head in reports[0]["spans"]}
    for head in range(len(slopes)):
        queries = query.shape[2]
        apart = reads_apart(queries, blocks[head], size["group"]) if head in blocks else queries - 1
        assert torch.equal(after[:, head, :apart], before[:, head, :apart])
    share = exact_tolerance(torch.float32) if tolerance is None else tolerance
    wide = [x.double() for x in inputs]
    off = rounding(*wide, torch.tensor(slopes, dtype=torch.float64), wide[0])[0][:, :, :-1]
    bound = 4 * share * inputs[2].norm(dim=-1).max() + 16 * off
    assert ((after - before)[:, :, :-1].norm(dim=-1) <= bound).all()


def test_sequences_of_a_batch_do_not_influence_each_other():
    """Beyond rounding: a sequence may make others read more, never less."""
    query, key, value = qkv(3, 4, 2, 1500, 1500, 8)
    alone = attend(query[:1], key[:1], value[:1], MIXED)
    key[1] *= 1000.0
    query[2, :, :, 0] += 20.0
    key[2, :, 0, 0] += 50.0
    assert largest(attend(query, key, value, MIXED)[:1], alone) < 1e-6
