"""generate gives with a cache what it gives without one."""

import pytest
import torch
from transformers import StaticCache

import hf_alibi
from helpers.models import stock_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*assisted.*")


@pytest.fixture(params=["eager", "sdpa"])
def model(family, request):
    """With an output layer of its own: one tied to the embeddings would repeat the last token for ever."""
    model = hf_alibi.apply_alibi(stock_model(family, 6, tie_word_embeddings=False))
    model.set_attn_implementation(request.param)
    model.generation_config.eos_token_id = None
    return model


def generate(model, input_ids, **kwargs):
    torch.manual_seed(7)
    return model.generate(input_ids, max_new_tokens=24, pad_token_id=0, **kwargs)


def greedy_by_hand(model, input_ids, mask=None):
    """One whole forward pass for each new token: no cache, no generate."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    with torch.no_grad():
        for _ in range(24):
            following = model(input_ids, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
            input_ids, mask = (
                torch.cat([input_ids, following], 1),
                torch.cat([mask, torch.ones_like(following)], 1),
            )
    return input_ids


def test_greedy(model):
    prompt = tokens(2, 40)
    expected = greedy_by_hand(model, prompt)
    assert len(set(expected[0, 40:].tolist())) > 3
    assert torch.equal(generate(model, prompt, do_sample=False), expected)
    assert torch.equal(generate(model, prompt, do_sample=False, use_cache=False), expected)


def test_sampling(model):
    prompt = tokens(2, 40)
    sampled = generate(model, prompt, do_sample=True, top_k=10)
    assert torch.equal(sampled, generate(model, prompt, do_sample=True, top_k=10, use_cache=False))
    assert not torch.equal(sampled, generate(model, prompt, do_sample=False))


def test_beams(model):
    prompt = tokens(2, 40)
    beams = generate(model, prompt, do_sample=False, num_beams=4)
    assert torch.equal(beams, generate(model, prompt, do_sample=False, num_beams=4, use_cache=False))


def test_assisted(model, family):
    prompt = tokens(1, 40)
    draft = hf_alibi.apply_alibi(stock_model(family, 4))
    draft.generation_config.eos_token_id = None
    expected = generate(model, prompt, do_sample=False)
    assert torch.equal(generate(model, prompt, do_sample=False, assistant_model=draft), expected)
    assert torch.equal(generate(model, prompt, do_sample=False, prompt_lookup_num_tokens=3), expected)


def test_batched_with_left_padding(model):
    prompts = [tokens(1, 9), tokens(1, 40, seed=2), tokens(1, 23, seed=3)]
    batch = torch.zeros(3, 40, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 40 - prompt.shape[1] :] = prompt
    mask = (batch != 0).long()
    output = generate(model, batch, attention_mask=mask, do_sample=False)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, do_sample=False)
        assert torch.equal(output[row, 40:], alone[0, prompt.shape[1] :])
    assert torch.equal(output, greedy_by_hand(model, batch, mask))


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache(model, padded):
    prompt = tokens(2, 40)
    mask = torch.ones_like(prompt)
    if padded:
        prompt[0, :11], mask[0, :11] = 0, 0
    expected = generate(model, prompt, attention_mask=mask, do_sample=False)
    cache = StaticCache(config=model.config, max_cache_len=80)
    # disable_compile: this is about values; compilation has its own tests.
    kwargs = {"past_key_values": cache, "do_sample": False, "disable_compile": True}
    assert torch.equal(generate(model, prompt, attention_mask=mask, **kwargs), expected)


def test_far_beyond_the_old_table(model):
    prompt = tokens(1, 300)
    assert torch.equal(generate(model, prompt, do_sample=False), greedy_by_hand(model, prompt))
