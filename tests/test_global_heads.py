"""Which heads of which layers are global: as many as asked for, in the fewest key groups, the flattest first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_alibi.global_heads import GlobalHeads, count_global_heads, describe_global_heads
from hf_alibi.slopes import alibi_slopes


@pytest.mark.parametrize(
    ("heads", "key_heads", "number", "places"),
    [
        (8, 8, 2, [6, 7]),
        (9, 3, 2, [6, 7]),  # the last group has the slopes 2^-7, 2^-8 and 2^-0.5
        (9, 3, 3, [6, 7, 8]),
        (9, 3, 4, [5, 6, 7, 8]),
        (12, 1, 1, [7]),
        (8, 2, 1, [7]),
        (4, 4, 4, [0, 1, 2, 3]),
    ],
)
def test_the_flattest_heads_of_the_fewest_groups_are_global(heads, key_heads, number, places):
    slopes = GlobalHeads(number).slopes(heads, key_heads, 2)
    assert [place for place, slope in enumerate(slopes) if slope == 0] == places
    paper = alibi_slopes(heads).tolist()
    assert all(slope in (0, paper[place]) for place, slope in enumerate(slopes))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_no_fewer_key_groups_would_hold_the_global_heads(key_heads, group, data):
    heads = key_heads * group
    number = data.draw(st.integers(1, heads))
    slopes = GlobalHeads(number).slopes(heads, key_heads, 1)
    touched = {place // group for place, slope in enumerate(slopes) if slope == 0}
    assert slopes.count(0) == number
    assert len(touched) == -(-number // group)


def test_the_last_layer_of_every_so_many_has_them():
    slopes = GlobalHeads(2, every=3).slopes(4, 4, 7)
    assert count_global_heads(slopes) == [0, 0, 2, 0, 0, 2, 0]
    assert slopes[0] == alibi_slopes(4).tolist()


def test_none_is_the_papers_slopes():
    assert GlobalHeads().slopes(8, 8, 4) is None


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (GlobalHeads(5), ValueError, "global_heads is 5; it must be from 0 to 4, heads of a layer"),
        (GlobalHeads(-1), ValueError, "global_heads is -1"),
        (GlobalHeads(True), TypeError, "global_heads must be an int, got True"),
        (GlobalHeads(1, 3), ValueError, "global_every is 3; it must be from 1 to 2, layers"),
        (GlobalHeads(1, 0), ValueError, "global_every is 0"),
        (GlobalHeads(1, 1.5), TypeError, "global_every must be an int, got 1.5"),
    ],
)
def test_what_a_model_does_not_have_is_refused(asked, error, message):
    with pytest.raises(error, match=message):
        asked.slopes(4, 4, 2)


@pytest.mark.parametrize(
    ("slopes", "words"),
    [
        (None, ""),
        ([0.5, 0.25], ""),
        ([0.5, 0.0], "1 of 2 heads global"),
        ([[0.5, 0.25], [0.0, 0.0], [0.5, 0.25]], "2 of 2 heads global in 1 of 3 layers"),
        ([[0.5, 0.0], [0.0, 0.0]], "1 to 2 of 2 heads global in 2 of 2 layers"),
    ],
)
def test_words(slopes, words):
    assert describe_global_heads(slopes) == words
