"""Every supported family as a tiny random model: one conformance suite, what is refused, and that nothing is left over.

Of each family the suite knows nothing but its type. What a family should do with ALiBi is told by its unconverted
model, without positions, and by the slopes of the paper.
"""

import copy
import inspect
import pickle
import re
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_alibi
from helpers.reference import slopes, token_positions
from helpers.tiny_models import CAUSAL_TYPES, FIRST_TOKEN, NOT_BUILT, VOCABULARY, stock_tiny
from hf_alibi.model.anatomy import text_decoder

SUPPORTED = sorted(hf_alibi.supported_families())
REFUSED = hf_alibi.supported_families().refused
# Other names of families: types that have the model class of a supported one.
_CLASSES = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name) for name in SUPPORTED} - {None}
ALIASES = [
    name
    for name in CAUSAL_TYPES
    if name not in {*SUPPORTED, *REFUSED} and MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] in _CLASSES
]

BATCH, LENGTH, PADDING = 2, 24, 7
NO_SLOPES = [0.0] * 4
BACKENDS = ("eager", "sdpa")

# Additive masks hide with less than this.
MASKED = -1e4

# Largest difference of logits, as a share of the largest logit, that rounding in float32 explains.
ROUNDING = 1e-4
# The least that the paper's slopes change of logits: a thousand times as much.
NOTICEABLE = 0.01
# Largest difference of log weights, logits: rounding of float32 numbers of up to about 10.
EXACT = 1e-5

# Families whose attention does not go through transformers' interface: in them, every layer has one.
OWN_ATTENTION = {"codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj"}

# What a family does itself, converted or not, so that a check cannot hold for it; with the reason.
POSITIONS_COUNT = {
    "beam": "scales queries of its layers without rotary positions by a temperature that grows with the position",
}
_CAPS = "caps its logits, which sdpa leaves out: versions of transformers that take it for this family compute another"
NO_SDPA = dict.fromkeys(("gemma2", "vaultgemma"), _CAPS)
NO_CHUNKS = {
    "jamba": "its recurrent layers begin anew with each piece of more than one token",
}


def present(model_types):
    """Test parameters; a type that this version of transformers lacks, or has otherwise, is skipped."""
    reasons = {name: "absent from this version of transformers" for name in model_types if name not in CONFIG_MAPPING}
    reasons = {**NOT_BUILT, **reasons}
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=reasons[name]) if name in reasons else ())
        for name in model_types
    ]


families = pytest.mark.parametrize("family", present([*SUPPORTED, *ALIASES]))
backends = pytest.mark.parametrize("backend", BACKENDS)


def stock_model(family, backend):
    """An unconverted model; skips an attention implementation that its family does not have."""
    if backend == "sdpa" and family in NO_SDPA:
        pytest.skip(NO_SDPA[family])
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
    names = [f"alibi_{backend}" for backend in BACKENDS]
    before = {name: AttentionInterface()[name] for name in names}
    try:
        for name, attention in before.items():
            AttentionInterface.register(name, replacement(attention))
        yield
    finally:
        for name, attention in before.items():
            AttentionInterface.register(name, attention)


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


def attention_layers(family, backend):
    """How many layers of the unconverted model attend."""
    model = stock_model(family, backend)
    if family in OWN_ATTENTION:
        return model.config.num_hidden_layers
    called = set()
    get_interface = AttentionInterface.get_interface

    def recording(*args):
        attention = get_interface(*args)

        def attend(module, *args, **kwargs):
            called.add(module)
            return attention(module, *args, **kwargs)

        return attend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionInterface, "get_interface", recording)
        logits(model, tokens())
    return len(called)


def check_slopes_change_logits(model, without_slopes):
    assert difference(logits(model, tokens()), logits(without_slopes, tokens())) > NOTICEABLE


@torch.no_grad()
def check_bias(model, count):
    """Each of `count` layers attends with exactly the bias, also under left padding."""
    input_ids, mask = padded(tokens())
    mask[1] = 1
    input_ids[1, :PADDING] = input_ids[0, -PADDING:]
    calls = {}

    def recording(attention):
        def attend(module, query, key, value, attention_mask, **kwargs):
            calls[module] = attention, (query, key, value, attention_mask), kwargs
            return attention(module, query, key, value, attention_mask, **kwargs)

        return attend

    with attention_functions(recording):
        logits(model, input_ids, attention_mask=mask)
    layers = dict(text_decoder(model).self_attentions)
    assert set(calls) == set(layers.values())
    assert len(layers) == count
    for name, layer in layers.items():
        check_layer(name, layer, mask, *calls[layer])


def check_layer(name, layer, mask, attention, inputs, kwargs):
    """What a layer's attention function makes of its inputs: log weights of −slope × distance and a constant a row."""
    query, _, _, given = inputs
    real = mask.bool()
    position = token_positions(mask)
    distance = (position[:, :, None] - position[:, None, :])[:, None]
    allowed = torch.ones_like(distance, dtype=torch.bool).tril() & real[:, None, None, :]
    seen, added = allowed, torch.zeros(())
    if given is not None:
        # Either kind of mask may hide more, such as what is outside of a window.
        seen, added = (given, added) if given.dtype == torch.bool else (given > MASKED, given)
    asking = real[:, None, :, None]
    assert not (seen & asking & ~allowed).any(), f"{name} sees padding or what comes after"
    found = weights(attention, layer, *inputs, **kwargs).double()
    seen, asking = seen.expand_as(found), asking.expand_as(found)
    assert (found[asking & ~seen] == 0).all(), f"{name} has weight where it does not see"
    assert (found[asking & seen] > 0).all(), f"{name} has no weight where it sees"
    expected = added - slopes(query.shape[1])[:, None, None] * distance
    # What is the same in a whole row means nothing; sinks take a share of it.
    error = (found.log() - expected).masked_fill(~(seen & asking), torch.nan)
    error = (error - error.nanmean(dim=-1, keepdim=True)).nan_to_num(0.0)
    assert error.abs().max() < EXACT, f"{name} has another bias"


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
def test_longer_texts_than_before(family, backend):
    """The first tokens' logits do not change with what follows, past the end of what was a table of positions."""
    model, input_ids = alibi_model(family, backend), tokens()
    longer = torch.cat([input_ids] * 4, dim=1)
    assert difference(logits(model, longer)[:, :LENGTH], logits(model, input_ids)) < ROUNDING


@families
@backends
def test_left_padding_changes_nothing(family, backend):
    model, input_ids = alibi_model(family, backend), tokens()
    with_padding, mask = padded(input_ids)
    # As `generate` numbers tokens.
    given = {"position_ids": token_positions(mask).clamp(min=0)} if family in POSITIONS_COUNT else {}
    found = logits(model, with_padding, attention_mask=mask, **given)[:, PADDING:]
    assert difference(found, logits(model, input_ids)) < ROUNDING


@families
@backends
def test_chunks_over_a_cache(family, backend):
    model, input_ids = alibi_model(family, backend), tokens()
    sizes = (13,) if family in NO_CHUNKS else (13, 7)
    assert difference(cached_logits(model, input_ids, sizes), logits(model, input_ids)) < ROUNDING


@families
@backends
def test_slopes_of_zero_are_the_stock_model_without_positions(family, backend):
    model, input_ids = alibi_model(family, backend, NO_SLOPES), tokens()
    expected = logits(without_positions(stock_model(family, backend)), input_ids)
    assert difference(logits(model, input_ids), expected) < ROUNDING


@families
@backends
def test_slopes_change_the_logits(family, backend):
    check_slopes_change_logits(alibi_model(family, backend), alibi_model(family, backend, NO_SLOPES))


@families
@backends
def test_every_layer_has_exactly_the_bias(family, backend):
    check_bias(alibi_model(family, backend), attention_layers(family, backend))


@families
@backends
def test_a_missing_bias_is_noticed(family, backend):
    model, without_slopes = alibi_model(family, backend), alibi_model(family, backend, NO_SLOPES)
    count = attention_layers(family, backend)
    with attention_functions(no_bias):
        with pytest.raises(AssertionError):
            check_slopes_change_logits(model, without_slopes)
        with pytest.raises(AssertionError, match="another bias"):
            check_bias(model, count)


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
    # The decoder alone of some composite models has no Auto class.
    auto = model.config.model_type.removeprefix("alibi_") in CAUSAL_TYPES
    loading = AutoModelForCausalLM if auto else type(model)
    loaded = loading.from_pretrained(tmp_path, attn_implementation=backend)
    assert type(loaded) is type(model)
    assert type(loaded).__name__.startswith("Alibi")
    assert loaded.config.model_type.startswith("alibi_")
    for parameter in loaded.parameters():
        # Where numbers lie in memory, of a file here, decides in which order some kernels add them.
        parameter.data = parameter.data.clone()
    found, expected = logits(loaded, input_ids), logits(model, input_ids)
    assert torch.equal(found, expected)


@families
@backends
def test_a_training_step(family, backend):
    model, input_ids = alibi_model(family, backend).train(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Some have labels for each of several codebooks.
    labels = input_ids[..., None] if family.startswith("musicgen") else input_ids
    before = model(input_ids, labels=labels, use_cache=False).loss
    before.backward()
    for name, layer in text_decoder(model).self_attentions:
        for parameter, value in layer.named_parameters():
            assert value.grad is not None, f"{name}.{parameter}"
            assert value.grad.isfinite().all(), f"{name}.{parameter}"
    optimizer.step()
    with torch.no_grad():
        after = model(input_ids, labels=labels, use_cache=False).loss
    assert after.isfinite()
    assert after != before


@families
@backends
def test_verify_alibi_accepts_it(family, backend):
    model = alibi_model(family, backend)
    reports = hf_alibi.verify_alibi(model)
    assert [report.layer for report in reports] == [name for name, _ in text_decoder(model).self_attentions]


def assert_refused(model, reason):
    """`apply_alibi` says why it does not convert a model, and leaves it alone."""
    # Some recurrences take whole blocks of 16 only.
    input_ids = tokens()[:, :16]
    expected = logits(model, input_ids)
    model_class, config = type(model), copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=re.escape(reason)):
        hf_alibi.apply_alibi(model)
    assert type(model) is model_class
    assert type(model.config) is type(config)
    assert model.config.to_dict() == config.to_dict()
    after = logits(model, input_ids)
    assert torch.equal(after, expected)


@pytest.mark.parametrize("model_type", present([name for name in REFUSED if name not in NOT_BUILT]))
def test_refused_types(model_type):
    assert_refused(stock_tiny(model_type), REFUSED[model_type])


def test_falcon_with_a_bias_of_its_own_is_refused():
    assert_refused(stock_tiny("falcon", alibi=True), "bias by distance")


def test_every_causal_type_is_known():
    assert not set(CAUSAL_TYPES) - {*SUPPORTED, *REFUSED, *ALIASES}
    assert not set(SUPPORTED) & set(REFUSED)


def test_at_least_125_families():
    if not set(SUPPORTED) <= set(CAUSAL_TYPES):
        pytest.skip("this version of transformers lacks some")
    assert len(SUPPORTED) >= 125


@pytest.mark.parametrize("family", ["codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "qwen3", "bert"])
def test_whole_models_pickle_and_copy(family):
    """Those whose attention is code of their own among them: one class for all layers of all models."""
    hf_alibi.apply_alibi(stock_tiny(family))
    model = hf_alibi.apply_alibi(stock_tiny(family))
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(twin, tokens()), logits(model, tokens()))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "falcon", "qwen3", "mistral"])
@pytest.mark.parametrize("scaling", ["yarn", "dynamic"])
def test_scaled_rotary_positions_leave_their_temperature_and_nothing_else(family, scaling):
    """Far beyond the length where the scaling begins."""
    rope = {"rope_type": scaling, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    changes = {"rope_parameters": rope, "max_position_embeddings": 64}
    heads = stock_tiny(family).config.num_attention_heads
    model = hf_alibi.apply_alibi(stock_tiny(family, **changes), slopes=[0.0] * heads)
    input_ids = torch.randint(FIRST_TOKEN, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(0))
    stock = without_positions(stock_tiny(family, **changes))
    assert difference(logits(model, input_ids), logits(stock, input_ids)) < ROUNDING
    plain = hf_alibi.apply_alibi(stock_tiny(family, max_position_embeddings=64), slopes=[0.0] * heads)
    changed = (logits(plain, input_ids) - logits(model, input_ids)).abs().max()
    assert (changed > 0.01) == (scaling == "yarn")


def test_no_positions_where_layers_have_different_numbers_of_heads():
    layers = {"num_attention_heads_per_layer": [4, 8]}
    model = hf_alibi.apply_alibi(stock_tiny("laguna", **layers), slopes=[0.0] * 4)
    assert [len(report.slopes) for report in hf_alibi.verify_alibi(model)] == [4, 8]
    model = hf_alibi.apply_alibi(stock_tiny("laguna", **layers))
    for report, heads in zip(hf_alibi.verify_alibi(model), (4, 8), strict=True):
        assert report.slopes == pytest.approx(slopes(heads).tolist(), rel=1e-4)
    model = hf_alibi.apply_alibi(stock_tiny("laguna", **layers), slopes=[0.5, 0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="attention with 8 heads got 4 ALiBi slopes"):
        logits(model, tokens())
