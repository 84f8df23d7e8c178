"""Attention over the last tokens, against dense float64 attention under a band; what it does not know, it refuses."""

import copy

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from helpers import reference
from helpers.models import stock_model, tokens
from hf_alibi.evaluation import sliding_window
from hf_alibi.evaluation.sliding_window import sliding_window_attention


def banded(query, key, value, *, window, scale):
    """Softmax attention of each query over itself and the `window - 1` keys before it, in float64, dense."""
    batch, heads, length, _ = query.shape
    band = torch.ones(batch, length, length).tril().triu(1 - window) == 1
    position = torch.arange(length).expand(batch, -1)
    return reference.attention(query, key, value, band, position, torch.zeros(heads), scale)


def attention(window):
    return AttentionInterface()[sliding_window_attention(window)]


@pytest.fixture
def layer():
    module = torch.nn.Module()
    module.is_causal = True
    return module


@pytest.mark.parametrize("window", [1, 2, 7, 16, 33, 100])
@pytest.mark.parametrize("rows", [5, 16, 256])
def test_equals_dense_attention_under_a_band(layer, monkeypatch, window, rows):
    monkeypatch.setattr(sliding_window, "_ROWS", rows)
    query, key, value = torch.randn(2, 4, 33, 8), torch.randn(2, 2, 33, 8), torch.randn(2, 2, 33, 8)
    output, weights = attention(window)(layer, query, key, value, None, scaling=0.3)
    expected = banded(query, key, value, window=window, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    assert weights is None


def test_no_square_of_the_length_stands_in_memory(layer, monkeypatch):
    largest = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        largest.append(kwargs["attn_mask"].numel())
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    states = torch.randn(1, 1, 4096, 8)
    attention(300)(layer, states, states, states, None)
    assert max(largest) == 256 * (256 + 300 - 1)


def windowed(model, window):
    changed = copy.deepcopy(model)
    changed.set_attn_implementation(sliding_window_attention(window))
    return changed


def test_a_model_of_one_layer_sees_its_window_only(family):
    layers = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    model, ids = windowed(stock_model(family, **layers), 6), tokens(1, 30)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits[0, -1]
        outside, inside = ids.clone(), ids.clone()
        outside[0, :24], inside[0, 24] = 5, 5
        torch.testing.assert_close(model(outside, use_cache=False).logits[0, -1], before)
        assert (model(inside, use_cache=False).logits[0, -1] - before).abs().max() > 1e-3


def test_a_window_of_the_whole_length_changes_nothing(family):
    model, ids = stock_model(family), tokens(2, 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(windowed(model, 30)(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)
        assert (windowed(model, 8)(ids, use_cache=False).logits - expected).abs().max() > 1e-3


class TestRefusals:
    @pytest.fixture
    def model(self, family):
        return windowed(stock_model(family), 8)

    def test_padding(self, model):
        mask = torch.ones(2, 20, dtype=torch.int64)
        model(tokens(2, 20), attention_mask=mask, use_cache=False)
        mask[0, :3] = 0
        with pytest.raises(ValueError, match="knows no padding"):
            model(tokens(2, 20), attention_mask=mask, use_cache=False)

    def test_a_mask_of_ones_own(self, model):
        mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match="was given a mask"):
            model(tokens(1, 20), attention_mask=mask, use_cache=False)

    def test_packed_sequences(self, model):
        positions = torch.cat([torch.arange(10), torch.arange(10)])[None]
        with pytest.raises(ValueError, match="packed sequences"):
            model(tokens(1, 20), position_ids=positions, use_cache=False)

    def test_a_cache(self, model):
        cache = DynamicCache()
        model(tokens(1, 20), past_key_values=cache)
        with pytest.raises(ValueError, match="a cache"):
            model(tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize("value", [5.0, torch.zeros(4)])
@pytest.mark.parametrize("option", ["softcap", "s_aux", "sliding_window", "position_bias"])
def test_options_that_would_be_ignored_are_refused(layer, option, value):
    states = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"was given {option}"):
        attention(3)(layer, states, states, states, None, **{option: value})
    with pytest.raises(ValueError, match="not causal"):
        attention(3)(layer, states, states, states, None, is_causal=False)
