import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi

from helpers import reference
from hf_alibi import alibi_slopes
from hf_alibi.slopes import check_scaling, dynamic_scale, scale_slopes


@pytest.mark.parametrize("num_heads", range(1, 257))
def test_equals_bloom_and_the_paper(num_heads):
    ours = alibi_slopes(num_heads)
    assert ours.dtype == torch.float32
    # BLOOM's tensor at position 1 is the slope itself.
    bloom = bloom_alibi(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)[:, 0, 1]
    assert torch.equal(ours, bloom)
    torch.testing.assert_close(ours.double(), reference.slopes(num_heads), rtol=3e-6, atol=0)


def test_twelve_heads_by_hand():
    expected = [2**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(12).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [2.0, "4", None, True])
def test_refuses_other_types(bad):
    with pytest.raises(TypeError, match="num_heads must be an int"):
        alibi_slopes(bad)


@pytest.mark.parametrize("bad", [0, -3])
def test_refuses_no_heads(bad):
    with pytest.raises(ValueError, match="at least 1"):
        alibi_slopes(bad)


def test_linear_scaling_divides_every_slope():
    assert torch.equal(scale_slopes(alibi_slopes(8), {"type": "linear", "factor": 4.0}), alibi_slopes(8) / 4)


@given(heads=st.integers(2, 40), factor=st.floats(1, 64))
def test_ntk_scaling_keeps_the_steepest_and_stretches_the_flattest(heads, factor):
    before = alibi_slopes(heads)
    after = scale_slopes(before, {"type": "ntk", "factor": factor})
    assert after.max().item() == pytest.approx(before.max().item(), rel=1e-6)
    assert after.min().item() == pytest.approx(before.min().item() / factor, rel=1e-5)
    assert torch.equal(after.argsort(), before.argsort())


def test_scaling_leaves_zero_slopes_at_zero():
    for kind in ("linear", "ntk"):
        assert scale_slopes(torch.tensor([0.5, 0.0]), {"type": kind, "factor": 2.0})[1] == 0
        assert torch.equal(scale_slopes(torch.zeros(3), {"type": kind, "factor": 2.0}), torch.zeros(3))


def test_dynamic_scale_starts_at_the_training_length_and_stops_at_its_ceiling():
    scale = dynamic_scale(torch.tensor([1, 8, 16, 64]), train_length=8, ceiling=None)
    assert scale.tolist() == [1.0, 1.0, 0.5, 0.125]
    assert dynamic_scale(torch.tensor([64]), train_length=8, ceiling=2.0).item() == 0.5


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"type": "yarn", "factor": 2.0},
        {"type": "linear"},
        {"type": "linear", "factor": 0.5},
        {"type": "linear", "factor": math.nan},
        {"type": "linear", "factor": math.inf},
        {"type": "linear", "factor": True},
        {"type": "linear", "factor": 2.0, "alpha": 1},
    ],
)
def test_refuses_malformed_scaling(scaling):
    with pytest.raises(ValueError, match="alibi_scaling"):
        check_scaling(scaling)


def test_accepts_dynamic_without_ceiling():
    check_scaling({"type": "dynamic"})
