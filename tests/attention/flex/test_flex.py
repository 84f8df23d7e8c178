"""`flex_attention` against the float64 reference.

Compiling its kernel takes seconds for each new kind of shape. So masks are tested unfused, where PyTorch computes what
the kernel is told densely; the kernel itself, and what it skips, is tested on few kinds of shapes.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_alibi
from helpers import reference
from helpers.attention import additive, block_mask, expected, fused, largest, layer, qkv
from helpers.models import stock_model, tokens
from hf_alibi.attention.flex import backend as flex
from hf_alibi.attention.flex import runs
from hf_alibi.attention.flex.backend import flex_alibi_attention
from hf_alibi.attention.flex.runs import BLOCK, runs_of, visible_blocks

NAME = "flex_attention"
# Largest error for values of size 1; dropping the bias costs 0.1 and more.
EXACT = 2e-5


@pytest.fixture(autouse=True)
def _inference(request):
    with torch.set_grad_enabled("gpu" in request.keywords):
        yield


@pytest.fixture
def unfused():
    """PyTorch's dense form of flex_attention, which reads every block and compiles nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def read(monkeypatch):
    """For each call of the kernel, bool (batch, heads, query blocks, key blocks) of what it reads."""
    recorded, compiled = [], flex._compiled

    def recording(**options):
        def attend(*args):
            partial, full = args[3]
            recorded.append(partial | full)
            assert not (partial & full).any()
            return compiled(**options)(*args)

        return attend

    monkeypatch.setattr(flex, "_compiled", recording)
    return recorded


def run(query, key, value, mask=None, module=None, **kwargs):
    module = layer(query.shape[1]) if module is None else module
    return flex_alibi_attention(module, query, key, value, mask, **kwargs)[0].transpose(1, 2)


LENGTH = 400


def masks():
    """Padding mask and segments, and what the kernel is told of them, by kind."""
    full = torch.ones(3, LENGTH, dtype=torch.bool)
    one = torch.zeros(3, LENGTH, dtype=torch.long)
    left, holes, packed = full.clone(), full.clone(), one.clone()
    left[0, :150] = left[1, 256:] = left[2, :7] = False
    holes[0, 200:260] = holes[1, 5:9] = holes[1, :2] = holes[2, -30:] = False
    packed[0, 13:] = packed[1, 128:] = packed[1, 300:] = 1
    packed[1, 300:] = packed[2, 333:] = 2
    return {
        "none": (full, one, (3, 64)),
        "left and right": (left, one, (3, 64)),
        "packed": (full, packed, (2, 3, LENGTH)),
        "holes": (holes, one, (3, 3, LENGTH)),
        "packed, padded, holes": (left & holes, packed, (3, 3, LENGTH)),
    }


def case(kind):
    """Queries, keys, values, what they see, the reference's output, and which queries are tokens."""
    padding, segments, _ = masks()[kind]
    seen = reference.visible(padding, segments)
    inputs = qkv(3, 6, 2, LENGTH, LENGTH)
    truth = expected(*inputs, seen, reference.token_positions(padding))
    return inputs, seen, truth, padding[:, None, :, None].expand_as(truth)


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("form", ["block mask", "bool"])
def test_masks(unfused, kind, form):
    inputs, seen, truth, real = case(kind)
    mask = block_mask(seen) if form == "block mask" else seen[:, None]
    assert runs_of(mask, *inputs[:2]).table.shape == masks()[kind][2]
    output = run(*inputs, mask)
    assert largest(output[real], truth[real]) < EXACT
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", masks())
def test_blocks_to_be_read(kind):
    """None is missing, none is read without the mask that needs it, and no more are read than just about needed."""
    _, seen, _, _ = case(kind)
    partial, full = visible_blocks(runs_of(seen[:, None], *qkv(3, 1, 1, LENGTH, LENGTH)[:2]), LENGTH)
    spare = -LENGTH % BLOCK
    blocks = torch.nn.functional.pad(seen, (0, spare, 0, spare)).unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK)
    some, whole = blocks.flatten(3).any(-1)[:, None], blocks.flatten(3).all(-1)[:, None]
    assert ((partial | full) >= some).all()
    assert (full == whole).all()
    # What lies between the first and the last key that a block of queries sees may be read in vain.
    assert (partial | full).sum() <= some.sum() + 2


@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("spare", [0, 60])
def test_chunks_after_a_cache(unfused, rows, spare):
    """Also of a static cache, whose last keys are still empty."""
    query, key, value = qkv(2, 4, 2, rows, LENGTH + spare)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[-rows:].expand(2, -1, -1)
    truth = expected(query, key[:, :, :LENGTH], value[:, :, :LENGTH])
    seen = torch.nn.functional.pad(seen, (0, spare))
    for mask in (block_mask(seen), seen[:, None], seen[:1, None]):
        assert largest(run(query, key, value, mask), truth) < EXACT


def test_without_a_mask(unfused):
    """Causal from the first key on, and one query sees all keys."""
    for queries, keys in ((1, 300), (10, 64), (300, 300)):
        query, key, value = qkv(2, 4, 4, queries, keys)
        filled = keys if queries == 1 else queries
        truth = expected(query, key[:, :, :filled], value[:, :, :filled])
        assert largest(run(query, key, value), truth) < EXACT


def test_sliding_windows(unfused):
    query, key, value = qkv(2, 4, 2, 200, 200)
    seen = torch.ones(2, 200, 200, dtype=torch.bool).tril().triu(-20)
    assert largest(run(query, key, value, block_mask(seen)), expected(query, key, value, seen)) < EXACT


def test_the_kernel_keeps_its_precision_far_from_the_first_key(unfused):
    """Distances are exact integers; slope × key index rounded to float32 fails this by far."""
    query, key, value = qkv(1, 2, 1, 4, 140_000, width=8)
    slopes = [0.7, 0.004]
    seen = torch.ones(1, 1, 4, 140_000, dtype=torch.bool).tril(140_000 - 4)
    truth = expected(query, key, value, seen[:, 0], head_slopes=torch.tensor(slopes))
    assert largest(run(query, key, value, seen, layer(2, slopes)), truth) < EXACT


@pytest.mark.parametrize("masked", [False, True])
def test_dynamic_scaling_depends_on_what_each_query_sees(unfused, masked):
    scaling = {"type": "dynamic", "factor": 3.0}
    query, key, value = qkv(2, 4, 2, 64, 64)
    seen = torch.ones(2, 64, 64, dtype=torch.bool).tril()
    if masked:
        seen[1, :, :20] = False
    output = run(query, key, value, block_mask(seen) if masked else None, layer(4, scaling=scaling, train_length=16))
    for b, row in ((0, 63), (0, 5), (1, 63), (1, 40)):
        keys = seen[b, row]
        slopes = reference.slopes(4) / min(max(1.0, int(keys.sum()) / 16), 3.0)
        truth = expected(
            query[b : b + 1, :, [row]], key[b : b + 1, :, keys], value[b : b + 1, :, keys], None, None, slopes
        )
        assert largest(output[b, :, [row]], truth[0]) < EXACT


def test_zero_slopes_are_plain_attention(unfused):
    query, key, value = qkv(1, 4, 4, 20, 20)
    plain = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert largest(run(query, key, value, module=layer(4, [0.0] * 4)), plain) < 1e-6


@pytest.mark.parametrize("width", [3, 20])
def test_widths_without_a_kernel_of_their_own(unfused, width):
    query, key, value = qkv(1, 4, 2, 30, 30, width)
    output = run(query, key, value)
    assert output.shape == query.shape
    assert largest(output, expected(query, key, value)) < EXACT


def test_autocast_rounds_no_bias(unfused):
    inputs = qkv(1, 4, 2, 300, 300)
    half = run(*(x.bfloat16() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(*inputs), half)


@fused
def test_two_compilations_serve_all_lengths_slopes_scalings_and_padding():
    def graphs_compiled(length, slopes=None, padded=0, scaling=0.25):
        inputs, before = qkv(1, 4, 2, length, length), counters["stats"]["unique_graphs"]
        padding = torch.arange(length)[None] >= padded
        seen, position = reference.visible(padding), reference.token_positions(padding)
        slopes_of = reference.slopes(4) if slopes is None else torch.tensor(slopes)
        output = run(*inputs, block_mask(seen), layer(4, slopes), scaling=scaling)
        truth = reference.attention(*inputs, seen, position, slopes_of, scaling)
        assert largest(output[:, :, padded:], truth[:, :, padded:]) < EXACT
        return counters["stats"]["unique_graphs"] - before

    assert graphs_compiled(300) + graphs_compiled(700) <= 2
    assert graphs_compiled(512) == 0
    assert graphs_compiled(2100, [1.0, 0.2, 0.03, 0.0]) == 0
    assert graphs_compiled(900, padded=333, scaling=0.3) == 0


@fused
def test_far_blocks_are_skipped_and_their_loss_is_below_rounding(read):
    query, key, value = qkv(1, 4, 2, 2100, 2100)
    output = run(query, key, value)
    blocks = read[0].shape[-1]
    per_head = read[0].sum(dim=(0, 2, 3))
    assert (per_head[:-1] < per_head[1:]).all()
    # The steepest head, 0.25 a token, reads two blocks a query; the flattest, 0.004, reads all.
    assert per_head[0] == 2 * blocks - 1
    assert per_head[3] == blocks * (blocks + 1) / 2
    assert largest(output, expected(query, key, value)) < EXACT


@fused
def test_a_far_key_that_matters_is_read(read):
    """The largest of all keys, 1000 times as long as others, in reach of the steepest head."""
    query, key, value = qkv(1, 4, 2, 700, 700)
    key[:, :, 40] *= 1000
    output = run(query, key, value)
    assert read[0][0, 0, 5, 0]
    assert not read[0][0, 0, 5, 1]
    truth = expected(query, key, value)
    # Logits of some thousands have fewer digits left.
    assert largest(output, truth) < 1e-3
    key[:, :, 40] = 0
    assert largest(output, expected(query, key, value)) > 0.1


@fused
def test_padding_in_a_batch_is_exact_when_fused(read):
    inputs, seen, truth, real = case("left and right")
    output = run(*inputs, block_mask(seen))
    assert largest(output[real], truth[real]) < EXACT
    assert output.isfinite().all()
    # Blocks of nothing but padding are not read.
    assert not read[0][0, :, :, 0].any()


@fused
@pytest.mark.parametrize("kind", ["packed", pytest.param("holes", marks=pytest.mark.slow)])
def test_other_masks_are_exact_when_fused(kind):
    inputs, seen, truth, real = case(kind)
    assert largest(run(*inputs, block_mask(seen))[real], truth[real]) < EXACT


@fused
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_good_as_plain_attention(dtype):
    """Error to float64 at most 1.5 × that of transformers' own sdpa attention without any bias."""
    query, key, value = qkv(2, 12, 4, 700, 700, width=64, dtype=dtype)
    module = layer(12)
    module.num_key_value_groups = 3
    plain, _ = sdpa_attention_forward(module, query, key, value, None)
    plain_error = largest(plain.transpose(1, 2), expected(query, key, value, head_slopes=torch.zeros(12)))
    output = run(query, key, value)
    assert output.dtype == dtype
    assert largest(output, expected(query, key, value)) <= 1.5 * plain_error


def kept_and_left_out(query, key, slopes, tolerance, seen=None):
    """Which blocks are kept, and the weights that each query leaves out, in float64."""
    length = query.shape[2]
    seen = torch.ones(len(query), length, length, dtype=torch.bool).tril() if seen is None else seen
    slopes = torch.tensor(slopes)
    kept = flex._kept_blocks(query, key, runs_of(seen[:, None], query, key), slopes, 0.25, tolerance)
    read = kept.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :length, :length]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    logits = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * 0.25
    logits = (logits - slopes.double()[:, None, None] * distance).masked_fill(~seen[:, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return kept, weights.masked_fill(read, 0.0).sum(-1), weights


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tolerance", [1e-2, 1e-8])
def test_what_is_left_out_is_less_than_the_tolerance(monkeypatch, seed, tolerance):
    """For uneven data, with groups, padding and packing, a few blocks at a time."""
    monkeypatch.setattr(flex, "_CPU_ENTRIES", 2**20)
    length = 1300
    query, key, _ = qkv(2, 4, 2, length, length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    query *= torch.randn(length, 1, generator=generator).mul(0.3).exp()
    key *= torch.randn(length, 1, generator=generator).mul(0.5).exp()
    if seed % 2:
        # Key blocks that lie apart, so that centroids matter.
        key += 2 * torch.randn(length // 100 + 1, 16, generator=generator).repeat_interleave(100, dim=0)[:length]
    padding, segments = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.long)
    if seed >= 2:
        padding[0, :300] = padding[1, -300:] = False
    if seed >= 4:
        segments[:, 700:] = 1
    seen = reference.visible(padding, segments)
    kept, left_out, _ = kept_and_left_out(query, key, [0.5, 0.11, 0.03, 0.009], tolerance, seen)
    assert left_out.max() <= tolerance
    partial, full = visible_blocks(runs_of(seen[:, None], query, key), length)
    assert 0.1 < kept[(partial | full).expand_as(kept)].double().mean() < 0.95


@pytest.mark.parametrize("slope", [0.5, 0.05, 0.01, 0.003])
def test_the_bound_is_tight_where_it_can_be(slope):
    """With equal queries and equal keys no block is read of which the weights are known to be too small."""
    query = key = torch.full((1, 1, 2000, 16), 0.1)
    for tolerance in torch.logspace(-1, -12, 34).tolist():
        kept, left_out, weights = kept_and_left_out(query, key, [slope], tolerance)
        assert left_out.max() <= tolerance
        block = kept.shape[2] - 2
        row = weights[0, 0, block * BLOCK]
        nearest_left_out = int(kept[0, 0, block, :block].sum()) - 1
        further = row[: (block - nearest_left_out) * BLOCK].sum()
        # The bound knows the weights of the nearest two blocks of keys, not of all.
        assert further > 0.9 * tolerance * row[(block - 1) * BLOCK :].sum() or nearest_left_out == 1


def test_the_last_query_of_a_block_counts_as_the_first_does():
    """Only for the last one does the far block matter, for which its query is long enough."""
    query, key = torch.zeros(1, 1, 5 * BLOCK, 16), torch.zeros(1, 1, 5 * BLOCK, 16)
    key[0, 0, :BLOCK, 0] = 1.0
    query[0, 0, -1, 0] = 4 * 0.1 * 4.5 * BLOCK
    kept, left_out, weights = kept_and_left_out(query, key, [0.1], 1e-8)
    assert weights[0, 0, -1, :BLOCK].sum() > 0.1
    assert weights[0, 0, -BLOCK:-1, :BLOCK].sum() < 1e-8
    assert kept[0, 0, 4, 0]
    assert left_out.max() <= 1e-8


def test_nothing_is_skipped_where_distances_or_slopes_are_not_what_the_bound_knows(unfused, read):
    inputs, seen, _, _ = case("packed")
    run(*inputs, block_mask(seen))
    run(*inputs, block_mask(seen), layer(6, scaling={"type": "dynamic"}, train_length=16))
    run(*inputs, block_mask(case("holes")[1]))
    run(inputs[0][:, :, -300:], *inputs[1:], block_mask(torch.ones(3, 300, LENGTH, dtype=torch.bool).tril(100)))
    assert [blocks.shape[1] for blocks in read] == [6, 1, 1, 1]


def test_what_cannot_be_compared_is_read():
    query, key, _ = qkv(1, 2, 2, 900, 900)
    causal = runs_of(None, query, key)
    usual = flex._kept_blocks(query, key, causal, torch.tensor([0.5, 0.5]), 0.25, 1e-8)
    assert not usual[0, :, 6, :4].any()
    key[0, 0, 10] = torch.nan
    kept = flex._kept_blocks(query, key, causal, torch.tensor([0.5, 0.5]), 0.25, 1e-8)
    assert kept[0, 0, :, 0].all()
    assert torch.equal(kept[0, 1], usual[0, 1])


def tree():
    seen = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    seen[0, 4, 2:4] = False
    return seen


@pytest.mark.parametrize("form", [block_mask, lambda seen: seen[:, None]])
def test_refuses_masks_that_hide_tokens_between_others(form):
    with pytest.raises(ValueError, match=r"each query sees consecutive tokens .*attn_implementation='sdpa'"):
        run(*qkv(1, 2, 2, 6, 6), form(tree()))


def test_such_queries_are_nan_where_nothing_can_be_raised():
    compiled = torch.compile(run, backend="eager")
    query, key, value = qkv(1, 2, 2, 6, 6)
    output = compiled(query, key, value, tree()[:, None], layer(2))
    assert output[:, :, 4].isnan().all()
    others = [0, 1, 2, 3, 5]
    assert largest(output[:, :, others], expected(query, key, value)[:, :, others]) < EXACT


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 3), "4D mask"),
        (torch.ones(1, 1, 3, 4), r"\(3, 4\) queries and keys, but there are \(3, 3\)"),
        (additive(torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()), r"bool mask \(1, 1, 3, 3\), got torch.float32"),
        (torch.ones(1, 4, 3, 3, dtype=torch.bool), r"bool mask \(1, 1, 3, 3\), got torch.bool \(1, 4, 3, 3\)"),
        (block_mask(torch.ones(1, 3, 4, dtype=torch.bool)), r"need a BlockMask \(1, 1, 3, 3\).*got .*\(1, 1, 3, 4\)"),
    ],
)
def test_refuses_other_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        run(*qkv(1, 4, 4, 3, 3), mask)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dropout": 0.1}, "has no dropout, got 0.1; .*'sdpa'"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.ones(1)}, "s_aux"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_refuses_what_it_would_ignore(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(*qkv(1, 4, 4, 3, 3), **kwargs)


def test_refuses_fewer_keys_than_queries_and_other_heads_than_slopes():
    with pytest.raises(ValueError, match="5 queries needs as many keys, got 3"):
        run(*qkv(1, 4, 4, 5, 3))
    with pytest.raises(ValueError, match="2 heads got 4 ALiBi slopes"):
        run(*qkv(1, 2, 2, 3, 3), module=layer(4, slopes=[0.5, 0.25, 0.1, 0.0]))


def test_refuses_gradients_on_the_cpu():
    inputs = qkv(1, 4, 4, 3, 3)
    inputs[1].requires_grad_()
    with torch.enable_grad(), pytest.raises(ValueError, match=r"no backward pass on the CPU; .*'sdpa' to train"):
        run(*inputs)


def flex_model(family, **changes):
    model = hf_alibi.apply_alibi(stock_model(family, **changes))
    model.set_attn_implementation(NAME)
    return model


def padded_batch(holes=False):
    input_ids, mask = tokens(3, 150), torch.ones(3, 150, dtype=torch.long)
    mask[0, :40] = mask[1, -140:] = 0
    if holes:
        mask[2, 60:70] = 0
    return input_ids, mask


def check_logits(family, model, input_ids, mask):
    logits = model(input_ids, attention_mask=mask).logits
    truth = reference.LOGITS[family](model, input_ids, mask)
    real = mask.bool()
    assert largest(logits[real], truth[real]) < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("holes", [False, True])
def test_models_equal_the_reference(unfused, family, holes):
    model = flex_model(family)
    check_logits(family, model, *padded_batch(holes))
    check_logits(family, model, tokens(1, 300), torch.ones(1, 300, dtype=torch.long))


def test_packed_sequences_in_a_model(unfused):
    model, segments = flex_model("llama"), torch.arange(200)[None].ge(80).long()
    input_ids = tokens(1, 200)
    position_ids = torch.cat([torch.arange(80), torch.arange(120)])[None]
    logits = model(input_ids, position_ids=position_ids, use_cache=False).logits
    truth = reference.llama_logits(model, input_ids, torch.ones_like(input_ids), segments)
    assert largest(logits, truth) < 1e-5 * truth.abs().max()


def generated(model):
    input_ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    return model.generate(input_ids, attention_mask=mask, max_new_tokens=20, do_sample=False)


def test_generates_as_sdpa_does(unfused, family):
    model = flex_model(family)
    output = generated(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(output, generated(model))


def test_chunks_in_a_model(unfused, family):
    model, input_ids = flex_model(family), tokens(2, 24)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in input_ids.split([10, 1, 13], dim=1)]
    assert largest(torch.cat(parts, dim=1), model(input_ids).logits) < 1e-4


def test_a_mask_is_looked_into_once_for_all_layers(unfused, monkeypatch, family):
    looks, create_mask = [], runs.create_mask
    monkeypatch.setattr(runs, "create_mask", lambda *args: looks.append(args) or create_mask(*args))
    flex_model(family)(tokens(2, 150))
    assert len(looks) == 1


def test_refuses_static_caches(family):
    """With them the plain LLaMA of transformers 5.23 is wrong, too, from the second call on."""
    model = flex_model(family)
    cache = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(ValueError, match=r"no right mask beside a StaticCache; use a DynamicCache, or .*'sdpa'"):
        model(tokens(1, 5), past_key_values=cache)


def test_is_chosen_at_load_time_and_verified(family, tmp_path):
    hf_alibi.apply_alibi(stock_model(family), slopes=[0.5, 0.3, 0.01, 0.0]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert model.config._attn_implementation == NAME
    reports = hf_alibi.verify_alibi(model)
    assert max(report.error for report in reports) < 1e-5
    assert reports[0].slopes == pytest.approx([0.5, 0.3, 0.01, 0.0], abs=1e-6)


def test_verification_sees_a_kernel_without_the_bias(family, monkeypatch):
    model, attend = flex_model(family), flex._attend
    monkeypatch.setattr(flex, "_compiled", lambda **_: lambda states, slopes, *args: attend(states, 0 * slopes, *args))
    with pytest.raises(hf_alibi.VerificationError, match="does not apply the ALiBi bias"):
        hf_alibi.verify_alibi(model)


def test_a_model_in_training_is_told_what_to_use_instead(unfused):
    model, input_ids = flex_model("gpt2", attn_pdrop=0.1).train(), tokens(1, 5)
    with pytest.raises(ValueError, match="has no dropout"):
        model(input_ids)
    with torch.enable_grad(), pytest.raises(ValueError, match="no backward pass on the CPU"):
        model.eval()(input_ids)


def test_inside_a_compiled_model():
    model = flex_model("llama")
    compiled = copy.copy(model)
    compiled.forward = torch.compile(model.forward, backend="eager")
    check_logits("llama", compiled, *padded_batch(holes=True))


@fused
@pytest.mark.slow
def test_models_when_fused(family):
    model = flex_model(family)
    check_logits(family, model, *padded_batch())
    check_logits(family, model, tokens(1, 700), torch.ones(1, 700, dtype=torch.long))
    before = counters["stats"]["unique_graphs"]
    output = generated(model)
    # Of the prompt and of steps; each kind for the mask of transformers and for the attention.
    assert counters["stats"]["unique_graphs"] - before <= 8
    model.set_attn_implementation("sdpa")
    assert torch.equal(output, generated(model))


@fused
@pytest.mark.slow
def test_inside_a_compiled_model_when_fused(family):
    model = flex_model(family)
    compiled = copy.copy(model)
    compiled.forward = torch.compile(model.forward)
    check_logits(family, compiled, *padded_batch(holes=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", masks())
def test_forward_and_backward_on_a_gpu(dtype, kind):
    (query, key, value), seen, _, real = case(kind)
    inputs = [x.to("cuda", dtype).requires_grad_() for x in (query, key, value)]
    with torch.inference_mode():
        run(*inputs)
    output = run(*inputs, block_mask(seen.cuda()))
    upstream = torch.where(real, 1.0, 0.0) * torch.randn(query.shape, generator=torch.Generator().manual_seed(5))
    output.backward(upstream.to("cuda", dtype))
    truths = [x.detach().cpu().double().requires_grad_() for x in inputs]
    position = reference.token_positions(masks()[kind][0])
    truth = expected(*truths, seen, position)
    truth.backward(upstream.double())
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert largest(output.detach().cpu()[real], truth.detach()[real]) < tolerance
    for ours, exact in zip(inputs, truths, strict=True):
        assert largest(ours.grad.cpu(), exact.grad) < tolerance * max(1.0, exact.grad.abs().max().item())


@pytest.mark.gpu
def test_skipping_on_a_gpu(read):
    inputs = [x.cuda().requires_grad_() for x in qkv(1, 4, 2, 2100, 2100)]
    output = run(*inputs)
    output.sum().backward()
    truths = [x.detach().cpu().double().requires_grad_() for x in inputs]
    truth = expected(*truths)
    truth.sum().backward()
    assert read[0].sum() < 0.8 * 4 * read[0].shape[-1] * (read[0].shape[-1] + 1) / 2
    assert largest(output.detach().cpu(), truth.detach()) < EXACT
    for ours, exact in zip(inputs, truths, strict=True):
        assert largest(ours.grad.cpu(), exact.grad) < EXACT * max(1.0, exact.grad.abs().max().item())
