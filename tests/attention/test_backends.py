"""Each backend against the float64 reference, at the level of queries, keys and values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers import reference
from helpers.attention import ANYWHERE, EVERYWHERE, LargestTensor, expected, largest, layer, qkv, run
from hf_alibi.attention import blocks
from hf_alibi.attention.backends import alibi_name
from hf_alibi.attention.sdpa import factored

# Largest error allowed to outputs in float32, for values of size 1; dropping the bias costs 0.1 and more.
EXACT = 1e-5


backends = pytest.mark.parametrize("backend", EVERYWHERE)


@backends
@pytest.mark.parametrize("heads", [1, 4, 6, 9, 12])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_causal(backend, heads, grouped, length):
    key_heads = {4: 2, 6: 3, 9: 3, 12: 2}.get(heads, 1) if grouped else heads
    query, key, value = qkv(2, heads, key_heads, length, length)
    assert largest(run(backend, query, key, value), expected(query, key, value)) < EXACT


@pytest.mark.parametrize("length", [1024, 2048, 5000])
@pytest.mark.parametrize("form", ["windowed", "one call", "blocks"])
def test_sdpa_keeps_its_precision_at_length(monkeypatch, length, form):
    """Slope × position rounded to float32 in one piece fails this by far."""
    if form == "blocks":
        monkeypatch.setattr(factored, "_SINGLE_CALL", 300)
    backend = "sdpa" if form == "windowed" else "unwindowed"
    query, key, value = qkv(1, 4, 2, length, length, width=8)
    slopes = [0.7, 0.3, 0.05, 0.004]
    output = run(backend, query, key, value, module=layer(4, slopes))
    assert largest(output, expected(query, key, value, head_slopes=torch.tensor(slopes))) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "unwindowed"])
def test_sdpa_keeps_its_precision_at_131072_tokens(backend):
    length, rows = 131_072, torch.tensor([0, 1, 255, 256, 4095, 70_000, 131_071])
    query, key, value = qkv(1, 2, 1, length, length, width=8)
    slopes = [0.7, 0.004]
    with torch.inference_mode():
        output = run(backend, query, key, value, module=layer(2, slopes))
    for row in rows.tolist():
        keys = slice(0, row + 1)
        seen = torch.ones(1, 1, row + 1, dtype=torch.bool)
        one = query[:, :, row : row + 1]
        truth = expected(one, key[:, :, keys], value[:, :, keys], seen, head_slopes=torch.tensor(slopes))
        assert largest(output[:, :, row : row + 1], truth) < EXACT


@backends
def test_one_query_sees_all_keys(backend):
    query, key, value = qkv(2, 6, 2, 1, 700)
    mask = torch.ones(2, 1, 1, 700, dtype=torch.bool)
    truth = expected(query, key, value)
    assert largest(run(backend, query, key, value), truth) < EXACT
    assert largest(run(backend, query, key, value, mask), truth) < EXACT


def test_first_step_with_a_static_cache_ignores_the_empty_keys():
    query, key, value = qkv(1, 4, 4, 10, 64)
    truth = expected(query, key[:, :, :10], value[:, :, :10])
    assert largest(run("sdpa", query, key, value), truth) < EXACT


@backends
@pytest.mark.parametrize("form", ["bool", "additive", "minus_infinity", "minus_1e9"])
def test_masks(backend, form):
    """Left padding, right padding, holes and packing in one batch; positions count tokens that are seen."""
    length = 40
    padding = torch.ones(4, length, dtype=torch.bool)
    padding[0, :7] = False
    padding[1, -9:] = False
    padding[2, 5:9] = False
    segments = torch.zeros(4, length, dtype=torch.long)
    segments[3, 13:] = 1
    segments[3, 30:] = 2
    seen = reference.visible(padding, segments)
    query, key, value = qkv(4, 6, 2, length, length)
    mask = seen[:, None]
    if form != "bool":
        low = {"additive": torch.finfo(torch.float32).min, "minus_infinity": -math.inf, "minus_1e9": -1e9}[form]
        mask = torch.zeros(mask.shape).masked_fill(~mask, low)
    truth = expected(query, key, value, seen, reference.token_positions(padding))
    real = padding[:, None, :, None].expand_as(truth)
    output = run(backend, query, key, value, mask)
    assert largest(output[real], truth[real]) < EXACT
    assert output.isfinite().all()


@backends
def test_masks_per_head_and_soft_masks(backend):
    """An additive mask that is not only 0 and minus infinity is added on top of the bias, head by head."""
    query, key, value = qkv(2, 4, 4, 12, 12)
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    soft = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(3))
    output = run(backend, query, key, value, soft.masked_fill(~seen, -math.inf))
    position = torch.arange(12.0)
    bias = -reference.slopes(4)[:, None, None] * (position[:, None] - position)
    logits = query.double() @ key.double().mT / 4 + bias + soft
    truth = logits.masked_fill(~seen, -math.inf).softmax(-1) @ value.double()
    assert largest(output, truth) < EXACT


@backends
def test_windows_and_trees(backend):
    """Any boolean mask: the distance counts the keys that the query may see after the key."""
    seen = torch.rand(1, 1, 30, 30, generator=torch.Generator().manual_seed(2)) < 0.4
    seen = seen.tril() | torch.eye(30, dtype=torch.bool)
    query, key, value = qkv(1, 4, 2, 30, 30)
    truth = torch.stack(
        [
            expected(query[:, :, i : i + 1], key[:, :, row], value[:, :, row])[:, :, 0]
            for i, row in enumerate(seen[0, 0])
        ],
        dim=2,
    )
    assert largest(run(backend, query, key, value, seen), truth) < EXACT


@backends
def test_a_query_that_sees_nothing_gives_zeros_and_no_nan_gradient(backend):
    query, key, value = (x.requires_grad_() for x in qkv(1, 4, 2, 5, 5))
    seen = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    seen[..., :2, :] = False
    output = run(backend, query, key, value, seen)
    output.sum().backward()
    assert torch.equal(output[:, :, :2], torch.zeros_like(output[:, :, :2]))
    assert all(x.grad.isfinite().all() for x in (query, key, value))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_half_types_are_as_good_as_plain_attention(backend, dtype, masked):
    """Error to float64 at most 1.5 × that of transformers' own sdpa attention without any bias."""
    query, key, value = qkv(2, 12, 4, 700, 700, width=64, dtype=dtype)
    seen = torch.ones(2, 700, 700, dtype=torch.bool).tril()
    module = layer(12)
    module.num_key_value_groups = 3
    plain, _ = sdpa_attention_forward(module, query, key, value, None)
    plain_error = largest(plain.transpose(1, 2), expected(query, key, value, seen, head_slopes=torch.zeros(12)))
    output = run(backend, query, key, value, seen[:, None] if masked else None)
    assert output.dtype == dtype
    assert largest(output, expected(query, key, value, seen)) <= 1.5 * plain_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_beyond_65536_positions(dtype):
    """The third digit: without it neighbouring far keys share one bias value."""
    end = 140_000
    positions = torch.arange(end) - end // 2
    slopes = torch.tensor([[0.00390625], [0.3]])
    left, right = factored._bias_factors(slopes, positions, positions, dtype)
    product = left.double() @ right.double().mT
    exact = slopes.double() * positions.double()
    near = positions.abs() < 1000
    # High and low half hold 16 bits of a slope in bfloat16; powers of two are exact.
    assert torch.equal(product[0], exact[0])
    assert ((product - exact).abs()[:, near] <= 2**-15 * exact.abs()[:, near]).all()


@pytest.mark.parametrize("backend", ["sdpa", "unwindowed"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [33, 2100])
@pytest.mark.parametrize("shares", [True, False])
def test_gradients(monkeypatch, masked, length, backend, shares):
    """In one call and in blocks that are recomputed in the backward pass; key heads shared or repeated."""
    monkeypatch.setattr(factored, "_SINGLE_CALL", 1000)
    monkeypatch.setattr(factored, "_kernel_shares_keys", lambda *_, **__: shares)
    query, key, value = qkv(1, 4, 2, length, length, width=8)
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(5))
    seen = torch.ones(1, length, length, dtype=torch.bool).tril()
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    run(backend, *inputs, seen[:, None] if masked else None).backward(upstream)
    truths = [x.double().requires_grad_() for x in (query, key, value)]
    expected(*truths).backward(upstream.double())
    for ours, truth in zip(inputs, truths, strict=True):
        assert largest(ours.grad, truth.grad) < 2e-5 * truth.grad.abs().max().item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_grows_linearly_forward_and_backward(monkeypatch, masked, dropout):
    """No operation makes a (heads, length, length) matrix; with a mask or dropout, blocks stay within their budget."""
    length, heads, width = 1024, 4, 16
    budget = heads * length * 32
    monkeypatch.setattr(blocks, "_DENSE_ENTRIES", budget)
    inputs = [x.requires_grad_() for x in qkv(1, heads, heads, length, length, width)]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if masked else None
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with LargestTensor() as largest_tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run("unwindowed", *inputs, mask, layer(heads).train(), dropout=dropout)
        output.sum().backward()
    assert largest_tensor.entries <= max(budget, heads * length * (width + 4))
    # Kept for the backward pass: queries, keys, values, output, a mask of one byte an entry, and no block's bias.
    assert sum(saved.values()) <= 5 * heads * length * (width + 4) + length * length // 4


def test_masked_blocks_equal_one_block(monkeypatch):
    query, key, value = qkv(2, 4, 2, 50, 50)
    mask = torch.ones(2, 1, 50, 50, dtype=torch.bool).tril()
    mask[1, ..., :9] = False
    whole = run("unwindowed", query, key, value, mask)
    monkeypatch.setattr(blocks, "_DENSE_ENTRIES", 2 * 4 * 50 * 7)
    assert largest(run("unwindowed", query, key, value, mask), whole) < EXACT


@pytest.mark.parametrize("mask_kind", ["causal", "bool"])
def test_blocks_with_dropout_have_the_gradient_of_their_forward(monkeypatch, mask_kind):
    """Recomputed blocks must drop the same weights again: finite differences under one seed agree with backward."""
    monkeypatch.setattr(blocks, "_DENSE_ENTRIES", 4 * 20 * 6)
    query, key, value = qkv(1, 4, 2, 20, 20, width=4, dtype=torch.float64)
    mask = None if mask_kind == "causal" else torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    module = layer(4).train()

    def loss(*inputs):
        torch.manual_seed(11)
        return run("sdpa", *inputs, mask, module, dropout=0.3).sum()

    inputs = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@backends
def test_dropout_drops_weights_and_keeps_their_mean(backend):
    query, key, value = qkv(1, 4, 2, 16, 16)
    module = layer(4).train()
    mean = torch.stack([run(backend, query, key, value, module=module, dropout=0.5) for _ in range(2000)]).mean(0)
    truth = expected(query, key, value)
    assert largest(run(backend, query, key, value, module=module, dropout=0.5), truth) > 0.1
    assert largest(mean, truth) < 0.15


@backends
def test_zero_slopes_are_plain_attention(backend):
    query, key, value = qkv(1, 4, 4, 20, 20)
    plain = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert largest(run(backend, query, key, value, module=layer(4, [0.0] * 4)), plain) < 1e-6


@backends
def test_the_future_is_not_seen(backend):
    query, key, value = qkv(1, 4, 4, 20, 20)
    before = run(backend, query, key, value)
    key[:, :, -1], value[:, :, -1] = 50.0, 50.0
    assert torch.equal(run(backend, query, key, value)[:, :, :-1], before[:, :, :-1])


@settings(max_examples=60, deadline=None)
@given(
    backend=st.sampled_from(ANYWHERE),
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    queries=st.integers(1, 24),
    cached=st.integers(0, 24),
    width=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend, batch, groups, key_heads, queries, cached, width, seed):
    """Chunks after a cache, with the mask that transformers gives for them."""
    keys = queries + cached
    query, key, value = qkv(batch, groups * key_heads, key_heads, queries, keys, width, seed=seed)
    seen = torch.ones(keys, keys, dtype=torch.bool).tril()[-queries:].expand(batch, 1, -1, -1)
    assert largest(run(backend, query, key, value, seen), expected(query, key, value)) < EXACT


@backends
def test_dynamic_scaling_depends_on_what_each_query_sees(backend):
    scaling, length = {"type": "dynamic", "factor": 3.0}, 64
    query, key, value = qkv(1, 4, 2, length, length)
    module = layer(4, scaling=scaling, train_length=16)
    output = run(backend, query, key, value, module=module)
    rows = []
    for row in range(length):
        scale = 1 / min(max(1.0, (row + 1) / 16), 3.0)
        seen = slice(0, row + 1)
        slopes = reference.slopes(4) * scale
        rows.append(expected(query[:, :, row : row + 1], key[:, :, seen], value[:, :, seen], head_slopes=slopes))
    truth = torch.cat(rows, dim=2)
    assert largest(output, truth) < EXACT
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    assert largest(run(backend, query, key, value, mask, module), truth) < EXACT


@backends
def test_dynamic_scaling_without_a_training_length_is_refused(backend):
    with pytest.raises(ValueError, match="needs alibi_train_length"):
        run(backend, *qkv(1, 4, 4, 3, 3), module=layer(4, scaling={"type": "dynamic"}))


@backends
@pytest.mark.parametrize("argument", ["position_bias", "indices", "block_indices", "cache"])
def test_refuses_what_it_would_ignore(backend, argument):
    with pytest.raises(ValueError, match=argument):
        run(backend, *qkv(1, 4, 4, 3, 3), **{argument: torch.ones(1)})


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("special", [{"softcap": 3.0}, {"s_aux": True}, {"softcap": 2.0, "s_aux": True}])
def test_capped_logits_and_sinks(backend, special, padding, dtype):
    """The bias is added after the cap; a sink takes the same share of a query's weights wherever the query stands."""
    query, key, value = qkv(2, 6, 3, 40, 40, dtype=dtype)
    special = {**special, **({"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0, 4.0, -3.0])} if "s_aux" in special else {})}
    tokens = torch.ones(2, 40, dtype=torch.long)
    tokens[1, :padding] = 0
    mask = (torch.ones(40, 40, dtype=torch.bool).tril() & tokens.bool()[:, None, None, :]) if padding else None
    output = run(backend, 3 * query, key, value, mask, **special)
    truth = reference.attention(
        3 * query,
        key,
        value,
        reference.visible(tokens),
        reference.token_positions(tokens),
        reference.slopes(6),
        query.shape[-1] ** -0.5,
        softcap=special.get("softcap"),
        sinks=special.get("s_aux"),
    )
    error = (output.double() - truth).transpose(1, 2)[tokens.bool()].abs().max().item()
    assert error < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    plain = run(backend, 3 * query, key, value, mask)
    assert (plain - output).abs().max() > 0.05


@backends
def test_refuses_attention_that_is_not_causal(backend):
    with pytest.raises(ValueError, match="is_causal=False"):
        run(backend, *qkv(1, 4, 4, 3, 3), is_causal=False)


@backends
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 3), "4D mask"),
        (torch.ones(1, 1, 3, 4), r"\(3, 4\) queries and keys, but there are \(3, 3\)"),
        (torch.ones(1, 1, 3, 3, dtype=torch.long), "bool or floating point"),
    ],
)
def test_refuses_malformed_masks(backend, mask, message):
    with pytest.raises(ValueError, match=message):
        run(backend, *qkv(1, 4, 4, 3, 3), mask)


@backends
def test_refuses_another_number_of_heads_than_slopes(backend):
    with pytest.raises(ValueError, match="2 heads got 4 ALiBi slopes"):
        run(backend, *qkv(1, 2, 2, 3, 3), module=layer(4, slopes=[0.5, 0.25, 0.1, 0.0]))


def test_sdpa_refuses_fewer_keys_than_causal_queries():
    with pytest.raises(ValueError, match="needs as many keys"):
        run("sdpa", *qkv(1, 4, 4, 5, 3))


def test_names_without_alibi_form_raise():
    with pytest.raises(
        ValueError,
        match='"flash_attention_3"` is not supported with ALiBi; supported: eager, sdpa',
    ):
        alibi_name("flash_attention_3")


def test_slopes_cached_in_inference_mode_can_train_later():
    slopes = [0.123, 0.0456]
    with torch.inference_mode():
        run("sdpa", *qkv(1, 2, 2, 4, 4), module=layer(2, slopes))
    inputs = [x.requires_grad_() for x in qkv(1, 2, 2, 4, 4)]
    run("sdpa", *inputs, module=layer(2, slopes)).sum().backward()
    assert inputs[0].grad is not None


@pytest.mark.gpu
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(backend, dtype, masked):
    query, key, value = qkv(2, 12, 4, 700, 700, width=64, dtype=dtype)
    seen = torch.ones(2, 1, 700, 700, dtype=torch.bool).tril()
    output = run(backend, query.cuda(), key.cuda(), value.cuda(), seen.cuda() if masked else None)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert largest(output.cpu(), expected(query, key, value)) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [4096, 2**14 + 256])
def test_memory_on_a_gpu_is_linear_with_shared_key_heads(dtype, length):
    """Without a kernel that takes them, PyTorch builds the matrix of all logits and says nothing."""
    query, key, value = (x.cuda() for x in qkv(1, 9, 3, length, length, width=64, dtype=dtype))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        run("sdpa", query, key, value)
    assert torch.cuda.max_memory_allocated() - before < 9 * length**2 * dtype.itemsize / 8
