"""Streams of tokens in pieces, and the blocks that are read from them."""

import numpy as np
import pytest
import torch

from hf_alibi.errors import InputError
from hf_alibi.training.token_blocks import TokenStream, pack_blocks


def stream(*pieces):
    return TokenStream([np.array(piece, dtype=np.int32) for piece in pieces])


def blocks_of(blocks):
    return [blocks[index]["input_ids"].tolist() for index in range(len(blocks))]


def test_every_slice_of_a_stream_is_that_of_its_tokens():
    tokens = list(range(10))
    pieces = stream(tokens[:3], [], tokens[3:4], tokens[4:])
    assert len(pieces) == 10
    bounds = [None, *range(-12, 13)]
    for start in bounds:
        for stop in bounds:
            part = pieces[start:stop]
            assert part.read().tolist() == tokens[start:stop]
            assert len(part) == len(tokens[start:stop])
            assert part[1:].read().tolist() == tokens[start:stop][1:]
    assert pieces.read().dtype == pieces[:0].read().dtype == torch.int64
    assert TokenStream.joined([pieces[8:], pieces[:2]]).read().tolist() == [8, 9, 0, 1]
    assert pieces.max() == 9
    with pytest.raises(ValueError, match="step 2 was given"):
        pieces[::2]


def test_blocks_do_not_overlap():
    blocks = pack_blocks([stream(range(6), range(6, 11))], 4)
    assert blocks_of(blocks) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert blocks[1]["labels"].tolist() == [-100, 5, 6, 7]  # nothing predicts the first token
    assert len(blocks) == 2
    assert len(pack_blocks([stream(range(4))], 4)) == 1


def test_text_shorter_than_a_block():
    with pytest.raises(InputError, match=r"the held-out text has 7 tokens.*block_size of at most 7"):
        pack_blocks([stream(range(7))], 8, name="the held-out text")


def test_a_mixture_alternates_in_the_proportions_of_its_weights():
    """12 blocks of one text and 30 of another, 2 to 1: all of the first, 6 of the second, evenly spread."""
    read = blocks_of(pack_blocks([stream(range(24)), stream(range(100, 160))], 2, weights=[2, 1]))
    assert [block for block in read if block[0] < 100] == [[start, start + 1] for start in range(0, 24, 2)]
    assert [block for block in read if block[0] >= 100] == [[start, start + 1] for start in range(100, 112, 2)]
    assert [index for index, block in enumerate(read) if block[0] >= 100] == [1, 4, 7, 10, 13, 16]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.1, 0.9], [1 / 3, 2 / 3], [5, 5]])
def test_the_shares_are_exact_to_a_block(weights):
    read = blocks_of(pack_blocks([stream(range(1000)), stream(range(1000, 1700))], 1, weights=weights))
    second = sum(block[0] >= 1000 for block in read)
    assert second / len(read) == pytest.approx(weights[1] / sum(weights), abs=1 / len(read))
    assert second == 700 or len(read) - second == 1000  # one of the two is used up


def test_weights_that_leave_a_stream_without_a_block_are_refused():
    with pytest.raises(InputError, match=r"has \[2, 0\] blocks of block_size 2 in the proportions \[9, 1\]"):
        pack_blocks([stream(range(4)), stream(range(4))], 2, weights=[9, 1])
