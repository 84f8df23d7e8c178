"""Sink tokens, the first tokens of a sequence without bias: every backend and mode against the float64 reference."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, StaticCache

import hf_alibi
from helpers import reference
from helpers.attention import (
    EVERYWHERE,
    additive,
    block_mask,
    fused,
    largest,
    layer,
    qkv,
    root_mean_square,
    run,
    upstream_of,
    with_gradients,
)
from helpers.caches import SMALL, STEEP, step
from helpers.composites import MODELS, built
from helpers.masks import packed, padded, triangle
from helpers.masks import without as with_holes
from helpers.models import snapshot, stock_config, stock_model, tokens
from helpers.reference import LOGITS
from helpers.tiny_models import stock_tiny
from helpers.windows import small_blocks, windowed_attention
from hf_alibi import AlibiCache
from hf_alibi.attention import backends as attention
from hf_alibi.attention import cache as cache_module
from hf_alibi.attention import layer_slopes as head_slopes_module
from hf_alibi.attention.flex.backend import flex_alibi_attention
from hf_alibi.attention.sdpa import dispatch as sdpa
from hf_alibi.attention.sdpa import factored
from hf_alibi.attention.sdpa.reads import record_reads
from hf_alibi.attention.sdpa.segments import Segment
from hf_alibi.bias import alibi_bias, distances
from hf_alibi.configuration import AlibiGPT2Config, AlibiLlamaConfig, text_config
from hf_alibi.errors import VerificationError
from hf_alibi.model.anatomy import text_decoder

# Largest error for values of size 1 in float32; without sinks outputs differ by 0.1 and more.
EXACT = 5e-6
LENGTH = 300

backends = pytest.mark.parametrize("backend", EVERYWHERE)
counts = pytest.mark.parametrize("count", [0, 1, 4, LENGTH + 5])


def truth_of(query, key, value, count, seen=None, slopes=None, **kwargs):
    """Reference; the distance of a key is counted over what each row sees, since all of it lies in one sequence."""
    batch, keys, queries = query.shape[0], key.shape[2], query.shape[2]
    seen = triangle(queries, keys) if seen is None else seen
    seen = seen.expand(batch, queries, keys)
    slopes = reference.slopes(query.shape[1]) if slopes is None else torch.as_tensor(slopes, dtype=torch.float64)
    scaling = query.shape[-1] ** -0.5
    rows = []
    # Row by row, as each may count its own tokens.
    for index in range(batch):
        for row in range(queries):
            position = seen[index, row].long().cumsum(-1)[None] - 1
            one = query[index : index + 1, :, row : row + 1]
            # The reference takes the last position for that of the query: that of the last key that it sees.
            own = (key[index : index + 1], value[index : index + 1], seen[index : index + 1, row : row + 1])
            rows.append(reference.attention(one, *own, position, slopes, scaling, sink_tokens=count, **kwargs))
    return torch.cat(rows, dim=2).unflatten(2, (batch, queries))[0].transpose(0, 1)


MASKS = {
    "left": padded(LENGTH, left=70),
    "right": padded(LENGTH, right=90),
    "both": padded(LENGTH, left=3, right=50),
    "holes": with_holes(triangle(LENGTH), 0, 2, 3, 150, *range(200, 220)),
    "packed": packed(140, 2, 30, 128),
    "chunk": triangle(LENGTH, LENGTH + 40),
    "empty end": torch.cat([triangle(LENGTH), torch.zeros(LENGTH, 20, dtype=torch.bool)], dim=1),
}


# Pure maths


@pytest.mark.parametrize(
    ("row", "count", "expected"),
    [
        ([1, 1, 1, 1], 0, [3, 2, 1, 0]),
        ([1, 1, 1, 1], 1, [0, 2, 1, 0]),
        ([0, 1, 1, 0, 1, 1], 2, [0, 0, 0, 0, 1, 0]),
        ([1, 0, 1, 1], 9, [0, 0, 0, 0]),
    ],
)
def test_distances(row, count, expected):
    allowed = torch.tensor([row], dtype=torch.bool)
    assert distances(allowed, count)[allowed].tolist() == [d for d, seen in zip(expected, row, strict=True) if seen]


def test_no_sinks_is_the_papers_bias_bit_by_bit():
    allowed, slopes = triangle(50)[None, None], torch.rand(3, 1, 1)
    expected = (-slopes * distances(allowed)).masked_fill(~allowed, -math.inf)
    assert torch.equal(alibi_bias(slopes, allowed, 0), expected)
    assert alibi_bias(slopes, allowed, 4)[:, :, 10, :4].abs().max() == 0


@pytest.mark.parametrize(("queries", "keys"), [(10, 10), (3, 10), (7, 10), (1, 10)])
@pytest.mark.parametrize("count", [0, 1, 4, 10, 99])
def test_parts_of_a_segment_are_the_segment(queries, keys, count):
    """Every pair of a query and a key once: with bias or, for sinks, without."""
    segment = Segment(slice(None), slice(2, 2 + queries), slice(5, 5 + keys))
    found = torch.zeros(queries + 2, keys + 5)
    unbiased = torch.zeros(queries + 2, keys + 5, dtype=torch.bool)
    for part in segment.split(count):
        found[part.queries, part.keys] += triangle(
            part.queries.stop - part.queries.start, part.keys.stop - part.keys.start
        )
        unbiased[part.queries, part.keys] |= not part.has_bias
        if part.sinks is not None:
            found[part.queries, part.sinks] += 1
            unbiased[part.queries, part.sinks] = True
    assert torch.equal(found[2:, 5:], triangle(queries, keys).float())
    seen = found.bool()
    sinks = torch.arange(keys + 5).expand_as(seen) < 5 + count
    assert torch.equal(unbiased & seen, sinks & seen)


# Backends


@backends
@counts
@pytest.mark.parametrize("length", [1, 3, LENGTH])
def test_causal(backend, count, length):
    query, key, value = qkv(2, 6, 2, length, length)
    output = run(backend, query, key, value, module=layer(6, sink_tokens=count))
    assert largest(output, truth_of(query, key, value, count)) < EXACT


@backends
@counts
@pytest.mark.parametrize("kind", MASKS)
def test_masks(backend, count, kind):
    seen = MASKS[kind]
    query, key, value = qkv(1, 4, 2, *seen.shape)
    rows = seen.any(dim=-1)
    truth = truth_of(query, key, value, count, seen)
    module = layer(4, sink_tokens=count)
    for mask in (seen[None, None], additive(seen)[None, None]):
        output = run(backend, query, key, value, mask, module)
        assert largest(output[:, :, rows], truth[:, :, rows]) < EXACT
    if count == 1 and kind != "packed":
        other = run(backend, query, key, value, seen[None, None], layer(4))
        assert largest(other[:, :, rows], truth[:, :, rows]) > 0.1


@backends
@counts
def test_one_query_and_static_caches(backend, count):
    query, key, value = qkv(2, 4, 2, 1, LENGTH)
    module = layer(4, sink_tokens=count)
    truth = truth_of(query, key, value, count)
    assert largest(run(backend, query, key, value, module=module), truth) < EXACT
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[..., :20] = mask[1, ..., 20:90] = mask[..., 250:] = False
    truth = truth_of(query, key, value, count, mask[:, 0])
    assert largest(run(backend, query, key, value, mask, module), truth) < EXACT
    if backend != "eager":  # which has a mask there
        query, key, value = qkv(2, 4, 2, 30, LENGTH)
        truth = truth_of(query, key[:, :, :30], value[:, :, :30], count)
        assert largest(run(backend, query, key, value, module=module), truth) < EXACT


@counts
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_that_leaves_out_values(monkeypatch, count, masked):
    monkeypatch.setattr(sdpa, "_DECODE_KEYS", 2)
    query, key, value = qkv(2, 4, 2, 1, 2000)
    slopes = [0.5, 0.3, 0.1, 0.9]
    mask = torch.ones(2, 1, 1, 2000, dtype=torch.bool) if masked else None
    if masked:
        mask[1, ..., :700] = mask[0, ..., 1000:1003] = False
    truth = truth_of(query, key, value, count, None if mask is None else mask[:, 0], slopes)
    output = run("sdpa", query, key, value, mask, layer(4, slopes, sink_tokens=count))
    assert largest(output, truth) < EXACT


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_capped_logits_and_a_sink_logit(backend):
    query, key, value = qkv(2, 4, 2, 60, 60)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    truth = truth_of(query, key, value, 3, softcap=2.0, sinks=sinks)
    mask = triangle(60)[None, None]
    output = run(backend, query, key, value, mask, layer(4, sink_tokens=3), softcap=2.0, s_aux=sinks)
    assert largest(output, truth) < EXACT


@backends
@pytest.mark.parametrize(
    ("scaling", "train_length"),
    [({"type": "linear", "factor": 4}, None), ({"type": "ntk", "factor": 4}, None), ({"type": "dynamic"}, 50)],
)
def test_scaled_slopes(backend, scaling, train_length):
    query, key, value = qkv(1, 4, 2, LENGTH, LENGTH)
    module = layer(4, scaling=scaling, train_length=train_length, sink_tokens=4)
    scaled = head_slopes_module.head_slopes(module, query, value, query.device)
    context = torch.arange(1, LENGTH + 1)[None, None]
    each = scaled.for_queries(lambda: context).expand(1, 4, LENGTH, 1)[0, :, :, 0]
    rows = [
        truth_of(query[:, :, row : row + 1], key[:, :, : row + 1], value[:, :, : row + 1], 4, slopes=each[:, row])
        for row in (0, 4, 60, LENGTH - 1)
    ]
    output = run(backend, query, key, value, module=module)[:, :, [0, 4, 60, LENGTH - 1]]
    assert largest(output, torch.cat(rows, dim=2)) < EXACT


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.004), (torch.float64, 1e-12)])
@backends
def test_types(backend, dtype, error):
    query, key, value = qkv(1, 4, 2, 1500, 1500, dtype=dtype)
    rows = torch.tensor([0, 3, 4, 700, 1499])
    slopes = [0.75, 0.25, 0.0625, 0.00390625]
    truth = torch.cat(
        [
            truth_of(query[:, :, r : r + 1], key[:, :, : r + 1], value[:, :, : r + 1], 4, slopes=slopes)
            for r in rows.tolist()
        ],
        dim=2,
    )
    output = run(backend, query, key, value, module=layer(4, slopes, sink_tokens=4))
    assert output.dtype == dtype
    assert largest(output[:, :, rows], truth) < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [9, 2000, 20_000])
def test_factors_of_the_bias(dtype, length):
    """Their product is the bias but for a constant per query: differences to the query's own key are exact."""
    slopes = torch.tensor([5.6, 0.25, 0.004])[:, None, None]
    position = torch.arange(length) - length // 2
    rows = torch.tensor([length - 1, length // 2, 5, 1])
    left, right = factored._bias_factors(slopes, position, position, dtype, 3)
    left = left.expand(3, length, -1)[:, rows].double()
    bias = left @ right.double().T
    own = bias.gather(-1, rows[None, :, None].expand(3, -1, 1))
    distance = (rows[:, None] - torch.arange(length)).double()
    distance[:, :3] = 0
    expected = -slopes.double() * distance
    seen = torch.arange(length) <= rows[:, None]
    error = ((bias - own) - expected).masked_fill(~seen, 0.0).abs()
    # Slopes in half types are split in two pieces, and float16 has steps of 2^-24.
    assert (error <= 1e-5 + 3e-7 * length * slopes.double() * (1 if dtype == torch.float32 else 64)).all()
    assert error[..., :3].max() < 1e-2


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_gradients_by_factors_and_by_blocks(monkeypatch, dropout):
    monkeypatch.setattr(factored, "_SINGLE_CALL", 100)
    inputs = qkv(1, 4, 2, LENGTH, LENGTH)
    upstream = upstream_of(inputs[0])
    ours = with_gradients(
        lambda *x: run("unwindowed", *x, module=layer(4, sink_tokens=4), dropout=dropout), inputs, upstream
    )
    for got, exact in zip(ours, gradients_of_truth(inputs, upstream, 4), strict=True):
        assert largest(got, exact) < EXACT * max(1.0, exact.abs().max().item())


def gradients_of_truth(inputs, upstream, count, slopes=None):
    """Output and gradients of the reference, causal."""
    slopes = reference.slopes(inputs[0].shape[1]) if slopes is None else torch.as_tensor(slopes, dtype=torch.float64)
    batch, keys, queries = inputs[0].shape[0], inputs[1].shape[2], inputs[0].shape[2]
    seen = triangle(queries, keys).expand(batch, -1, -1)
    position = torch.arange(keys).expand(batch, -1)
    scaling = inputs[0].shape[-1] ** -0.5

    def attend(*x):
        return reference.attention(*x, seen, position, slopes, scaling, sink_tokens=count)

    return with_gradients(attend, [x.double() for x in inputs], upstream)


# Windows


def resting_on(inputs, count, logit):
    """The same with keys of the first tokens to which every query gives about this logit."""
    query, key, value = (x.clone() for x in inputs)
    query[..., 0] = 4.0
    key[:, :, :count] = 0.0
    key[:, :, :count, 0] = logit * query.shape[-1] ** 0.5 / 4.0
    key[:, :, count:, 0] = 0.0
    return query, key, value


@pytest.mark.parametrize("count", [1, 4, 100])
@pytest.mark.parametrize("logit", [0.0, 6.0])
@pytest.mark.parametrize("queries", [2500, 900])
def test_windows_skip_keys_and_never_sinks(count, logit, queries):
    slopes = [0.7, 0.3, 0.06, 0.004]
    inputs = resting_on(qkv(1, 4, 2, queries, 2500, 8), count, logit)
    upstream = upstream_of(inputs[0])
    segments = [Segment.causal(queries, 2500)]

    def attend(*x):
        return windowed_attention(*x, torch.tensor(slopes), 8**-0.5, segments=segments, sink_tokens=count)

    with record_reads() as reads:
        ours = with_gradients(attend, inputs, upstream)
    truths = gradients_of_truth(inputs, upstream, count, slopes)
    for got, exact in zip(ours, truths, strict=True):
        assert largest(got, exact) < EXACT * max(1.0, exact.abs().max().item())
    # The steepest heads look back a few hundred tokens; the sinks are far outside of that.
    assert max(reads[-1].windows[:2]) < 600
    assert max(reads[-1].kept[:2]) < 0.6
    if logit:
        without = windowed_attention(*inputs, torch.tensor(slopes), 8**-0.5, segments=segments)
        assert largest(without[:, :2, -200:], truths[0][:, :2, -200:]) > 0.1
        # Nearly all of the gradient of the sinks' values comes from queries that do not see them in any window.
        far = truths[3][:, :, :count].abs().sum()
        near = gradients_of_truth(inputs, upstream * (torch.arange(queries) < 600 - (2500 - queries))[:, None], count)
        assert far > near[3][:, :, :count].abs().sum()


@pytest.mark.parametrize("count", [1, 3, 9, 40, 200])
@pytest.mark.parametrize(("queries", "keys"), [(90, 90), (61, 90), (33, 35)])
@pytest.mark.parametrize("threads", [1, 3])
def test_windows_of_small_blocks(count, queries, keys, threads):
    """Every kind of span: flat runs, near and far blocks, remote columns."""
    inputs = qkv(2, 4, 2, queries, keys, 8)
    inputs = (inputs[0] * 3, inputs[1] * 3, inputs[2])
    upstream = upstream_of(inputs[0])
    slopes = [0.002, 0.5, 1.5, 0.01]
    segments = [Segment.causal(queries, keys)]

    def attend(*x):
        return windowed_attention(*x, torch.tensor(slopes), 8**-0.5, segments=segments, sink_tokens=count)

    with small_blocks(threads=threads), record_reads() as reads:
        ours = with_gradients(attend, inputs, upstream)
    for got, exact in zip(ours, gradients_of_truth(inputs, upstream, count, slopes), strict=True):
        assert largest(got, exact) < 2 * EXACT * max(1.0, exact.abs().max().item())
    assert sum(read.causal_pairs for read in reads) == 2 * triangle(queries, keys).sum()
    assert all(0 < share <= 1 for read in reads for share in read.kept)


@pytest.mark.parametrize("logit", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_in_windows_are_as_good_as_the_kernel_with_a_dense_float32_bias(dtype, logit):
    inputs = resting_on(qkv(1, 4, 4, 1100, 1100, 64, dtype), 2, logit)
    upstream = upstream_of(inputs[0]).to(dtype)
    slopes = reference.slopes(4)
    bias = alibi_bias(slopes.float()[:, None, None], triangle(1100)[None, None], 2)
    segments = [Segment.causal(1100, 1100)]
    ours = with_gradients(
        lambda *x: windowed_attention(*x, slopes, 64**-0.5, segments=segments, sink_tokens=2), inputs, upstream
    )
    dense = with_gradients(lambda *x: scaled_dot_product_attention(*x, attn_mask=bias), inputs, upstream)
    truths = gradients_of_truth(inputs, upstream.double(), 2)
    for result, other, truth in zip(ours, dense, truths, strict=True):
        # A row is a sum of two parts of like weight, sinks and near keys, each of which the kernel rounds.
        assert root_mean_square(result, truth) <= 1.5 * root_mean_square(other, truth)


def test_packed_sequences_have_sinks_each():
    """By windows, and beside them by rests: documents that are too short for windows."""
    seen = packed(600, 20, 400, 50)
    inputs = qkv(1, 4, 2, *seen.shape)
    slopes = [0.7, 0.3, 0.06, 0.004]
    output = run("sdpa", *inputs, seen[None, None], layer(4, slopes, sink_tokens=4))
    begin = 0
    for size in (600, 20, 400, 50):
        part = slice(begin, begin + size)
        alone = [x[:, :, part] for x in inputs]
        truth = gradients_of_truth(alone, upstream_of(alone[0]), 4, slopes)[0]
        assert largest(output[:, :, part], truth) < EXACT
        begin += size


# flex_attention


def flex(inputs, mask, module):
    with torch.no_grad():
        return flex_alibi_attention(module, *inputs, mask)[0].transpose(1, 2)


@counts
@pytest.mark.parametrize("kind", [None, *MASKS])
def test_flex_attention(count, kind):
    """Unfused; holes and packing have other tables."""
    seen = triangle(LENGTH) if kind is None else MASKS[kind]
    inputs = qkv(1, 4, 2, *seen.shape)
    rows = seen.any(dim=-1)
    truth = truth_of(*inputs, count, seen)
    with torch.compiler.set_stance("force_eager"):
        output = flex(inputs, None if kind is None else block_mask(seen[None]), layer(4, sink_tokens=count))
    assert largest(output[:, :, rows], truth[:, :, rows]) < 2e-5


@fused
@pytest.mark.parametrize("kind", [None, "packed"])
def test_flex_attention_reads_blocks_with_sinks(kind):
    """The kernel itself: on steep heads it leaves out blocks between the near ones and those with sinks."""
    seen = triangle(1000) if kind is None else packed(700, 300)
    inputs = resting_on(qkv(1, 4, 2, 1000, 1000), 4, 12.0)
    begin = 0 if kind is None else 700
    inputs[1][:, :, begin : begin + 4] = inputs[1][:, :, :4]
    slopes = [0.7, 0.5, 0.9, 0.6]
    output = flex(inputs, None if kind is None else block_mask(seen[None]), layer(4, slopes, sink_tokens=4))
    rows = torch.tensor([0, 3, 4, 300, 699, 700, 702, 999])
    truth = torch.cat(
        [truth_of(inputs[0][:, :, r : r + 1], *inputs[1:], 4, seen[None, r : r + 1], slopes) for r in rows.tolist()],
        dim=2,
    )
    assert largest(output[:, :, rows], truth) < 2e-5
    plain = flex(inputs, None if kind is None else block_mask(seen[None]), layer(4, slopes))
    assert largest(plain[:, :, rows], truth) > 0.1


# Models


def alibi_model(family, count=4, backend="sdpa", slopes=None, heads=4, **changes):
    model = hf_alibi.apply_alibi(stock_model(family, heads, **changes), slopes=slopes, sink_tokens=count)
    model.set_attn_implementation(backend)
    return model


def model_truth(family, model, ids, mask=None, segments=None, count=4, slopes=None):
    mask = torch.ones_like(ids) if mask is None else mask
    slopes = None if slopes is None else torch.tensor(slopes, dtype=torch.float64)
    return LOGITS[family](model, ids, mask, segments, slopes, sink_tokens=count)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits.double()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("count", [0, 1, 4, 500])
@pytest.mark.parametrize("heads", [4, 6, 9])
def test_models(family, backend, count, heads):
    model, ids = alibi_model(family, count, backend, heads=heads), tokens(2, 200)
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    truth = model_truth(family, model, ids, mask, count=count)
    real = mask.bool()
    assert largest(logits(model, ids, attention_mask=mask)[real], truth[real]) < 1e-4
    right = mask.flip(1)
    truth = model_truth(family, model, ids, right, count=count)
    assert largest(logits(model, ids, attention_mask=right)[right.bool()], truth[right.bool()]) < 1e-4
    assert largest(logits(model, ids), model_truth(family, model, ids, count=count)) < 1e-4


def test_the_reference_notices_missing_sinks(family):
    model, ids = alibi_model(family), tokens(1, 64)
    assert largest(model_truth(family, model, ids, count=0), logits(model, ids)) > 0.1


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_packing_by_position_ids(family, backend):
    if family == "gpt2":
        pytest.skip("GPT-2 of transformers does not look for packed sequences")
    model, ids = alibi_model(family, backend=backend), tokens(1, 330)
    position_ids = torch.cat([torch.arange(n) for n in (200, 3, 127)])[None]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([200, 3, 127]))[None]
    truth = model_truth(family, model, ids, segments=segments)
    assert largest(logits(model, ids, position_ids=position_ids, use_cache=False), truth) < 1e-4


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "alibi"])
@pytest.mark.parametrize("sizes", [[200], [1] * 200, [3, 100, 1, 1, 95], [150, 50]])
def test_caches(family, backend, kind, sizes):
    if kind == "alibi" and backend == "eager":
        pytest.skip("AlibiCache is for sdpa")
    model, ids = alibi_model(family, backend=backend, slopes=STEEP), tokens(2, 200)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    make = {
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=256),
        "alibi": AlibiCache,
    }
    output = step(model, ids, make[kind](), sizes)
    assert largest(output.double(), model_truth(family, model, ids, slopes=STEEP)) < 1e-4
    output = step(model, ids, make[kind](), sizes, attention_mask=mask).double()
    truth = model_truth(family, model, ids, mask, slopes=STEEP)
    assert largest(output[mask.bool()], truth[mask.bool()]) < 1e-4


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_generate(family, backend):
    model = alibi_model(family, backend=backend, tie_word_embeddings=False)
    prompt = tokens(2, 40)
    mask = torch.ones_like(prompt)
    mask[1, :15] = 0
    common = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, attention_mask=mask, use_cache=False, **common)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **common), expected)
    assert torch.equal(model.generate(prompt, attention_mask=mask, cache_implementation="static", **common), expected)
    beams = model.generate(prompt, attention_mask=mask, num_beams=3, use_cache=False, **common)
    assert torch.equal(model.generate(prompt, attention_mask=mask, num_beams=3, **common), beams)
    if backend == "sdpa":
        cache = AlibiCache()
        assert torch.equal(model.generate(prompt, attention_mask=mask, past_key_values=cache, **common), expected)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_continuous_batching(family, backend):
    model = alibi_model(family, backend=backend, tie_word_embeddings=False)
    prompts = [tokens(1, size, seed=size)[0].tolist() for size in (7, 40)]
    config = model.generation_config
    config.max_new_tokens, config.do_sample, config.eos_token_id, config.pad_token_id = 8, False, None, 0
    small = ContinuousBatchingConfig(**SMALL)
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    for prompt, result in zip(prompts, results.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)
        assert result.generated_tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("form", ["checkpointing", "autocast"])
def test_training(family, form):
    """Gradients of all weights: with checkpointing the same, under autocast those of float32 but for rounding."""
    model, ids = alibi_model(family), tokens(2, 150)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    truth = gradients()
    model.train()
    if form == "checkpointing":
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("attn_dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        model.gradient_checkpointing_enable()
        assert largest(gradients(), truth) < 1e-5
        return
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients()
    assert (half - truth).norm() < 0.1 * truth.norm()


def test_gradients_through_checkpoint_of_one_layer():
    inputs = [x.requires_grad_() for x in qkv(1, 4, 2, LENGTH, LENGTH)]
    module = layer(4, sink_tokens=2)
    upstream = upstream_of(inputs[0])
    plain = torch.autograd.grad(run("sdpa", *inputs, module=module), inputs, upstream)
    again = checkpoint(lambda *x: run("sdpa", *x, module=module), *inputs, use_reentrant=False)
    for a, b in zip(plain, torch.autograd.grad(again, inputs, upstream), strict=True):
        assert torch.equal(a, b)


def test_torch_compile_and_export(family):
    torch.compiler.reset()  # or the limit of compilations counts those of other tests
    model, ids = alibi_model(family), tokens(2, 40)
    truth = model_truth(family, model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert largest(logits(compiled, ids), truth) < 1e-4
    mask = torch.ones_like(ids)
    mask[0, :15] = 0
    masked = logits(compiled, ids, attention_mask=mask)[mask.bool()]
    assert largest(masked, model_truth(family, model, ids, mask)[mask.bool()]) < 1e-4
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    with torch.no_grad():
        assert largest(exported.module()(ids, use_cache=False).logits.double(), truth) < 1e-4


@backends
def test_some_of_a_layers_heads(monkeypatch, backend):
    """Under tensor parallelism the second rank has its own slopes, and the same sinks."""
    query, key, value = qkv(1, 4, 2, LENGTH, LENGTH)
    monkeypatch.setattr(head_slopes_module, "own_heads", lambda *_: (8, 4))
    output = run(backend, query, key, value, module=layer(8, sink_tokens=4))
    assert largest(output, truth_of(query, key, value, 4, slopes=reference.slopes(8)[4:])) < EXACT


# AlibiCache


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(cache_module, "_SPARE_TOKENS", 8)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("sizes", [[1] * 600, [100] + [1] * 400 + [50] * 2, [2, 38] + [1] * 500 + [60]])
@pytest.mark.parametrize("count", [1, 4])
def test_the_cache_keeps_sinks_for_ever(family, sizes, count):
    model, ids, cache = alibi_model(family, count, slopes=STEEP), tokens(2, 600), AlibiCache()
    output = step(model, ids, cache, sizes).double()
    assert largest(output, model_truth(family, model, ids, count=count, slopes=STEEP)) < 1e-4
    assert max(max(kept) for kept in cache.kept_tokens) < 500
    assert all(store.front == count for one in cache.layers for store in one.stores)


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_the_cache_keeps_sinks_of_padded_sequences(family, side):
    """Each sequence has its own, which are not the first tokens of the row."""
    model, ids, cache = alibi_model(family, slopes=STEEP), tokens(3, 500), AlibiCache()
    mask = torch.ones(3, 500, dtype=torch.long)
    if side == "left":
        mask[1, :37] = mask[2, :170] = 0  # what could be dropped soon would be the padding, and not yet its sinks
    elif side == "right":
        mask[1, 20:50] = mask[2, 2:50] = 0  # a prompt of 2 tokens, padded: half of its sinks come later
    else:
        mask[1, [0, 2, 3, 7, 100]] = mask[2, 1:30] = 0
    first = {"left": 180, "right": 50, "holes": 150}[side]
    output = step(model, ids, cache, [first] + [1] * (500 - first), attention_mask=mask).double()
    truth = model_truth(family, model, ids, mask, slopes=STEEP)
    assert largest(output[mask.bool()], truth[mask.bool()]) < 1e-4
    assert max(max(kept) for kept in cache.kept_tokens) < 450


@pytest.mark.usefixtures("_small")
def test_the_cache_drops_nothing_while_sinks_are_in_reach(family, monkeypatch):
    """A sink that stood in front of the last tokens and among them would count twice."""
    monkeypatch.setattr(cache_module, "_SETTLE", 4)
    model, ids, cache = alibi_model(family, slopes=[0.9, 0.8, 0.7, 0.6]), tokens(2, 200), AlibiCache()
    mask = torch.ones_like(ids)
    mask[1, 2:80] = 0
    output = step(model, ids, cache, [80] + [1] * 120, attention_mask=mask).double()
    truth = model_truth(family, model, ids, mask, slopes=[0.9, 0.8, 0.7, 0.6])
    assert largest(output[mask.bool()], truth[mask.bool()]) < 1e-4
    assert all(store.front for one in cache.layers for store in one.stores)


@pytest.mark.usefixtures("_small")
def test_beams_with_the_cache(family):
    model, prompt = alibi_model(family, slopes=STEEP), tokens(2, 40)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    common = {
        "max_new_tokens": 150,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": mask,
    }
    for options in ({}, {"num_beams": 3}):
        cache = AlibiCache()
        ours = model.generate(prompt, past_key_values=cache, **common, **options)
        assert torch.equal(ours, model.generate(prompt, past_key_values=DynamicCache(), **common, **options))
        assert max(max(kept) for kept in cache.kept_tokens) < cache.get_seq_length()


@pytest.mark.usefixtures("_small")
def test_taking_back_sinks(family):
    """What was a sink is taken back, and padding comes in its place."""
    model, ids, cache = alibi_model(family, slopes=STEEP), tokens(1, 250), AlibiCache()
    mask = torch.ones_like(ids)
    mask[:, 2:4] = 0
    step(model, torch.cat([ids[:, :2], tokens(1, 40, seed=9)], dim=1), cache, [1] * 42)
    assert cache.layers[0].sinks.tolist() == [[0, 1, 2, 3]]
    cache.crop(-40)
    truth = model_truth(family, model, ids, mask, slopes=STEEP)
    for index in range(2, 250):
        until = slice(0, index + 1)
        output = logits(model, ids[:, index : index + 1], past_key_values=cache, attention_mask=mask[:, until])
        assert not mask[0, index] or largest(output, truth[:, index : index + 1]) < 1e-4
    assert all(store.front for one in cache.layers for store in one.stores)
    cache.crop(-1)
    output = logits(model, ids[:, -1:], past_key_values=cache, attention_mask=mask)
    assert largest(output, truth[:, -1:]) < 1e-4


@pytest.mark.usefixtures("_small")
def test_batch_operations_on_the_cache(family):
    """Sequences take their sinks along."""
    model, ids, cache = alibi_model(family, slopes=STEEP), tokens(2, 201), AlibiCache()
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    step(model, ids[:, :200], cache, [60] + [1] * 140, attention_mask=mask)
    assert cache.layers[0].stores[0].front
    truth = model_truth(family, model, ids, mask, slopes=STEEP)[:, -1:]
    cache.reorder_cache(torch.tensor([1, 0]))
    output = logits(model, ids[:, -1:].flip(0), past_key_values=cache, attention_mask=mask.flip(0))
    assert largest(output.flip(0), truth) < 1e-4


@pytest.mark.usefixtures("_small")
def test_more_sinks_than_tokens_drop_nothing(family):
    model, ids, cache = alibi_model(family, 1000, slopes=STEEP), tokens(1, 200), AlibiCache()
    output = step(model, ids, cache, [1] * 200).double()
    assert largest(output, model_truth(family, model, ids, count=1000, slopes=STEEP)) < 1e-4
    assert {kept for one in cache.kept_tokens for kept in one} == {200}


@pytest.mark.usefixtures("_small")
def test_masks_under_which_other_tokens_come_first_are_refused(family):
    model, ids, cache = alibi_model(family, slopes=STEEP), tokens(1, 400), AlibiCache()
    step(model, ids, cache, [1] * 400)
    assert cache.layers[0].stores[0].front
    mask = torch.ones(1, 401, dtype=torch.long)
    mask[:, :2] = 0
    with pytest.raises(RuntimeError, match=r"not those that AlibiCache has kept as sinks; .*DynamicCache"):
        logits(model, ids[:, :1], past_key_values=cache, attention_mask=mask)


# Families, configs, files


@pytest.mark.parametrize("model_type", ["gptj", "codegen", "gpt_neox_japanese", "falcon", "gpt_neo"])
def test_families_with_attention_of_their_own(model_type):
    changes = {"attention_types": [[["global"], 2]]} if model_type == "gpt_neo" else {}
    model = hf_alibi.apply_alibi(stock_tiny(model_type, **changes), sink_tokens=3)
    hf_alibi.verify_alibi(model)
    ids = torch.randint(32, 99, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = logits(model, ids, use_cache=False)
    cache = DynamicCache()
    pieces = [logits(model, piece, past_key_values=cache) for piece in ids.split([20, 1, 19], dim=1)]
    assert largest(torch.cat(pieces, dim=1), whole) < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("model_type", ["qwen2", "opt", "gpt_neox", "granite", "phi", "stablelm"])
def test_other_families_verify(model_type):
    for report in hf_alibi.verify_alibi(hf_alibi.apply_alibi(stock_tiny(model_type), sink_tokens=2)):
        assert report.error < 1e-5


@pytest.mark.parametrize("name", ["whisper", "llava", "bert2bert"])
def test_composite_models(name, tmp_path):
    model_class, config, auto_class, _ = MODELS[name]
    model = hf_alibi.apply_alibi(built(model_class, config), sink_tokens=3)
    hf_alibi.verify_alibi(model)
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert loaded.config.alibi_sink_tokens == text_config(loaded.config).alibi_sink_tokens == 3
    hf_alibi.verify_alibi(loaded)


def refused_untouched(model, match, **kwargs):
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=match):
        hf_alibi.apply_alibi(model, **kwargs)
    after = snapshot(model)
    assert before[1:] == after[1:]
    assert all(after[0][name] == value for name, value in before[0].items())


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("mistral", "sliding_window"),
        ("gemma2", "sliding_attention"),
        ("gemma3_text", "sliding_attention"),
        ("gpt_oss", "sliding_attention"),
        ("llama4_text", "chunked_attention"),
        ("gpt_neo", "local"),
    ],
)
def test_layers_that_see_only_a_part_are_refused(model_type, found):
    model = stock_tiny(model_type)
    refused_untouched(
        model, rf"alibi_sink_tokens is 2, .* see only a part of the sequence \({found}\).*use 0", sink_tokens=2
    )
    assert hf_alibi.verify_alibi(hf_alibi.apply_alibi(model))


def test_a_window_at_run_time_is_refused():
    query, key, value = qkv(1, 4, 2, 10, 10)
    for name in ("eager", "sdpa"):
        with pytest.raises(ValueError, match="was called with sliding_window=4; set alibi_sink_tokens to 0"):
            run(name, query, key, value, triangle(10)[None, None], layer(4, sink_tokens=1), sliding_window=4)


def test_flash_attention_is_refused(family):
    model = stock_model(family)
    model.config._attn_implementation = "flash_attention_2"
    refused_untouched(model, "alibi_sink_tokens is 4, but flash-attn gives the bias to every key", sink_tokens=4)
    converted = alibi_model(family)
    with pytest.raises(ValueError, match=r"flash-attn gives the bias to every key; make it 0, or use .*'sdpa'"):
        converted.set_attn_implementation("flash_attention_2")
    with pytest.raises(ValueError, match="flash-attn gives the bias to every key"):
        run("flash_attention_2", *qkv(1, 4, 2, 10, 10), module=layer(4, sink_tokens=1))


@pytest.mark.parametrize("count", [-1, True, 1.0, "4", None])
def test_values_that_are_no_count_are_refused(count):
    refused_untouched(
        stock_model("gpt2"), "alibi_sink_tokens must be tokens .* an int of at least 0, got", sink_tokens=count
    )
    with pytest.raises(Exception, match=rf"alibi_sink_tokens.*int.*{count}"):
        AlibiGPT2Config(alibi_sink_tokens=count)


def test_no_sinks_by_default(family):
    model = hf_alibi.apply_alibi(stock_model(family))
    assert model.config.alibi_sink_tokens == 0
    assert AlibiGPT2Config().alibi_sink_tokens == AlibiLlamaConfig().alibi_sink_tokens == 0


def test_files_keep_them(family, tmp_path):
    model, ids = alibi_model(family, 3), tokens(1, 50)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).alibi_sink_tokens == 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.alibi_sink_tokens == 3
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, alibi_sink_tokens=1)
    assert largest(logits(other, ids), model_truth(family, model, ids, count=1)) < 1e-4
    # What was saved before the field existed.
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"alibi_sink_tokens": 3,', ""))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.alibi_sink_tokens == 0


def test_a_plain_checkpoint_loads_with_them(family, tmp_path):
    stock = stock_model(family)
    stock.save_pretrained(tmp_path)
    made = {"gpt2": "AlibiGPT2LMHeadModel", "llama": "AlibiLlamaForCausalLM"}[family]
    loaded = getattr(hf_alibi.model.modeling, made).from_pretrained(tmp_path, alibi_sink_tokens=2).eval()
    ids = tokens(1, 50)
    assert largest(logits(loaded, ids), model_truth(family, loaded, ids, count=2)) < 1e-4


def test_configs_of_layers_that_see_only_a_part_are_refused():
    config = hf_alibi.apply_alibi(stock_tiny("gemma2")).config
    config.alibi_sink_tokens = 1
    with pytest.raises(ValueError, match="see only a part of the sequence"):
        AutoModelForCausalLM.from_config(config)
    with pytest.raises(Exception, match="see only a part of the sequence"):
        type(config)(alibi_sink_tokens=1)


def test_llama_configs_of_any_kind_take_them():
    assert AlibiLlamaConfig(**{**stock_config("llama").to_dict(), "alibi_sink_tokens": 4}).alibi_sink_tokens == 4


# verify_alibi


@contextmanager
def applying(model, count):
    """The attention works with this number of sink tokens, whatever the config says."""
    original = dict(attention.BACKENDS)

    def wrong(function):
        def attend(module, *args, **kwargs):
            config = module.config
            try:
                said, config.alibi_sink_tokens = config.alibi_sink_tokens, count
                return function(module, *args, **kwargs)
            finally:
                config.alibi_sink_tokens = said

        return attend

    attention.BACKENDS.update({name: wrong(function) for name, function in original.items()})
    attention.register_backends()
    try:
        yield
    finally:
        attention.BACKENDS.update(original)
        attention.register_backends()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(("said", "done"), [(4, 0), (0, 4), (1, 0), (0, 1), (4, 3), (3, 4), (30, 20), (20, 30)])
def test_verify_finds_other_sinks(family, backend, said, done):
    model = alibi_model(family, said, backend)
    reports = hf_alibi.verify_alibi(model)
    assert reports[0].slopes == pytest.approx(hf_alibi.alibi_slopes(4).tolist(), rel=1e-5)
    with applying(model, done), pytest.raises(VerificationError, match=r"layer .*0"):
        hf_alibi.verify_alibi(model)


@pytest.mark.parametrize(("said", "done"), [(4, 0), (0, 4), (4, 3), (3, 4)])
def test_verify_measures_the_bias_of_sinks_where_outputs_cannot_show_it(said, done):
    """Slopes that half precision hides in any output are measured in float64 all the same."""
    model = alibi_model("gpt2", said, slopes=[1e-4, 2e-4, 1e-5, 3e-4]).bfloat16()
    hf_alibi.verify_alibi(model)
    with (
        applying(model, done),
        pytest.raises(VerificationError, match=r"has slopes|gives its first \d tokens the bias"),
    ):
        hf_alibi.verify_alibi(model)


def test_every_layer_reads_the_field(family):
    model = alibi_model(family, 2)
    assert {module.config.alibi_sink_tokens for _, module in text_decoder(model).self_attentions} == {2}
