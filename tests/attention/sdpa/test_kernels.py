"""Kernels for GPUs against the float64 reference: what queries see, types, widths, gradients, and what is not read."""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from helpers import reference
from helpers.attention import largest, layer, qkv, run
from helpers.masks import packed, padded, triangle, without
from helpers.tiny_models import stock_tiny
from helpers.triton_kernels import DEVICE, kernels_run, needs_triton
from hf_alibi import apply_alibi
from hf_alibi.attention.call import AttentionCall
from hf_alibi.attention.layer_slopes import HeadSlopes
from hf_alibi.attention.sdpa.reads import record_reads

pytestmark = needs_triton

EXACT = 5e-6
# Tiles of 16 tokens: a sequence of 50 has several, of each kind.
TILE = 16


def tiles(**changes):
    from hf_alibi.attention.sdpa.gpu.launches import Sizes

    names = ("block", "chunk", "rows", "keys", "key_tile", "query_tile")
    return Sizes(**{**dict.fromkeys(names, TILE), **changes})


def attend(query, key, value, mask=None, *, slopes=(0.5, 0.1), sinks=None, softcap=None, sizes=None, **changes):
    """Output and windows of the kernels, on the device that has them."""
    from hf_alibi.attention.sdpa.gpu import path

    per_head = torch.as_tensor(slopes, dtype=torch.float32, device=DEVICE)
    options = {"sink_tokens": changes.pop("sink_tokens", 0)}
    call = AttentionCall(
        query.to(DEVICE),
        key.to(DEVICE),
        value.to(DEVICE),
        None if mask is None else mask.to(DEVICE),
        HeadSlopes(per_head, **options),
        scaling=query.shape[-1] ** -0.5,
        softcap=softcap,
        learned_sinks=None if sinks is None else sinks.to(DEVICE),
        **{"tolerance": torch.finfo(query.dtype).eps / 8, **changes},
    )
    assert path.refuses(call) is None
    with kernels_run():
        return path.attend(call, sizes or tiles()).cpu()


def truth(query, key, value, seen, slopes=(0.5, 0.1), **options):
    batch, keys = len(query), key.shape[2]
    position = torch.arange(keys).expand(batch, -1)
    slopes = torch.as_tensor(slopes, dtype=torch.float64)
    return reference.attention(query, key, value, seen, position, slopes, query.shape[-1] ** -0.5, **options)


def check(inputs, seen=None, *, error=EXACT, mask=None, sinks=None, **options):
    """Output and gradients are those of the reference; `seen` bool (queries, keys), or of each sequence."""
    queries, keys = inputs[0].shape[2], inputs[1].shape[2]
    if seen is None:
        seen = triangle(queries, keys)
    else:
        mask = (seen if seen.ndim == 3 else seen[None])[:, None]
    seen = seen.expand(len(inputs[0]), -1, -1)
    known = {name: options[name] for name in ("slopes", "softcap", "sink_tokens") if name in options}
    leaves = [x.detach().requires_grad_() for x in inputs] + ([] if sinks is None else [sinks.requires_grad_()])
    wide = [x.detach().double().requires_grad_() for x in leaves]
    output = attend(*leaves[:3], mask, sinks=leaves[3] if len(leaves) > 3 else None, **options)
    exact = truth(*wide[:3], seen, sinks=wide[3] if len(wide) > 3 else None, **known)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    assert output.dtype == inputs[0].dtype
    assert largest(output, exact) < error
    found = torch.autograd.grad(output, leaves, upstream)
    true = torch.autograd.grad(exact, wide, upstream.double())
    for gradient, exact_gradient in zip(found, true, strict=True):
        assert largest(gradient, exact_gradient) < 2 * error * max(1.0, exact_gradient.abs().max().item())


@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (16, 16), (50, 50), (20, 55)])
def test_causal(queries, keys):
    check(qkv(2, 2, 1, queries, keys))


SEEN = {
    "left padding": padded(50, left=19),
    "right padding": padded(50, right=19),
    "both": padded(50, left=3, right=20),
    "packed": packed(7, 30, 13),
    "sliding window": triangle(50) & ~triangle(50).tril(-9),
    "another for each sequence": torch.stack([padded(50, left=33), packed(25, 25)]),
    "an empty end, as in a static cache": torch.cat([triangle(30, 40), torch.zeros(30, 12, dtype=torch.bool)], dim=1),
}


@pytest.mark.parametrize("name", SEEN)
def test_runs_of_keys(name):
    seen = SEEN[name]
    check(qkv(2, 2, 2, *seen.shape[-2:]), seen)


@pytest.mark.parametrize("seen", [None, padded(40, left=17), packed(25, 15)], ids=["causal", "padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [{"sink_tokens": 2}, {"softcap": 1.5}, {"sinks": torch.tensor([0.3, -1.0])}, {"slopes": (0.0, 2.0)}],
    ids=lambda options: next(iter(options)),
)
def test_what_models_add(seen, options):
    check(qkv(1, 2, 1, 40, 40), seen, **options)


@pytest.mark.parametrize(("width", "value_width"), [(16, 16), (24, 40), (80, 16)])
def test_widths(width, value_width):
    query, key, _ = qkv(1, 4, 2, 33, 33, width)
    check((query, key, qkv(1, 4, 2, 33, 33, value_width, seed=4)[2]), slopes=reference.slopes(4))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("seen", [None, padded(50, left=20)], ids=["causal", "padded"])
def test_half_types(dtype, error, seen):
    check(qkv(1, 2, 1, 50, 50, dtype=dtype), seen, error=error)


@pytest.mark.parametrize("changes", [{"rows": 32}, {"key_tile": 16, "block": 32}, {"rows": 32, "query_tile": 32}])
def test_tiles_of_other_sizes(changes):
    check(qkv(1, 2, 1, 70, 70), packed(10, 60), sizes=tiles(**changes))


ONE = {
    "no mask": None,
    "left padding": torch.arange(600) >= 250,
    "the end of a static cache": torch.arange(600) < 350,
    "holes": torch.arange(600) % 7 > 1,
    "another for each sequence": torch.stack([torch.arange(600) >= 10, torch.arange(600) < 20]),
}


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize(
    "options",
    [{}, {"sink_tokens": 3}, {"softcap": 1.5}, {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_one_new_token(name, options):
    query, key, value = qkv(2, 4, 2, 1, 600, 24)
    value, slopes, mask = value[..., :17], (1.0, 0.1, 0.01, 0.0), ONE[name]
    seen = torch.ones(2, 600, dtype=torch.bool) if mask is None else mask.expand(2, -1)
    # The bias counts the tokens that are seen.
    position = seen.cumsum(-1)
    position = torch.cat([position, position[:, -1:]], dim=1)
    added = torch.zeros(2, 2, 1, 24)
    exact = reference.attention(
        query,
        torch.cat([key, added], dim=2),
        torch.cat([value, added[..., :17]], dim=2),
        torch.cat([seen, torch.zeros(2, 1, dtype=torch.bool)], dim=1)[:, None],
        position,
        torch.tensor(slopes),
        24**-0.5,
        **options,
    )
    output = attend(query, key, value, None if mask is None else seen[:, None, None], slopes=slopes, **options)
    assert largest(output, exact) < EXACT


def test_one_new_token_reads_no_values_of_no_weight():
    query, key, value = qkv(1, 1, 1, 1, 600)
    key[:, :, 5] = query[:, :, 0] * 400
    value[:, :, 100:300] = math.nan
    output = attend(query, key, value, slopes=(0.4,))
    assert output.isfinite().all()
    clean = value.nan_to_num(0.0)
    assert largest(output, truth(query, key, clean, torch.ones(1, 1, 600, dtype=torch.bool), (0.4,))) < EXACT


def test_any_strides():
    states = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(1, 2, 2, 20, 20)]
    check(states)
    check([x.mT.contiguous().mT for x in states])


def test_what_kernels_do_not_take_is_left_to_others():
    query, key, value = qkv(1, 2, 2, 40, 40)
    holes = without(triangle(40), 5)[None, None]
    assert attend_or_none(query, key, value, holes) is None
    ahead = triangle(40)
    ahead[3, 9] = True
    ahead[3, :9] = True
    assert attend_or_none(query, key, value, ahead[None, None]) is None
    with kernels_run(tiles()):
        for seen in (holes, ahead[None, None]):
            output = run("sdpa", query.to(DEVICE), key.to(DEVICE), value.to(DEVICE), seen.to(DEVICE)).cpu()
            assert largest(output, run("eager", query, key, value, seen)) < EXACT


@pytest.mark.parametrize(("capability", "taken"), [(7, False), (8, True), (None, True)])
def test_a_gpu_that_triton_does_not_know_takes_another_path(capability, taken, monkeypatch):
    from hf_alibi.attention.sdpa.gpu import path

    query, key, value = (x.to(DEVICE) for x in qkv(1, 2, 2, 40, 40))
    monkeypatch.setattr(path, "_capability", lambda device: capability)
    launched = []
    attend = path.attend
    monkeypatch.setattr(path, "attend", lambda call: launched.append(call) or attend(call, tiles()))
    with kernels_run():
        output = run("sdpa", query, key, value, None)
    assert bool(launched) is taken
    assert largest(output.cpu(), run("eager", *(x.cpu() for x in (query, key, value)), None)) < EXACT


def attend_or_none(query, key, value, mask):
    from hf_alibi.attention.sdpa.gpu import path

    slopes = HeadSlopes(torch.tensor([0.5, 0.1], device=DEVICE))
    call = AttentionCall(*(x.to(DEVICE) for x in (query, key, value, mask)), slopes, scaling=0.25, tolerance=1e-8)
    with kernels_run():
        return path.attend(call, tiles())


def window_of(query, key, value, **options):
    """What the kernels read, in keys of each query (heads, queries, keys)."""
    from hf_alibi.attention.sdpa.gpu import operator

    found = []
    original = operator.launch_forward

    def spy(*args):
        found.append(original(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "launch_forward", spy)
        output = attend(query, key, value, **options)
    window = found[0][2][0].cpu() * TILE
    column = torch.arange(key.shape[2])
    begin, end, low, high = window.repeat_interleave(TILE, dim=1)[:, : query.shape[2], :, None].unbind(2)
    return output, ((begin <= column) & (column < end)) | ((low <= column) & (column < high))


def test_far_keys_are_not_read():
    inputs = qkv(1, 2, 2, 300, 300)
    output, read = window_of(*inputs, slopes=(2.0, 0.0))
    steep, flat = read.float().sum(-1).mean(-1)
    assert steep < 60
    assert flat > 150
    assert largest(output, truth(*inputs, triangle(300)[None], (2.0, 0.0))) < EXACT


def test_a_first_token_that_all_look_at_does_not_open_the_window():
    query, key, value = qkv(1, 1, 1, 300, 300)
    query[..., 0], key[..., 0] = 20.0, 0.0
    # Worth as much as 300 tokens of distance cost.
    key[:, :, 0, 0] = 300 * 0.5 * 4 / 20
    inputs = query, key, value
    output, read = window_of(*inputs, slopes=(0.5,))
    assert read[0, -1, 0]
    assert not read[0, -1, TILE : 10 * TILE].any()
    assert largest(output, truth(*inputs, triangle(300)[None], (0.5,))) < 2e-5


@given(
    seed=st.integers(0, 1000),
    slope=st.sampled_from([0.0, 0.01, 0.1, 0.5, 3.0]),
    size=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    tolerance=st.sampled_from([2.0**-26, 2.0**-10, 0.1]),
    needle=st.integers(0, 139),
    alike=st.booleans(),
)
# A bound that is tight: if as much as the tolerance were left out for each key, it would be 140 times too much.
@example(seed=0, slope=0.05, size=1.0, tolerance=0.1, needle=139, alike=True)
@settings(max_examples=8, deadline=None)
def test_what_is_not_read_weighs_less_than_the_tolerance(seed, slope, size, tolerance, needle, alike):
    query, key, value = qkv(1, 1, 1, 140, 140, seed=seed)
    if alike:
        key = key[:, :, ::TILE].repeat_interleave(TILE, dim=2)[:, :, :140]
    key = key * size
    key[:, :, needle] *= 4
    _, read = window_of(query, key, value, slopes=(slope,), tolerance=tolerance)
    distance = torch.arange(140.0)[:, None] - torch.arange(140.0)
    logits = (query.double() @ key.double().mT)[0] / 4 - slope * distance
    weights = logits.masked_fill(~triangle(140), -math.inf).softmax(-1)
    assert (weights * ~read).sum(-1).max() <= tolerance


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_cannot_be_compared_is_read(bad):
    inputs = qkv(1, 1, 1, 200, 200)
    inputs[1][:, :, 40] = bad
    output = attend(*inputs, slopes=(1.0,))
    assert output[:, :, :40].isfinite().all()
    assert output[:, :, 40:].isnan().all()


def test_the_future_changes_nothing():
    inputs = qkv(1, 2, 1, 60, 60)
    before = attend(*inputs)
    for x in inputs:
        x[:, :, 45:] = 100.0
    assert torch.equal(attend(*inputs)[:, :, :45], before[:, :, :45])


def test_reads_are_recorded():
    inputs = qkv(2, 2, 2, 140, 140)
    slopes = (2.0, 0.01)
    with record_reads() as reads:
        _, read = window_of(*(x[:1] for x in inputs), slopes=slopes)
    assert [(r.queries, r.keys) for r in reads] == [(140, 140)]
    assert reads[0].pairs == tuple((read & triangle(140)).sum(dim=(1, 2)).tolist())
    with record_reads() as reads:
        attend(*inputs, torch.stack([padded(140, left=20), packed(110, 30)])[:, None], slopes=slopes)
    assert [(r.queries, r.keys, r.kept[1]) for r in reads] == [(120, 120, 1.0), (110, 110, 1.0), (30, 30, 1.0)]
    assert all(r.kept[0] < 0.7 for r in reads[:2])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_models(family):
    """Gemma 2 caps logits and has windows, gpt-oss has learned sinks: kernels do it all, and give `eager`'s logits."""
    model = apply_alibi(stock_tiny(family).eval()).to(DEVICE)
    ids = torch.randint(40, 90, (2, 30), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    called = []
    with kernels_run():
        from hf_alibi.attention.sdpa.gpu import path

        attend_ = path.attend
        for attention_mask in (None, mask):
            model.set_attn_implementation("eager")
            eager = gradients_of(model, ids, attention_mask)
            model.set_attn_implementation("sdpa")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(path, "attend", lambda *args: called.append(attend_(*args)) or called[-1])
                kernels = gradients_of(model, ids, attention_mask)
            assert len(called) == model.config.num_hidden_layers
            assert all(output is not None for output in called)
            called.clear()
            for one, other in zip(eager, kernels, strict=True):
                assert largest(one, other) < 2e-5 * max(1.0, one.abs().max().item())


def gradients_of(model, ids, mask):
    real = slice(None) if mask is None else mask.bool()
    logits = model(ids, attention_mask=mask, use_cache=False).logits[real]
    weights = [p for p in model.parameters() if p.requires_grad]
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), weights, allow_unused=False)]


def test_an_alibi_cache_holds_no_capped_logits():
    from hf_alibi import AlibiCache

    model = apply_alibi(stock_tiny("gemma2").eval())
    with pytest.raises((ValueError, TypeError), match="AlibiCache"):
        model(torch.arange(40, 50)[None], past_key_values=AlibiCache(config=model.config))


def test_dropout_takes_another_path():
    query, key, value = (x.to(DEVICE) for x in qkv(1, 2, 2, 40, 40))
    with kernels_run():
        torch.manual_seed(0)
        with_dropout = run("sdpa", query, key, value, module=layer(2).train(), dropout=0.5)
        assert not torch.equal(with_dropout, run("sdpa", query, key, value, module=layer(2)))


@pytest.fixture
def masks_by_rows(monkeypatch):
    """As those of long batches on a GPU are; lists the parts that were built, (rows, keys)."""
    from hf_alibi.attention import mask_by_rows

    monkeypatch.setattr(mask_by_rows, "_ENTRIES", 0)
    monkeypatch.setattr(mask_by_rows, "_PART", 2 * 40 * 7)
    monkeypatch.setattr(mask_by_rows, "_DEVICES", {"cpu", "cuda"})
    built = []
    original = mask_by_rows.sdpa_mask

    def spy(*args, **kwargs):
        mask = original(*args, **kwargs)
        if mask is not None:
            built.append(tuple(mask.shape[2:]))
        return mask

    monkeypatch.setattr(mask_by_rows, "sdpa_mask", spy)
    return built


PADDED = torch.ones(2, 40, dtype=torch.long)
PADDED[0, :13] = 0
PACKED = {"position_ids": torch.cat([torch.arange(25), torch.arange(15)]).expand(2, -1)}


@pytest.mark.parametrize("inputs", [{"attention_mask": PADDED}, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_no_mask_of_length_squared(family, inputs, masks_by_rows):
    """A model's logits are the same, and of the mask there are never more than a few rows."""
    from helpers.models import FAMILIES, stock_model

    stock = stock_model(family) if family in FAMILIES else stock_tiny(family)
    model = apply_alibi(stock.eval()).to(DEVICE)
    ids = torch.randint(40, 60, (2, 40), device=DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    model.set_attn_implementation("eager")
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    eager = model(ids, use_cache=False, **inputs).logits[real]
    model.set_attn_implementation("sdpa")
    masks_by_rows.clear()
    with kernels_run():
        assert largest(eager, model(ids, use_cache=False, **inputs).logits[real]) < 1e-4
    assert masks_by_rows
    assert all(rows <= 7 for rows, _ in masks_by_rows)


def test_a_mask_by_rows_is_the_mask_to_whatever_needs_it(masks_by_rows):
    model = apply_alibi(stock_tiny("llama").eval())
    ids = torch.randint(40, 90, (2, 40))
    holes = PADDED.clone()
    holes[1, 20:25] = 0
    expected_ = model.set_attn_implementation("eager") or model(ids, attention_mask=holes).logits
    model.set_attn_implementation("sdpa")
    # Without the kernels, and with them but for a mask with holes.
    assert largest(expected_, model(ids, attention_mask=holes).logits) < 1e-4
    with kernels_run():
        assert largest(expected_, model(ids, attention_mask=holes).logits) < 1e-4
    cache = model(ids[:, :30], attention_mask=PADDED[:, :30]).past_key_values
    chunk = model(ids[:, 30:], attention_mask=PADDED, past_key_values=cache).logits
    whole = model(ids, attention_mask=PADDED).logits[:, 30:]
    assert largest(chunk, whole) < 1e-4


def test_a_mask_by_rows_as_a_tensor(masks_by_rows):
    from transformers.masking_utils import create_causal_mask

    model = apply_alibi(stock_tiny("llama"))
    embeds = torch.zeros(2, 40, 8)
    options = {"inputs_embeds": embeds, "past_key_values": None, "attention_mask": PADDED}
    mask = create_causal_mask(config=model.config, **options)
    assert type(mask).__name__ == "MaskByRows"
    seen = triangle(40) & PADDED[:, None, None, :].bool()
    assert torch.equal(mask.whole(), seen)
    assert torch.equal(torch.cat(list(mask.parts()), dim=2), seen)
    assert torch.equal(mask[:, :, 3:], seen[:, :, 3:])
    assert torch.equal(~mask, ~seen)
    assert torch.equal(mask & PADDED[:, None, None].bool(), seen)
    assert torch.equal(seen | mask, seen)
    assert torch.equal(torch.logical_not(mask), ~seen)
    assert torch.equal(mask.to("cpu").whole(), seen)
    assert mask.size(-1) == 40
    assert torch.equal(mask.to(torch.float32), seen.float())
    assert torch.equal(copy.deepcopy(mask).whole(), seen)
    stock = stock_tiny("llama")
    assert torch.equal(create_causal_mask(config=stock.config, **options), seen)


@pytest.mark.parametrize(
    "family", ["flint", "gemma2", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "vaultgemma"]
)
def test_capped_logits_and_learned_sinks_load_under_sdpa(family, tmp_path):
    """transformers has them under `eager` alone, and builds no part of such a model under `sdpa`."""
    apply_alibi(stock_tiny(family)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert (loaded.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    ids, mask = torch.randint(40, 90, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    logits, exact = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (loaded, eager))
    assert largest(logits, exact) < 1e-5 * max(1.0, exact.abs().max().item())
