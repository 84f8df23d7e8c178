"""Whole converted models against the float64 reference: lengths, padding, packing, caches, types, gradients."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DynamicCache, StaticCache

import hf_alibi
from helpers.models import stock_model, tokens
from helpers.reference import LOGITS, slopes

backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])

# The requirement is 1e-4 at 2048 tokens in float32; without the bias logits differ by 1 and more.
EXACT = 1e-4


def alibi_model(family, heads=4, backend="sdpa", *, alibi_slopes=None, **changes):
    model = hf_alibi.apply_alibi(stock_model(family, heads, **changes), slopes=alibi_slopes)
    model.set_attn_implementation(backend)
    return model


@torch.no_grad()
def logits(model, input_ids, **kwargs):
    return model(input_ids, **kwargs).logits.double()


def truth(family, model, input_ids, mask=None, segments=None, head_slopes=None):
    mask = torch.ones_like(input_ids) if mask is None else mask
    return LOGITS[family](model, input_ids, mask, segments, head_slopes)


def largest(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("heads", [4, 6, 9, 12])
def test_2048_tokens(family, heads):
    """Sixty-four times the stock model's table of positions."""
    model = alibi_model(family, heads)
    input_ids = tokens(1, 2048)
    expected = truth(family, model, input_ids)
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        assert largest(logits(model, input_ids), expected) < EXACT


def test_the_reference_notices_a_missing_bias(family):
    model, input_ids = alibi_model(family), tokens(1, 64)
    no_bias = truth(family, model, input_ids, head_slopes=torch.zeros(4))
    assert largest(no_bias, logits(model, input_ids)) > 0.5


@backends
def test_left_and_right_padding(family, backend):
    model, input_ids = alibi_model(family, 6, backend), tokens(3, 300)
    mask = torch.ones_like(input_ids)
    mask[0, :120] = 0
    mask[1, 200:] = 0
    real = mask.bool()
    assert (
        largest(logits(model, input_ids, attention_mask=mask)[real], truth(family, model, input_ids, mask)[real])
        < EXACT
    )


@backends
def test_left_padding_changes_nothing(family, backend):
    model, input_ids = alibi_model(family, 6, backend), tokens(1, 40)
    alone = logits(model, input_ids)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), input_ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :9] = 0
    assert largest(logits(model, padded, attention_mask=mask)[:, 9:], alone) < 1e-5


@backends
@pytest.mark.parametrize("form", ["position_ids", "mask_4d"])
def test_packed_sequences_do_not_see_each_other(family, backend, form):
    model, input_ids = alibi_model(family, 9, backend), tokens(1, 256)
    lengths = [100, 1, 56, 99]
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    if form == "position_ids":
        position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        output = logits(model, input_ids, position_ids=position_ids, use_cache=False)
    else:
        seen = torch.ones(256, 256, dtype=torch.bool).tril() & (segments[0, :, None] == segments[0])
        mask = seen[None, None]
        if backend == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        output = logits(model, input_ids, attention_mask=mask)
    assert largest(output, truth(family, model, input_ids, segments=segments)) < EXACT


@backends
@pytest.mark.parametrize("padded", [False, True])
def test_chunked_cache(family, backend, padded):
    model, input_ids = alibi_model(family, 12, backend), tokens(2, 300)
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, :50] = 0
    cache, parts, start = DynamicCache(), [], 0
    for size in (100, 1, 1, 150, 48):
        end = start + size
        seen = mask[:, :end] if padded else None
        parts.append(logits(model, input_ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True))
        start = end
    expected = truth(family, model, input_ids, mask)
    assert largest(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()]) < EXACT


@backends
def test_static_cache(family, backend):
    """More keys than tokens: what is still empty must not count as distance."""
    model, input_ids = alibi_model(family, 4, backend), tokens(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=64)
    first = logits(model, input_ids[:, :30], past_key_values=cache, use_cache=True)
    rest = logits(model, input_ids[:, 30:], past_key_values=cache, use_cache=True)
    assert largest(torch.cat([first, rest], dim=1), truth(family, model, input_ids)) < EXACT


@backends
def test_custom_slopes(family, backend):
    chosen = [0.9, 0.0, 0.01, 0.3]
    model, input_ids = alibi_model(family, 4, backend, alibi_slopes=chosen), tokens(1, 100)
    expected = truth(family, model, input_ids, head_slopes=torch.tensor(chosen))
    assert largest(logits(model, input_ids), expected) < EXACT


@backends
def test_zero_slopes_mean_no_positions(family, backend):
    """The last token's logits do not depend on the order of the tokens before it; with slopes they do."""
    input_ids = tokens(1, 20)
    shuffled = input_ids.clone()
    shuffled[0, :19] = input_ids[0, torch.randperm(19)]
    # In one layer: deeper layers know the order through the causal mask.
    sizes = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    without = alibi_model(family, 4, backend, alibi_slopes=[0.0] * 4, **sizes)
    assert largest(logits(without, input_ids)[:, -1], logits(without, shuffled)[:, -1]) < 1e-5
    with_bias = alibi_model(family, 4, backend, **sizes)
    assert largest(logits(with_bias, input_ids)[:, -1], logits(with_bias, shuffled)[:, -1]) > 0.01


@backends
def test_the_last_token_does_not_change_earlier_logits(family, backend):
    model, input_ids = alibi_model(family, 4, backend), tokens(1, 50)
    before = logits(model, input_ids)
    input_ids[0, -1] = 3 + (input_ids[0, -1] - 2) % 61
    after = logits(model, input_ids)
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert not torch.equal(after[:, -1], before[:, -1])


@backends
def test_position_ids_change_nothing(family, backend):
    model, input_ids = alibi_model(family, 4, backend), tokens(1, 30)
    mask = torch.ones_like(input_ids)
    shifted = logits(model, input_ids, attention_mask=mask, position_ids=torch.arange(100_000, 100_030)[None])
    assert torch.equal(shifted, logits(model, input_ids, attention_mask=mask))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_good_as_the_unconverted_model(family, backend, dtype):
    """Error to float64 at most 1.5 × that of transformers' own attention in the same model without positions."""
    input_ids = tokens(2, 256)
    model = alibi_model(family, 12, backend).to(dtype)
    error = (logits(model, input_ids) - truth(family, model, input_ids)).abs()
    stock = hf_alibi.apply_alibi(stock_model(family, 12), slopes=[0.0] * 12).to(dtype)
    stock.set_attn_implementation(backend)
    for _, attention in hf_alibi.model.anatomy.text_decoder(stock).self_attentions:
        attention.config = stock.config  # transformers' own attention function, positions removed
    stock_error = (logits(stock, input_ids) - truth(family, stock, input_ids, head_slopes=torch.zeros(12))).abs()
    assert error.mean() <= 1.5 * stock_error.mean()
    assert error.max() <= 1.5 * stock_error.max()


@backends
def test_parameters_get_the_reference_gradient(family, backend):
    model, input_ids = alibi_model(family, 6, backend), tokens(2, 60)
    mask = torch.ones_like(input_ids)
    mask[0, :15] = 0
    model(input_ids, attention_mask=mask).logits[mask.bool()].square().mean().backward()
    ours = {name: p.grad.double() for name, p in model.named_parameters()}
    model.zero_grad()
    # The reference reads weights through state_dict, which is cut off from the graph: give it live ones.
    live = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    tied = {"lm_head.weight": live["transformer.wte.weight"]} if family == "gpt2" else {}

    class Live:
        config = model.config

        @staticmethod
        def state_dict():
            return {name: _Attached(value) for name, value in {**live, **tied}.items()}

    class _Attached:
        def __init__(self, value):
            self.value = value

        def detach(self):
            return self

        def double(self):
            return self.value

    LOGITS[family](Live, input_ids, mask)[mask.bool()].square().mean().backward()
    for name, gradient in ours.items():
        assert largest(gradient, live[name].grad) < 1e-4 * live[name].grad.abs().max().item() + 1e-9, name


def test_gradient_checkpointing_changes_no_gradient(family):
    gradients = []
    for checkpointing in (False, True):
        model = alibi_model(family, 4).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(tokens(2, 50), labels=tokens(2, 50)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_trains_with_attention_dropout(family):
    dropout = {"attn_pdrop": 0.1} if family == "gpt2" else {"attention_dropout": 0.1}
    model = alibi_model(family, 4, **dropout).train()
    input_ids = tokens(4, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@backends
@pytest.mark.parametrize("padded", [False, True])
def test_autocast_is_as_good_as_with_the_unconverted_attention(family, backend, padded):
    """Mixed precision rounds inside the attention call. Key positions beyond 256 would not survive that."""
    model, input_ids = alibi_model(family, 12, backend), tokens(2, 900)
    mask = torch.ones_like(input_ids)
    mask[0, : 100 * padded] = 0
    errors = []
    for stock in (False, True):
        head_slopes = torch.zeros(12) if stock else None
        for _, attention in hf_alibi.model.anatomy.text_decoder(model).self_attentions:
            attention.config = model.config if stock else attention.config
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = logits(model, input_ids, attention_mask=mask if padded else None)
        error = (output - truth(family, model, input_ids, mask, head_slopes=head_slopes))[mask.bool()].abs()
        errors.append((error.mean(), error.max()))
    (mean, maximum), (stock_mean, stock_maximum) = errors
    assert mean <= 1.5 * stock_mean
    assert maximum <= 1.5 * stock_maximum


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_output_attentions_are_the_weights_of_the_bias(family, backend):
    model, input_ids = alibi_model(family, 4, "eager"), tokens(1, 20)
    with torch.no_grad():
        output = model(input_ids, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert len(output.hidden_states) == 3
    for weights in output.attentions:
        assert weights.shape == (1, 4, 20, 20)
        assert torch.allclose(weights.sum(-1), torch.ones(1, 4, 20))
    if backend == "sdpa":
        model.set_attn_implementation("sdpa")
        assert largest(logits(model, input_ids), output.logits.double()) < 1e-5


def test_compiles_to_one_graph(family):
    torch.compiler.reset()  # or the limit of compilations counts those of other tests
    model, input_ids = alibi_model(family, 4), tokens(2, 24)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert largest(logits(compiled, input_ids), logits(model, input_ids)) < 1e-5
    masked = logits(compiled, input_ids, attention_mask=mask)
    assert largest(masked[mask.bool()], logits(model, input_ids, attention_mask=mask)[mask.bool()]) < 1e-5


def test_compiles_a_training_step_to_one_graph(family):
    torch.compiler.reset()  # or the limit of compilations counts those of other tests
    model, input_ids = alibi_model(family, 4), tokens(2, 24)
    torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids, labels=input_ids).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(input_ids, labels=input_ids).loss.backward()
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(gradients, model.parameters(), strict=True))


@pytest.mark.slow
def test_compiles_with_inductor(family):
    """The default compiler, forward and backward."""
    torch.compiler.reset()  # or the limit of compilations counts those of other tests
    model, input_ids = alibi_model(family, 4), tokens(2, 24)
    compiled = torch.compile(model, fullgraph=True)
    compiled(input_ids, labels=input_ids).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(input_ids, labels=input_ids).loss.backward()
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(gradients, model.parameters(), strict=True))


def test_sequence_classification_with_padding(family):
    model = hf_alibi.apply_alibi(stock_model(family, 4, auto_class=AutoModelForSequenceClassification, num_labels=3))
    short, long = tokens(1, 10), tokens(1, 16, seed=2)
    padded = torch.cat([short, torch.zeros(1, 6, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    batch = logits(model, torch.cat([padded, long]), attention_mask=torch.cat([mask, torch.ones_like(long)]))
    assert largest(batch[:1], logits(model, short)) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "ntk"])
def test_scaled_slopes_reach_every_layer(family, kind):
    model, input_ids = alibi_model(family, 4), tokens(1, 80)
    model.config.alibi_scaling = {"type": kind, "factor": 4.0}
    paper = slopes(4)
    rank = (paper.max().log2() - paper.log2()) / (paper.max().log2() - paper.min().log2())
    scaled = paper / (4.0 if kind == "linear" else 4.0**rank)
    assert largest(logits(model, input_ids), truth(family, model, input_ids, head_slopes=scaled)) < EXACT


@backends
def test_dynamic_scaling_is_the_same_with_a_cache(family, backend):
    model, input_ids = alibi_model(family, 4, backend), tokens(1, 60)
    model.config.alibi_train_length = 16
    model.config.alibi_scaling = {"type": "dynamic"}
    whole = logits(model, input_ids)
    cache = DynamicCache()
    parts = [
        logits(model, part, past_key_values=cache, use_cache=True) for part in input_ids.split([40, 1, 1, 18], dim=1)
    ]
    assert largest(torch.cat(parts, dim=1), whole) < 1e-5
    model.config.alibi_scaling = None
    assert largest(logits(model, input_ids), whole) > 0.01
