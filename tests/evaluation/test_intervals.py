"""Intervals, against loops over single resamples, and in how many of many samples they hold the truth."""

import math

import pytest
import torch

from hf_alibi.evaluation import intervals
from hf_alibi.evaluation.comparisons import Key, with_intervals
from hf_alibi.evaluation.intervals import interval, resampled_means, resampling_units, share_difference, wilson


def loop(losses, units, *, resamples, seed):
    """One resample at a time: documents drawn one by one, their tokens laid end to end."""
    generator = torch.Generator().manual_seed(seed)
    count = int(units.max()) + 1
    means = []
    for _ in range(resamples):
        drawn = torch.randint(count, (1, count), generator=generator)[0]
        tokens = torch.cat([losses[:, units == unit] for unit in drawn], dim=1)
        means.append(tokens.double().mean(1))
    return torch.stack(means)


@pytest.mark.parametrize("at_a_time", [1, 2**22])
def test_resamples_are_those_of_a_loop(monkeypatch, at_a_time):
    monkeypatch.setattr(intervals, "_ENTRIES", at_a_time)
    losses = torch.rand(3, 60)
    units = torch.arange(8).repeat_interleave(torch.tensor([1, 2, 3, 4, 20, 5, 15, 10]))
    found = resampled_means(losses, units, resamples=40, seed=3)
    # Drawn all at once, numbers come in the same order only where a generator gives them one after another.
    if at_a_time == 1:
        torch.testing.assert_close(found, loop(losses, units, resamples=40, seed=3))
    spread = loop(losses, units, resamples=3000, seed=1)
    many = resampled_means(losses, units, resamples=3000, seed=2)
    torch.testing.assert_close(many.mean(0), spread.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(many.std(0), spread.std(0), atol=0, rtol=0.1)
    for column in range(3):
        assert interval(many[:, column]) == pytest.approx(interval(spread[:, column]), abs=0.015)


def test_the_same_seed_gives_the_same_interval():
    losses, units = torch.rand(1, 100), torch.arange(100) // 4
    first, second, other = (resampled_means(losses, units, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def covered(*, within, trials=300):
    """Share of samples whose interval has the true mean 0, with documents that differ and are of unequal length."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([5, 10, 40] * 20)
    documents = torch.arange(60).repeat_interleave(sizes)
    hits = 0
    for trial in range(trials):
        shared = torch.randn(60, generator=generator)[documents]
        losses = shared + torch.randn(len(documents), generator=generator)
        units = documents if within else torch.arange(len(documents))
        low, high = interval(resampled_means(losses[None], units, resamples=400, seed=trial)[:, 0])
        hits += low < 0 < high
    return hits / trials


def test_intervals_over_documents_cover_the_truth_and_over_tokens_do_not():
    assert 0.90 <= covered(within=True) <= 0.98
    assert covered(within=False, trials=100) < 0.6


def test_units_are_documents_where_there_are_enough():
    documents = torch.arange(5, 25).repeat_interleave(7)  # cut from a longer stream
    units, said = resampling_units(documents)
    assert torch.equal(units, documents - 5)
    assert said == {"unit": "documents", "units": 20, "documents": 20, "block_tokens": None}


@pytest.mark.parametrize(("tokens", "block", "count"), [(8192, 256, 32), (1000, 50, 20), (10, 1, 10)])
def test_units_are_blocks_where_documents_are_few(tokens, block, count):
    units, said = resampling_units(torch.arange(tokens) * 19 // tokens)
    assert torch.equal(units, torch.arange(tokens) // block)
    assert (said["unit"], said["units"], said["block_tokens"]) == ("blocks", count, block)
    assert said["documents"] < 20


@pytest.mark.parametrize("cases", [1, 10, 200])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wilson_ends_are_where_the_observed_share_is_on_the_edge(cases, share):
    """An end p solves |found / n - p| = z sqrt(p (1 - p) / n), unless it is 0 or 1."""
    found = round(share * cases)
    for end in wilson(found, cases):
        if 1e-12 < end < 1 - 1e-12:
            assert abs(found / cases - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / cases), rel=1e-4)
    low, high = wilson(found, cases)
    assert 0 <= low <= found / cases + 1e-12
    assert found / cases - 1e-12 <= high <= 1
    assert high - low > 0


def test_a_difference_of_shares_is_newcombes():
    """His table II, example (a), method 10."""
    assert share_difference(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert share_difference(48, 80, 56, 70) == pytest.approx((-0.3339, -0.0524), abs=5e-5)


def row(model, context, length, nats):
    fields = {"model": model, "context": context, "protocol": "sliding", "length": length}
    return {**fields, "perplexity": None if nats is None else math.exp(float(nats.double().mean()))}


class TestComparisons:
    """Two models on 40 documents; the second is a little worse on each of them."""

    @pytest.fixture
    def made(self):
        documents = torch.arange(40).repeat_interleave(10)
        base = torch.randn(40)[documents] + 5
        noise = torch.rand(3, 400) * 0.02
        losses = {
            Key("a", "full", "sliding", 8): base + noise[0],
            Key("a", "full", "sliding", 16): base + noise[1] - 0.1,
            Key("b", "full", "sliding", 8): base + noise[2] + 0.05,
        }
        rows = [row(key.model, key.context, key.length, nats) for key, nats in losses.items()]
        rows.append(row("b", "full", 16, None))
        return with_intervals(rows, losses, documents, subjects=["a"], train_length=8)

    def test_rows_get_their_interval(self, made):
        *measured, unmeasured = made["rows"]
        assert all(each["perplexity_low"] < each["perplexity"] < each["perplexity_high"] for each in measured)
        assert unmeasured["perplexity_low"] is unmeasured["perplexity_high"] is None

    def test_ratios_are_paired(self, made):
        entries = {(e["model"], e["length"], e["against_model"], e["against_length"]): e for e in made["comparisons"]}
        assert set(entries) == {("a", 16, "a", 8), ("a", 8, "b", 8)}
        against = entries["a", 8, "b", 8]
        assert against["ratio"] == pytest.approx(made["rows"][0]["perplexity"] / made["rows"][2]["perplexity"])
        assert against["ratio_low"] < against["ratio"] < against["ratio_high"] < 1
        # Documents differ far more than models: intervals of their own would overlap almost wholly.
        assert against["ratio_high"] - against["ratio_low"] < 0.01
        assert made["rows"][0]["perplexity_high"] / made["rows"][0]["perplexity_low"] > 1.3
        assert entries["a", 16, "a", 8]["ratio_high"] < 1

    def test_it_says_how(self, made):
        assert {"unit": "documents", "units": 40, "level": 0.95}.items() <= made["intervals"].items()


def test_models_that_run_nowhere_have_no_intervals():
    made = with_intervals([row("a", "full", 8, None)], {}, torch.zeros(50).long(), subjects=["a"], train_length=8)
    assert made["rows"][0]["perplexity_low"] is None
    assert made["comparisons"] == []
