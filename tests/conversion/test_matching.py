"""Head matching: the same function with its heads in another order, and the order that suits the slopes best."""

import itertools

import pytest
import torch

import hf_alibi
from helpers.models import stock_model, tokens
from helpers.tiny_models import FIRST_TOKEN, VOCABULARY, stock_tiny
from hf_alibi.conversion.heads import head_counts, permute_heads
from hf_alibi.conversion.matching import match_heads, matching_order
from hf_alibi.conversion.measures import measure_heads
from hf_alibi.model.anatomy import text_decoder

# GPT-2, grouped heads, all heads with keys of their own, norms of queries and keys (of one head, and of all together),
# biases, sinks.
MODELS = {
    "gpt2": lambda: stock_model("gpt2", 6),
    "llama": lambda: stock_model("llama", 6),
    "llama, no groups": lambda: stock_model("llama", 6, num_key_value_heads=6),
    "llama, one key head": lambda: stock_model("llama", 6, num_key_value_heads=1),
    "llama, biases": lambda: stock_model("llama", 6, attention_bias=True),
    **{name: (lambda name=name: stock_tiny(name)) for name in ("qwen2", "qwen3", "olmo2", "gpt_oss", "opt", "mistral")},
}


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Biases that are 0 and norms that are 1 would look right in any order.
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def text(*shape, seed=1):
    vocabulary = torch.randint(FIRST_TOKEN, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
    return vocabulary % 60 + 3


@torch.no_grad()
def logits(model, input_ids):
    return model(input_ids).logits


def test_any_order_that_keeps_groups_leaves_the_logits(model):
    input_ids = text(2, 30)
    before = logits(model, input_ids)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _, layer in text_decoder(model).self_attentions:
        heads, key_heads = head_counts(layer)
        group = heads // key_heads
        order = [g * group + h for g in reversed(range(key_heads)) for h in [*range(1, group), 0]]
        assert order != list(range(heads))
        permute_heads(layer, order)
    assert (logits(model, input_ids) - before).abs().max() < 1e-5 * before.abs().max()
    changed = {
        name.split(".")[-2] for name, parameter in model.named_parameters() if (parameter != weights[name]).any()
    }
    assert changed >= ({"c_attn", "c_proj"} if "c_attn" in changed else {"q_proj"})


def test_matching_leaves_the_logits_and_helps(model):
    """Orders are those of the reaches, measured before and after."""
    input_ids = text(4, 30)
    before = logits(model, input_ids)
    reaches = measure_heads(model, input_ids).reaches
    orders = match_heads(model, input_ids)
    assert (logits(model, input_ids) - before).abs().max() < 1e-5 * before.abs().max()
    for old, new, order in zip(reaches, measure_heads(model, input_ids).reaches, orders, strict=True):
        assert torch.allclose(new, old[order], rtol=1e-4)
    # Nothing is left to do.
    assert all(order == list(range(len(order))) for order in match_heads(model, input_ids))
    hf_alibi.verify_alibi(hf_alibi.apply_alibi(model))


def test_the_reach_is_the_mean_distance_without_the_first_token():
    model, input_ids = stock_model("gpt2", 4), tokens(1, 20)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids, output_attentions=True).attentions[0][0].double()
    total = mass = 0.0
    for query, key in itertools.product(range(1, 20), range(1, 20)):
        if key <= query:
            total = total + weights[:, query, key] * torch.tensor(1.0 + query - key).log()
            mass = mass + weights[:, query, key]
    assert torch.allclose(measure_heads(model, input_ids).reaches[0], (total / mass).exp() - 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("reaches", "key_heads", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 4, [0, 1, 2, 3]),
        ([4.0, 3.0, 2.0, 1.0], 4, [3, 2, 1, 0]),
        ([4.0, 3.0, 2.0, 1.0], 1, [3, 2, 1, 0]),
        # Heads 0 and 1 share a key head, and both look far: they go last together.
        ([9.0, 7.0, 1.0, 2.0], 2, [2, 3, 1, 0]),
        # The paper's slopes of 6 heads: 2^-2, 2^-4, 2^-6, 2^-8, 2^-1, 2^-3.
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 6, [1, 3, 4, 5, 0, 2]),
    ],
)
def test_orders(reaches, key_heads, expected):
    order = matching_order(reaches, key_heads)
    assert order == expected
    assert {type(head) for head in order} == {int}  # metrics.json has it


def test_no_order_that_keeps_groups_is_better():
    """All of 9 heads in 3 groups, as of SmolLM2, tried."""
    generator = torch.Generator().manual_seed(0)
    places = hf_alibi.alibi_slopes(9).double().log()
    for _ in range(5):
        reaches = torch.rand(9, generator=generator).tolist()
        own = torch.empty(9, dtype=torch.float64)
        own[torch.tensor(reaches).argsort()] = places.sort(descending=True).values

        def cost(order, own=own):
            return (own[list(order)] - places).square().sum().item()

        inside = list(itertools.permutations(range(3)))
        best = min(
            cost([3 * g + h for g, heads in zip(groups, within, strict=True) for h in heads])
            for groups in inside
            for within in itertools.product(inside, repeat=3)
        )
        assert cost(matching_order(reaches, 3)) == pytest.approx(best)


def test_many_key_heads():
    """Too many to try all orders: as good as the sorted one, which is the best where nothing is shared."""
    reaches = torch.rand(32, generator=torch.Generator().manual_seed(0))
    assert matching_order(reaches.tolist(), 32) == reaches.argsort().tolist()


def test_what_cannot_be_reordered_is_refused():
    with pytest.raises(ValueError, match="call it before apply_alibi"):
        match_heads(hf_alibi.apply_alibi(stock_model("llama")), tokens(1, 20))
    model = stock_tiny("deepseek_v3")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"heads of DeepseekV3Attention cannot be reordered.* kv_a_proj"):
        match_heads(model, text(1, 20))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    layer = next(layer for _, layer in text_decoder(stock_model("llama")).self_attentions)
    with pytest.raises(ValueError, match="tears apart"):
        permute_heads(layer, [0, 2, 1, 3])
    with pytest.raises(ValueError, match="each of 4 heads once"):
        permute_heads(layer, [0, 0, 1, 2])
