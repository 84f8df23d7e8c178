"""One new token over a long cache: values that cannot matter are not read."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_alibi
from helpers import reference
from helpers.attention import expected, largest, layer, qkv, run
from hf_alibi.attention.call import AttentionCall
from hf_alibi.attention.layer_slopes import HeadSlopes
from hf_alibi.attention.sdpa import decoding
from hf_alibi.attention.sdpa import dispatch as sdpa_backend
from hf_alibi.attention.sdpa.decoding import decode
from hf_alibi.attention.tolerance import exact_tolerance


def decoded(query, key, value, allowed=None, slopes=None, tolerance=None):
    slopes = HeadSlopes(hf_alibi.alibi_slopes(query.shape[1]) if slopes is None else slopes)
    tolerance = exact_tolerance(query.dtype) if tolerance is None else tolerance
    return decode(AttentionCall(query, key, value, None, slopes, query.shape[-1] ** -0.5, tolerance), allowed)


@pytest.fixture
def read_keys(monkeypatch):
    """How many values each call read, in order."""
    counts = []
    read = decoding._read

    def counting(logits, value, kept):
        counts.append(int(kept.sum()) * decoding._BLOCK)
        return read(logits, value, kept)

    monkeypatch.setattr(decoding, "_read", counting)
    return counts


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 2), (9, 3), (12, 12)])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("keys", [5, 64, 1000, 3001])
def test_equals_the_reference(heads, key_heads, queries, keys):
    query, key, value = qkv(2, heads, key_heads, queries, keys)
    output, lse = decoded(query, key, value)
    assert largest(output, expected(query, key, value)) < 2e-6
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    logits = query.double() @ key.double().repeat_interleave(heads // key_heads, 1).mT / 4
    logits = logits - reference.slopes(heads)[:, None, None] * distance
    assert largest(lse, logits.masked_fill(distance < 0, -math.inf).logsumexp(-1)) < 1e-5


def test_steep_heads_read_few_values_and_flat_ones_many(read_keys):
    for slope in (0.5, 0.05, 0.005):
        decoded(*qkv(1, 8, 8, 1, 20_000), slopes=torch.full((8,), slope))
    assert read_keys[0] <= 128
    assert 400 < read_keys[1] < 1200
    assert 3000 < read_keys[2] < 9000


def test_a_far_key_that_matters_is_read(read_keys):
    query, key, value = qkv(1, 2, 1, 1, 9000)
    key[0, 0, 100] = query[0, 0, 0] * 100
    slopes = torch.tensor([0.02, 0.5])
    output, _ = decoded(query, key, value, slopes=slopes)
    assert largest(output, expected(query, key, value, head_slopes=slopes)) < 2e-6
    assert largest(output[0, 0, 0], value[0, 0, 100]) < 1e-5
    assert read_keys[0] < 2000


def test_nan_in_a_far_key_is_not_hidden():
    query, key, value = qkv(1, 4, 4, 1, 5000)
    key[0, 1, 10] = math.nan
    assert decoded(query, key, value)[0][0, 1].isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    keys=st.integers(1, 400),
    queries=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    tolerance=st.sampled_from([None, 1e-3, 0.1]),
    density=st.sampled_from([0.05, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_mask_within_the_tolerance(keys, queries, scale, tolerance, density, seed):
    query, key, value = qkv(2, 4, 2, queries, keys, seed=seed)
    key = key * scale
    allowed = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) < density
    output, _ = decoded(query, key, value, allowed, tolerance=tolerance)
    after = allowed.double().flip(-1).cumsum(-1).flip(-1) - 1
    logits = query.double() @ key.double().repeat_interleave(2, 1).mT / 4 - reference.slopes(4)[:, None, None] * after
    weights = logits.masked_fill(~allowed, -1e30).softmax(-1) * allowed
    truth = weights @ value.double().repeat_interleave(2, 1)
    assert largest(output, truth) <= (0 if tolerance is None else 2 * tolerance * value.abs().max().item()) + 2e-5


def test_sdpa_decodes_by_it_from_some_length_on(monkeypatch, read_keys):
    monkeypatch.setattr(sdpa_backend, "_DECODE_KEYS", 300)
    query, key, value = qkv(2, 6, 2, 1, 300)
    allowed = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    allowed[1, ..., :77] = False
    seen = allowed[:, 0].expand(-1, 1, -1)
    position = allowed[:, 0, 0].cumsum(-1) - 1
    assert largest(run("sdpa", query, key, value), expected(query, key, value)) < 2e-6
    truth = reference.attention(query, key, value, seen, position, reference.slopes(6), 0.25)
    assert largest(run("sdpa", query, key, value, allowed), truth) < 2e-6
    assert len(read_keys) == 2
    scaled = layer(6, scaling={"type": "dynamic"}, train_length=100)
    truth = expected(query, key, value, head_slopes=reference.slopes(6) / 3)
    assert largest(run("sdpa", query, key, value, module=scaled), truth) < 2e-6
    run("sdpa", query[..., :100], key[:, :, :299], value[:, :, :299])
    run("sdpa", query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert len(read_keys) == 3


def test_sdpa_reads_less_with_a_tolerance(monkeypatch, read_keys):
    monkeypatch.setattr(sdpa_backend, "_DECODE_KEYS", 300)
    tensors = qkv(1, 4, 4, 1, 9000)
    run("sdpa", *tensors)
    run("sdpa", *tensors, module=layer(4, tolerance=0.01))
    assert read_keys[1] < read_keys[0]
