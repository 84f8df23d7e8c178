import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi

from hf_alibi import alibi_slopes, build_alibi_tensor
from hf_alibi.bias import alibi_bias, causal_rows, distances

masks = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 40).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=batch, max_size=batch
        )
    )
)


@given(mask=masks, num_heads=st.integers(1, 256), kind=st.sampled_from([torch.bool, torch.long, torch.float32]))
def test_equals_bloom_for_any_mask_and_head_count(mask, num_heads, kind):
    mask = torch.tensor(mask)
    ours = build_alibi_tensor(mask.to(kind), num_heads, torch.float32)
    assert ours.shape == (mask.shape[0] * num_heads, 1, mask.shape[1])
    assert torch.equal(ours, bloom_alibi(mask, num_heads, torch.float32))


def test_counts_positions_over_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    bias = build_alibi_tensor(mask, 1, torch.float64) / alibi_slopes(1).item()
    assert bias[:, 0].tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 0]]


def test_casts_last():
    """In bfloat16, position 1001 is 1000: multiplying there would give another value."""
    mask = torch.ones(1, 1002, dtype=torch.long)
    exact = build_alibi_tensor(mask, 12, torch.float32)
    assert torch.equal(build_alibi_tensor(mask, 12, torch.bfloat16), exact.bfloat16())
    early = alibi_slopes(12).bfloat16()[:, None, None] * torch.arange(1002).bfloat16()
    assert not torch.equal(build_alibi_tensor(mask, 12, torch.bfloat16), early)


@pytest.mark.parametrize(
    ("mask", "heads", "dtype", "error", "message"),
    [
        (torch.ones(3), 4, torch.float32, ValueError, r"\(batch, seq_length\), got \(3,\)"),
        (torch.ones(1, 1, 3), 4, torch.float32, ValueError, "batch, seq_length"),
        ([[1, 1]], 4, torch.float32, TypeError, "must be a tensor"),
        (torch.ones(1, 3), 0, torch.float32, ValueError, "at least 1"),
        (torch.ones(1, 3), 4.0, torch.float32, TypeError, "num_heads"),
        (torch.ones(1, 3), 4, torch.int64, TypeError, "floating-point"),
        (torch.ones(1, 3), 4, "float32", TypeError, "floating-point"),
        (torch.tensor([[1.0, float("nan")]]), 4, torch.float32, ValueError, "only 0"),
        (torch.tensor([[1, 2]]), 4, torch.float32, ValueError, "only 0"),
        (torch.tensor([[0.0, -torch.inf]]), 4, torch.float32, ValueError, "only 0"),
    ],
)
def test_refuses_bad_input(mask, heads, dtype, error, message):
    with pytest.raises(error, match=message):
        build_alibi_tensor(mask, heads, dtype)


@given(row=st.lists(st.booleans(), min_size=1, max_size=30))
def test_distances_count_the_allowed_keys_after_each_key(row):
    expected = [float(sum(row[key + 1 :])) for key in range(len(row))]
    assert distances(torch.tensor([row]))[0].tolist() == expected


def test_causal_rows():
    assert causal_rows(2, 2, 5, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_dense_bias_is_slope_times_distance_and_hides_the_future():
    bias = alibi_bias(torch.tensor([0.5, 0.25])[:, None, None], causal_rows(0, 3, 3, torch.device("cpu"))[None, None])
    inf = float("inf")
    assert bias[0, 0].tolist() == [[0, -inf, -inf], [-0.5, 0, -inf], [-1, -0.5, 0]]
    assert bias[0, 1, 2].tolist() == [-0.5, -0.25, 0]


def test_compiles():
    compiled = torch.compile(build_alibi_tensor, fullgraph=True, backend="eager")
    mask = torch.tensor([[0, 1, 1]])
    assert torch.equal(compiled(mask, 6, torch.float32), build_alibi_tensor(mask, 6, torch.float32))
