"""`AlibiCache`: tokens that no query can reach are dropped, and every query is checked against what was."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

import hf_alibi
from helpers.caches import STEEP, step
from helpers.models import stock_model, tokens
from helpers.tiny_models import FIRST_TOKEN, VOCABULARY, stock_tiny
from hf_alibi import AlibiCache
from hf_alibi.attention import cache as cache_module


def converted(family, slopes=STEEP, **changes):
    return hf_alibi.apply_alibi(stock_model(family, **changes), slopes=slopes)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(cache_module, "_SPARE_TOKENS", 8)


def test_it_is_a_cache_of_transformers():
    assert issubclass(AlibiCache, Cache)


@pytest.mark.parametrize(
    "sizes", [[1] * 600, [100] + [1] * 500, [50] + [1] * 100 + [30] * 15, [300] + [1] * 40 + [260]]
)
def test_logits_equal_those_without_a_cache_while_tokens_are_dropped(family, sizes):
    model, ids, cache = converted(family), tokens(2, 600), AlibiCache()
    with torch.no_grad():
        truth = model(ids).logits
    output = step(model, ids, cache, sizes)
    assert (output - truth).abs().max() < 1e-4
    assert cache.get_seq_length() == 600
    assert max(max(layer) for layer in cache.kept_tokens) < 500


def test_memory_stops_growing(family):
    model, cache = converted(family), AlibiCache()
    step(model, tokens(1, 400), cache, [1] * 400)
    before = cache.kept_tokens
    step(model, tokens(1, 1200, seed=5), cache, [1] * 1200)
    capacity = [store.keys.shape[1] for layer in cache.layers for store in layer.stores]
    kept = [tokens for layer in cache.kept_tokens for tokens in layer]
    assert max(kept) < 1.6 * max(tokens for layer in before for tokens in layer)
    assert all(room < 2 * tokens + 40 for room, tokens in zip(capacity, kept, strict=True))


def test_each_key_head_keeps_its_own_window():
    cache = AlibiCache()
    step(converted("gpt2", [0.8, 0.4, 0.2, 0.1]), tokens(1, 900), cache, [1] * 900)
    for kept in cache.kept_tokens:
        assert kept[0] < kept[1] < kept[2] < kept[3]


def test_a_tolerance_keeps_less_and_stays_within_it(family):
    model, ids = converted(family), tokens(1, 500)
    exact, loose = AlibiCache(), AlibiCache(tolerance=1e-2)
    truth = step(model, ids, exact, [1] * 500)
    output = step(model, ids, loose, [1] * 500)
    assert sum(map(sum, loose.kept_tokens)) < sum(map(sum, exact.kept_tokens))
    assert 0 < (output - truth).abs().max() < 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(family, side):
    model, ids, cache = converted(family), tokens(2, 500), AlibiCache()
    mask = torch.ones(2, 500, dtype=torch.long)
    if side == "left":
        mask[1, :37] = 0
    else:
        mask[1, 20:50] = 0  # a prompt of 20 tokens, padded, and then what is generated
    with torch.no_grad():
        truth = model(ids, attention_mask=mask).logits
    output = step(model, ids, cache, [50] + [1] * 450, attention_mask=mask)
    real = mask.bool()
    assert (output - truth)[real].abs().max() < 1e-4
    assert max(max(layer) for layer in cache.kept_tokens) < 450


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_generate_gives_the_same_tokens(family, options):
    model, prompt = converted(family), tokens(1, 40)
    common = {"max_new_tokens": 150, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    cache = AlibiCache()
    ours = model.generate(prompt, past_key_values=cache, **common)
    assert torch.equal(ours, model.generate(prompt, past_key_values=DynamicCache(), **common))
    assert max(max(layer) for layer in cache.kept_tokens) < cache.get_seq_length()


def test_a_query_that_could_reach_dropped_tokens_raises(monkeypatch):
    """Norms grow a hundredfold after everything was settled: the margin cannot cover that, so nothing is returned."""
    model, cache = converted("gpt2"), AlibiCache()
    step(model, tokens(1, 300), cache, [1] * 300)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :32] *= 100
    with pytest.raises(RuntimeError, match=r"may reach tokens that AlibiCache has dropped.*larger margin than 1\.25"):
        step(model, tokens(1, 1), cache, [1])


def test_nothing_is_dropped_without_bias(family):
    cache = AlibiCache()
    step(converted(family, [0.0] * 4), tokens(1, 200), cache, [1] * 200)
    assert {kept for layer in cache.kept_tokens for kept in layer} == {200}


def test_dynamic_slopes_drop_nothing(family):
    model, cache = converted(family), AlibiCache()
    model.config.alibi_train_length, model.config.alibi_scaling = 32, {"type": "dynamic"}
    ids = tokens(1, 200)
    with torch.no_grad():
        truth = model(ids).logits
    assert (step(model, ids, cache, [1] * 200) - truth).abs().max() < 1e-4
    assert {kept for layer in cache.kept_tokens for kept in layer} == {200}


def test_under_autocast(family):
    """Rotary layers hand over float32 queries and keys beside bfloat16 values."""
    model, ids = converted(family), tokens(1, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, truth = (step(model, ids, cache, [50] + [1] * 10) for cache in (AlibiCache(), DynamicCache()))
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - truth.float()).abs().max() < 0.05


def test_reset_and_reuse(family):
    model, ids, cache = converted(family), tokens(1, 200), AlibiCache()
    first = step(model, ids, cache, [1] * 200)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(step(model, ids, cache, [1] * 200), first)


def test_batch_operations(family):
    model, ids, cache = converted(family), tokens(2, 201), AlibiCache()
    step(model, ids[:, :200], cache, [1] * 200)
    other = copy.deepcopy(cache)
    truth = step(model, ids[:, 200:], copy.deepcopy(cache), [1])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert (step(model, ids[:, 200:].flip(0), cache, [1]).flip(0) - truth).abs().max() < 1e-5
    other.batch_repeat_interleave(2)
    other.batch_select_indices(torch.tensor([0, 3]))
    assert (step(model, ids[:, 200:], other, [1]) - truth).abs().max() < 1e-5


def test_taking_back_tokens(family):
    model, ids, cache = converted(family), tokens(1, 300), AlibiCache()
    truth = step(model, ids, copy.deepcopy(cache), [1] * 300)
    step(model, torch.cat([ids[:, :200], tokens(1, 5, seed=9)], dim=1), cache, [1] * 205)
    cache.crop(-5)
    assert cache.get_seq_length() == 200
    assert (step(model, ids[:, 200:], cache, [1] * 100) - truth[:, 200:]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="cannot take back 250 tokens"):
        cache.crop(-250)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_backends_refuse_it(family, implementation):
    model = converted(family)
    model.set_attn_implementation(implementation)
    with pytest.raises(TypeError, match="converted by hf_alibi, attn_implementation='sdpa'"):
        step(model, tokens(1, 4), AlibiCache(), [4])


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "gemma3_text", "gpt_neox", "opt"])
def test_other_families(model_type):
    """Sliding windows among them."""
    model = hf_alibi.apply_alibi(stock_tiny(model_type))
    input_ids = torch.randint(FIRST_TOKEN, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = AlibiCache()
    with torch.no_grad():
        expected = model(input_ids, use_cache=False).logits
        pieces = [model(piece, past_key_values=cache).logits for piece in input_ids.split([20, 1, 1, 10, 8], dim=1)]
    assert (torch.cat(pieces, dim=1) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_recurrent_layers_are_refused():
    model = hf_alibi.apply_alibi(stock_tiny("bamba"))
    with pytest.raises(ValueError, match=r"AlibiBambaForCausalLM has layers with a state of their own \(linear_att"):
        model(tokens(1, 4), past_key_values=AlibiCache())


def test_an_unconverted_model_is_refused(family):
    with pytest.raises(TypeError, match="AlibiCache"):
        step(stock_model(family), tokens(1, 4), AlibiCache(), [4])


def test_gradients_are_refused(family):
    with pytest.raises(RuntimeError, match="for inference"):
        converted(family)(tokens(1, 4), past_key_values=AlibiCache())


@pytest.mark.parametrize(
    ("arguments", "message"), [({"tolerance": 0.0}, "between 0 and 1"), ({"margin": 0.9}, "at least 1")]
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlibiCache(**arguments)
