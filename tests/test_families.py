"""Every supported family as a tiny random model: one conformance suite, what is refused, and that nothing is left over.

Of each family the suite knows nothing but its type. What a family should do with ALiBi is told by its unconverted
model, without positions, and by the slopes of the paper.
"""

import copy
import inspect
import re
from contextlib import contextmanager

import pytest
import torch
from reference import slopes, token_positions
from tiny_models import CAUSAL_TYPES, FIRST_TOKEN, NOT_BUILT, VOCABULARY, stock_tiny
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_alibi
from hf_alibi.anatomy import self_attentions
from hf_alibi.attention import register_backends

SUPPORTED = sorted(hf_alibi.supported_families())
REFUSED = hf_alibi.supported_families().refused

BATCH, LENGTH, PADDING = 2, 24, 7
HEADS = 4
BACKENDS = ("eager", "sdpa")

# Largest difference of logits, as a share of the largest logit, that rounding in float32 explains.
ROUNDING = 1e-4
# The least that the paper's slopes change of logits: a thousand times as much.
NOTICEABLE = 0.01
# Largest difference of log weights, logits: rounding of float32 numbers of up to about 10.
EXACT = 1e-5

# Families whose attention does not go through transformers' interface: in them, every layer has one.
OWN_ATTENTION = {"codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj"}

POSITIONS_COUNT: dict[str, str] = {
    "beam": "scales queries of its layers without rotary positions by a temperature that grows with the position",
}
NO_CHUNKS: dict[str, str] = {}
NO_CACHE: dict[str, str] = {}
NO_LEFT_PADDING: dict[str, str] = {}
WITHOUT_GRADIENT: dict[str, tuple[str, ...]] = {}


def present(model_types):
    """Test parameters; a type that this version of transformers lacks is skipped."""
    absent = pytest.mark.skip(reason="absent from this version of transformers")
    return [pytest.param(name, marks=() if name in CONFIG_MAPPING else absent) for name in model_types]


families = pytest.mark.parametrize("family", present(SUPPORTED))
backends = pytest.mark.parametrize("backend", BACKENDS)


def stock_model(family, backend):
    """An unconverted model; skips an attention implementation that its family does not have."""
    try:
        return stock_tiny(family, attn_implementation=backend)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        pytest.skip(f"{family} has no attention implementation {backend}")


def alibi_model(family, backend, head_slopes=None):
    return hf_alibi.apply_alibi(stock_model(family, backend), slopes=head_slopes)


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_TOKEN, VOCABULARY, (BATCH, LENGTH), generator=generator)


def padded(input_ids):
    """The tokens after padding on the left, and the mask of it."""
    left = torch.zeros(BATCH, PADDING, dtype=torch.long)
    mask = torch.cat([left, torch.ones_like(input_ids)], dim=1)
    return torch.cat([left, input_ids], dim=1), mask


@torch.no_grad()
def logits(model, input_ids, **kwargs):
    return model(input_ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def cached_logits(model, input_ids, sizes):
    """Logits of all tokens, which the model reads in pieces of these sizes and a last one token by token."""
    parts, cache = [], None
    for piece in input_ids.split([*sizes, *[1] * (input_ids.shape[1] - sum(sizes))], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        parts.append(output.logits)
        cache = output.past_key_values
    return torch.cat(parts, dim=1)


def difference(actual, expected):
    """The largest difference, as a share of the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def without_positions(model):
    """Every token at position 0, in an unconverted model, by the names that transformers gives to positions."""

    def zeroed(module, args, kwargs):
        first = [torch.zeros_like(value) if index == 1 else value for index, value in enumerate(args)]
        return tuple(first), {
            name: torch.zeros_like(value) if name == "position_ids" else value for name, value in kwargs.items()
        }

    for name, module in model.named_modules():
        if "Rotary" in type(module).__name__:
            module.register_forward_pre_hook(zeroed, with_kwargs=True)
        elif name.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings"):
            for table in (*module.parameters(), *module.buffers()):
                table.data.zero_()
        elif isinstance(getattr(module, "embed_positions", None), torch.Tensor):
            # Sines and cosines, looked up by position.
            module.embed_positions = module.embed_positions[:1].expand_as(module.embed_positions).clone()
    return model


@contextmanager
def attention_functions(replacement):
    """In place of each ALiBi attention function, `replacement` of it."""
    interface = AttentionInterface()
    try:
        for backend in BACKENDS:
            name = f"alibi_{backend}"
            AttentionInterface.register(name, replacement(interface[name]))
        yield
    finally:
        register_backends()


def no_bias(_attention):
    """Transformers' own attention instead of any other."""

    def attend(_module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return sdpa_attention_forward(nn.Module(), query, key, value, attention_mask, dropout, scaling)

    return attend


def weights(attention, module, query, key, value, attention_mask, **kwargs):
    """The weights (batch, heads, queries, keys) of an attention function where no key is like any query."""
    keys, width = value.shape[2:]
    one_hot = torch.eye(keys)[None, None].expand(*value.shape[:2], -1, -1)
    # Values as wide as the layer's own, so that the function goes the same way.
    blocks = nn.functional.pad(one_hot, (0, -keys % width)).split(width, dim=-1)
    query = torch.zeros_like(query)
    outputs = [attention(module, query, key, block, attention_mask, **kwargs)[0] for block in blocks]
    return torch.cat(outputs, dim=-1)[..., :keys].transpose(1, 2)


def attention_layers(family, model, input_ids):
    """How many layers of an unconverted model attend."""
    if family in OWN_ATTENTION:
        return model.config.num_hidden_layers
    called = set()
    with pytest.MonkeyPatch.context() as patch:
        get_interface = AttentionInterface.get_interface

        def recording(*args):
            attention = get_interface(*args)

            def attend(module, *args, **kwargs):
                called.add(module)
                return attention(module, *args, **kwargs)

            return attend

        patch.setattr(AttentionInterface, "get_interface", recording)
        logits(model, input_ids)
    return len(called)


def check_slopes_change_logits(family, backend):
    zero, input_ids = alibi_model(family, backend, [0.0] * HEADS), tokens()
    assert difference(logits(alibi_model(family, backend), input_ids), logits(zero, input_ids)) > NOTICEABLE


@torch.no_grad()
def check_bias(family, backend):
    """At each layer's attention function: log weights are −slope × distance, in rows of one sum."""
    input_ids, mask = padded(tokens())
    mask[1] = 1
    input_ids[1, :PADDING] = input_ids[0, -PADDING:]
    real = mask.bool()
    model, calls = alibi_model(family, backend), {}

    def recording(attention):
        def attend(module, *args, **kwargs):
            calls[module] = (attention, module, *args), kwargs
            return attention(module, *args, **kwargs)

        return attend

    with attention_functions(recording):
        logits(model, input_ids, attention_mask=mask)
    layers = dict(self_attentions(model))
    assert set(calls) == set(layers.values())
    assert len(layers) == attention_layers(family, stock_model(family, backend), input_ids)

    position = token_positions(mask)
    distance = (position[:, :, None] - position[:, None, :])[:, None]
    causal = torch.ones_like(distance, dtype=torch.bool).tril()
    for name, layer in layers.items():
        (attention, _, query, key, value, given, *rest), kwargs = calls[layer]
        assert not rest, name
        added = torch.zeros(()) if given is None or given.dtype == torch.bool else given
        seen = causal if given is None else given if given.dtype == torch.bool else given > -1e4
        seen = (seen & real[:, None, :, None]).expand(BATCH, query.shape[1], -1, -1)
        assert not (seen & ~(causal & real[:, None, None, :])).any(), f"{name} sees padding or what comes after"
        expected = added - slopes(query.shape[1])[:, None, None] * distance
        expected = expected.expand_as(seen)
        found = weights(attention, layer, query, key, value, given, **kwargs).double()
        assert (found > 0)[seen].all(), f"{name} has no weight where it sees"
        assert (found == 0)[~seen & real[:, None, :, None]].all(), f"{name} has weight where it does not see"
        # A constant for each row is free: sinks take a share of it.
        error = (found.log() - expected).masked_fill(~seen, torch.nan)
        error = error - error.nanmean(dim=-1, keepdim=True)
        assert error[seen].abs().max() < EXACT, name


@families
@backends
def test_position_ids_change_nothing(family, backend):
    if family in POSITIONS_COUNT:
        pytest.skip(POSITIONS_COUNT[family])
    model, input_ids = alibi_model(family, backend), tokens()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        pytest.skip("takes no position_ids")
    # Without a mask, transformers takes positions that do not count up for packed sequences.
    mask = torch.ones_like(input_ids)
    expected = logits(model, input_ids, attention_mask=mask)
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))
    for position_ids in (torch.arange(1000, 1000 + LENGTH), order):
        found = logits(model, input_ids, attention_mask=mask, position_ids=position_ids.expand(BATCH, -1))
        assert difference(found, expected) < ROUNDING


@families
@backends
def test_left_padding_changes_nothing(family, backend):
    if family in NO_LEFT_PADDING:
        pytest.skip(NO_LEFT_PADDING[family])
    model, input_ids = alibi_model(family, backend), tokens()
    with_padding, mask = padded(input_ids)
    found = logits(model, with_padding, attention_mask=mask)[:, PADDING:]
    assert difference(found, logits(model, input_ids)) < ROUNDING


@families
@backends
def test_chunks_over_a_cache(family, backend):
    if family in NO_CACHE:
        pytest.skip(NO_CACHE[family])
    model, input_ids = alibi_model(family, backend), tokens()
    sizes = (13,) if family in NO_CHUNKS else (13, 7)
    assert difference(cached_logits(model, input_ids, sizes), logits(model, input_ids)) < ROUNDING


@families
@backends
def test_slopes_of_zero_are_the_stock_model_without_positions(family, backend):
    model, input_ids = alibi_model(family, backend, [0.0] * HEADS), tokens()
    expected = logits(without_positions(stock_model(family, backend)), input_ids)
    assert difference(logits(model, input_ids), expected) < ROUNDING


@families
@backends
def test_slopes_change_the_logits(family, backend):
    check_slopes_change_logits(family, backend)


@families
@backends
def test_every_layer_has_exactly_the_bias(family, backend):
    check_bias(family, backend)


@families
@backends
def test_a_missing_bias_is_noticed(family, backend):
    with attention_functions(no_bias):
        with pytest.raises(AssertionError):
            check_slopes_change_logits(family, backend)
        with pytest.raises(AssertionError):
            check_bias(family, backend)


@families
def test_implementations_agree(family):
    model, input_ids = alibi_model(family, "eager"), tokens()
    expected = logits(model, input_ids)
    # What transformers' own model takes, the converted one takes at any time.
    stock_model(family, "sdpa")
    model.set_attn_implementation("sdpa")
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert difference(logits(model, input_ids), expected) < ROUNDING


@families
@backends
def test_a_saved_model_comes_back_the_same(family, backend, tmp_path):
    model, input_ids = alibi_model(family, backend), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=backend)
    assert type(loaded) is type(model)
    assert type(loaded).__name__.startswith("Alibi")
    assert loaded.config.model_type.startswith("alibi_")
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))


@families
@backends
def test_a_training_step(family, backend):
    model, input_ids = alibi_model(family, backend).train(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(input_ids, labels=input_ids, use_cache=False).loss
    before.backward()
    for name, layer in self_attentions(model):
        for parameter, value in layer.named_parameters():
            if parameter in WITHOUT_GRADIENT.get(family, ()):
                continue
            assert value.grad is not None, f"{name}.{parameter}"
            assert value.grad.isfinite().all(), f"{name}.{parameter}"
    optimizer.step()
    with torch.no_grad():
        after = model(input_ids, labels=input_ids, use_cache=False).loss
    assert after.isfinite()
    assert after != before


@families
@backends
def test_verify_alibi_accepts_it(family, backend):
    model = alibi_model(family, backend)
    reports = hf_alibi.verify_alibi(model)
    assert [report.layer for report in reports] == [name for name, _ in self_attentions(model)]


def assert_refused(model, reason):
    """`apply_alibi` says why it does not convert a model, and leaves it alone."""
    input_ids, model_class, config = tokens(), type(model), copy.deepcopy(model.config)
    torch.manual_seed(0)
    expected = model(input_ids).logits
    with pytest.raises(ValueError, match=re.escape(reason)):
        hf_alibi.apply_alibi(model)
    assert type(model) is model_class
    assert type(model.config) is type(config)
    assert model.config.to_dict() == config.to_dict()
    torch.manual_seed(0)
    assert torch.equal(model(input_ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("model_type", present([name for name in REFUSED if name not in NOT_BUILT]))
def test_refused_types(model_type):
    assert_refused(stock_tiny(model_type), REFUSED[model_type])


@torch.no_grad()
def test_falcon_with_a_bias_of_its_own_is_refused():
    assert_refused(stock_tiny("falcon", alibi=True), "bias by distance")


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_every_causal_type_is_known(model_type):
    """Supported, refused, or another name of such a type."""
    known = {*SUPPORTED, *REFUSED}
    assert model_type in known or (CONFIG_MAPPING[model_type].model_type in known - {model_type})


def test_at_least_125_families():
    if not set(SUPPORTED) <= set(CAUSAL_TYPES):
        pytest.skip("this version of transformers lacks some")
    assert len(SUPPORTED) >= 125
    assert not set(SUPPORTED) & set(REFUSED)
