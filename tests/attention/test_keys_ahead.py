"""Queries that see keys after their own: prefix-LM masks, the tokens of an image. The bias falls with |distance|."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma3Config

import hf_alibi
from helpers import reference
from helpers.attention import EVERYWHERE, additive, expected, largest, layer, qkv, run, with_gradients
from helpers.composites import TEXT, VISION
from helpers.masks import padded, triangle
from helpers.models import stock_model, tokens
from hf_alibi import AlibiCache
from hf_alibi.attention.backends import wrapped_backends
from hf_alibi.attention.inputs import visible_keys

LENGTH = 200


def with_block(mask, begin, end):
    """Queries and keys `begin` to `end` see each other both ways."""
    mask = mask.clone()
    mask[begin:end, begin:end] = True
    return mask


MASKS = {
    "prefix": with_block(triangle(LENGTH), 0, 60),
    "all": torch.ones(LENGTH, LENGTH, dtype=torch.bool),
    "two images": with_block(with_block(triangle(LENGTH), 20, 50), 90, 120),
    "image, then text long enough for windows": with_block(triangle(LENGTH), 5, 30),
    "left padding": with_block(padded(LENGTH, left=7), 7, 40),
    "right padding": with_block(padded(LENGTH, right=7), 0, 40),
    "two tokens ahead of each": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(2),
}


def truth(query, key, value, mask):
    """Positions count the keys that anybody sees."""
    position = mask.any(dim=-2).long().cumsum(-1) - 1
    return expected(query, key, value, mask.expand(len(query), -1, -1), position.expand(len(query), -1))


@pytest.mark.parametrize("form", [lambda mask: mask, additive], ids=["bool", "additive"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_the_bias_falls_with_distance_both_ways(backend, mask, form):
    inputs = [x.requires_grad_() for x in qkv(2, 4, 2, LENGTH, LENGTH)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    upstream = qkv(2, 4, 4, LENGTH, LENGTH, seed=1)[0] * mask.any(dim=-1)[:, None]
    got = with_gradients(lambda *x: run(backend, *x, form(mask)[None, None]), inputs, upstream)
    want = with_gradients(lambda *x: truth(*x, mask[None]), wide, upstream)
    for a, b in zip(got, want, strict=True):
        assert largest(a, b) < 2e-5


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("empty", [0, 1, 90, 300], ids="empty={}".format)
@pytest.mark.parametrize("past", [0, 30])
def test_in_a_static_cache_whose_end_is_still_empty(backend, past, empty):
    mask = with_block(triangle(LENGTH), 20 + past, 70 + past)
    query, key, value = qkv(1, 4, 2, LENGTH, LENGTH)
    want = truth(query, key, value, mask[None])[:, :, past:]
    rows = torch.nn.functional.pad(mask[past:], (0, empty))
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, empty), value=9.0) for x in (key, value))
    assert largest(run(backend, query[:, :, past:], key, value, rows[None, None]), want) < 2e-5


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_padding_after_all_sequences_of_a_later_chunk_is_no_empty_cache(backend):
    mask = triangle(LENGTH)
    mask[:, LENGTH - 9 :] = False
    query, key, value = qkv(1, 4, 2, LENGTH, LENGTH)
    want = truth(query, key, value, mask[None])[:, :, 30 : LENGTH - 9]
    got = run(backend, query[:, :, 30:], key, value, mask[None, None, 30:])[:, :, : LENGTH - 39]
    assert largest(got, want) < 2e-5


def test_own_keys_of_each_kind_of_cache():
    query, key = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 8, 4)
    rows = torch.ones(3, 8, dtype=torch.bool).tril(2)
    assert visible_keys(rows[None, None], query, key).own.tolist() == [2, 3, 4]
    assert visible_keys(triangle(3, 8)[None, None], query, key).own.tolist() == [5, 6, 7]


def test_flex_refuses_and_compiled_gives_nan():
    inputs, mask = qkv(1, 4, 4, 150, 150), MASKS["image, then text long enough for windows"][None, None, :150, :150]
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"shows keys after a query's own.*attn_implementation='sdpa'"):
            run("flex_attention", *inputs, mask)
        output = torch.compile(run, backend="eager")("flex_attention", *inputs, mask, layer(4))
    assert output[:, :, 5:29].isnan().all()
    others = [*range(5), *range(29, 150)]
    assert largest(output[:, :, others], truth(*inputs, mask[0])[:, :, others]) < 2e-5


def test_alibi_cache_refuses_after_its_first_step():
    model = hf_alibi.apply_alibi(stock_model("llama")).eval()
    ids, cache = tokens(1, 12), AlibiCache()
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        mask = with_block(triangle(12), 8, 12)[None, None, 8:]
        with pytest.raises(ValueError, match="may not see keys after their own"):
            model(ids[:, 8:], past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_image_tokens_of_gemma3(backend):
    torch.manual_seed(0)
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=98)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=backend).double().eval()
    hf_alibi.apply_alibi(model)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    image = torch.zeros(2, 24, dtype=torch.long)
    image[0, 4:9] = image[1, 10:20] = 1
    calls = []

    def recording(attention):
        def record(module, query, key, value, mask, **kwargs):
            output = attention(module, query, key, value, mask, **kwargs)
            calls.append((query, key, value, mask[:, 0], output[0].transpose(1, 2)))
            return output

        return record

    with torch.no_grad(), wrapped_backends(recording):
        model(input_ids=ids, token_type_ids=image, attention_mask=torch.ones_like(ids))
    assert calls
    for query, key, value, mask, output in calls:
        seen = mask if mask.dtype == torch.bool else mask > -1
        assert seen[0, 4, 8]
        scaling = model.config.text_config.query_pre_attn_scalar**-0.5
        want = reference.attention(
            query, key, value, seen, torch.arange(24).expand(2, -1), reference.slopes(query.shape[1]), scaling
        )
        assert largest(output, want) < 1e-12
