"""What of a text the parts of a recipe read, and in blocks of which length."""

import pytest
import torch

from helpers.models import stock_model, tokens
from hf_alibi.conversion import recipe
from hf_alibi.conversion.settings import ConversionArguments


def read(monkeypatch, model, blocks, **settings):
    """What the distillation and the measurement of heads read, as lists of blocks."""
    seen = {}

    def distil(model, teacher, blocks, settings, **kwargs):
        seen["distilled"] = [blocks[index] for index in range(len(blocks))]
        return []

    def measure(model, input_ids):
        seen["measured"] = list(input_ids)
        return measure_heads(model, input_ids)

    measure_heads = recipe.measure_heads
    monkeypatch.setattr(recipe, "distill_layers", distil)
    monkeypatch.setattr(recipe, "measure_heads", measure)
    recipe.convert_model(model, blocks, ConversionArguments(distill_batch_size=2, **settings))
    return seen["distilled"], seen["measured"]


@pytest.mark.parametrize(
    ("size", "asked", "length", "count"),
    [(16, 96, 16, 6), (16, 97, 16, 7), (256, 96, 64, 2), (64, 130, 64, 3), (24, 96, 24, 4)],
)
def test_distillation_reads_short_blocks_of_the_first_tokens(monkeypatch, size, asked, length, count):
    blocks = tokens(20, 64)
    # Enough of them for `check_distillation`, which is tried elsewhere.
    monkeypatch.setattr(recipe, "check_distillation", lambda *args, **kwargs: None)
    distilled, measured = read(
        monkeypatch,
        stock_model("llama", 4),
        blocks,
        match_tokens=128,
        distill_tokens=asked,
        distill_block_size=size,
    )
    assert [len(block) for block in distilled] == [length] * count
    kept = blocks[:, : 64 // length * length].flatten()
    assert torch.equal(torch.cat(distilled), kept[: length * count])
    assert torch.equal(torch.cat(measured), blocks[:2].flatten())


def test_a_model_with_a_table_of_positions_reads_no_more_at_a_time(monkeypatch):
    monkeypatch.setattr(recipe, "check_distillation", lambda *args, **kwargs: None)
    model = stock_model("gpt2", 4, n_positions=32)
    blocks = tokens(20, 64)
    distilled, measured = read(monkeypatch, model, blocks, match_tokens=64, distill_tokens=96)
    assert [len(block) for block in distilled] == [32] * 3
    assert torch.equal(torch.cat(distilled), blocks.flatten()[:96])
    assert torch.equal(torch.cat(measured), blocks.flatten()[:64])


def test_more_tokens_than_the_text_has_are_refused():
    settings = ConversionArguments(distill_tokens=1200, distill_block_size=24)
    with pytest.raises(ValueError, match="distill_tokens is 1,200, but there are 960 tokens of training text"):
        recipe.convert_model(stock_model("llama", 4), tokens(20, 64), settings)
