"""The report says what the numbers say, whichever way they go."""

import math

import pytest
from made_up import made_up_results, with_keys

from hf_alibi.lines import format_value
from hf_alibi.report import passkey_rows, write_report

TIMES = "\N{MULTIPLICATION SIGN}"
LENGTHS = [128, 512, 2048]
ALIBI, ORIGINAL, CROPPED = ("alibi", "full"), ("original", "full"), ("original", "cropped")
YARN, SLOPES = ("original", "rope_yarn"), ("alibi", "alibi_linear")
LABELS = {"rope_yarn": "YaRN ×4", "alibi_linear": "slopes ÷16"}


def results_of(alibi, *, cropped=True, extra=None, **options):
    """Results of an ALiBi model with these perplexities and an original that stops at 128 with 30."""
    lines = {ALIBI: alibi, ORIGINAL: (30.0, None, None)}
    if cropped:
        lines[CROPPED] = (30.0, 30.0, 30.0)
    return made_up_results({**lines, **(extra or {})}, lengths=LENGTHS, labels=LABELS, **options)


@pytest.fixture
def written(tmp_path):
    """The text of the report of these results."""

    def write(results):
        for name in ("perplexity.png", "position_loss.png", *(["passkey.png"] if "passkey" in results else [])):
            (tmp_path / name).write_bytes(b"PNG")
        paths = write_report(results, tmp_path)
        assert [path.name for path in paths] == ["report.md", "report.html"]
        return paths[0].read_text(encoding="utf-8")

    return write


def short(text):
    """The section that says it in short."""
    return text.split("## In short\n")[1].split("\n## ")[0]


def says(text, *words):
    """The one bullet that holds all the words."""
    found = [line for line in text.splitlines() if line.startswith("- ") and all(word in line for word in words)]
    assert len(found) == 1, (words, found)
    return found[0]


def longer(text):
    return text.split("## What the numbers say")[1]


class TestLongerThanTraining:
    def test_falling_perplexity_is_better(self, written):
        line = says(longer(written(results_of((29.0, 28.0, 27.0)))), "**alibi**, sliding window")
        assert f"at 2048 tokens, 16 {TIMES} the training length, is 0.931 [0.922, 0.940] times that at 128" in line
        assert "(27.00 against 29.00), below it: the added context helps (better)." in line
        assert "worse" not in line

    def test_rising_perplexity_is_worse(self, written):
        line = says(longer(written(results_of((29.0, 31.0, 33.0)))), "**alibi**, sliding window")
        assert "is 1.138 [1.127, 1.149] times" in line
        assert "above it: the added context hurts (worse)." in line
        assert "better" not in line

    def test_a_difference_within_its_interval_is_none(self, written):
        line = says(longer(written(results_of((30.0, 30.0, 30.2)))), "**alibi**, sliding window")
        assert "equal as far as these tokens can tell: no difference shown." in line
        # The same numbers with narrower intervals are a difference.
        line = says(longer(written(results_of((30.0, 30.0, 30.2), spread=0.001))), "**alibi**, sliding window")
        assert "above it" in line

    def test_fall_with_non_overlapping_windows_is_not_called_help(self, written):
        line = says(longer(written(results_of((29.0, 28.0, 27.0)))), "**alibi**, non-overlapping")
        assert "fewer targets lack context (better)" in line
        assert "help" not in line

    def test_it_is_in_short_too(self, written):
        assert "below it: the added context helps" in short(written(results_of((29.0, 28.0, 27.0))))
        assert "above it" in short(written(results_of((29.0, 28.0, 31.0))))


class TestAgainstOthers:
    def test_wins_losses_and_ties_are_listed_by_length(self, written):
        text = written(results_of((31.0, 30.1, 27.0), extra={YARN: (30.0, 25.0, 60.0)}))
        line = says(text, "**alibi** against **original, cropped to 128**", "sliding window")
        assert "wins at 2048; loses at 128; no difference shown at 512." in line
        assert "At 2048 tokens its perplexity is 0.900 [0.891, 0.909] times the other's (27.00 against 30.00)." in line
        line = says(text, "**alibi** against **original, YaRN ×4**", "non-overlapping")
        assert "wins at 2048; loses at 128 and 512." in line
        assert "27.00 against 60.00" in line

    def test_a_line_that_stops_is_compared_where_it_runs(self, written):
        line = says(written(results_of((29.0, 28.0, 27.0))), "**alibi** against **original**,", "sliding")
        assert "wins at 128. At 128 tokens" in line

    def test_own_baselines_are_compared_too(self, written):
        text = written(results_of((31.0, 30.0, 29.0), extra={SLOPES: (40.0, 30.0, 20.0)}))
        line = says(text, "**alibi** against **alibi, slopes ÷16**", "sliding")
        assert "wins at 128; loses at 2048; no difference shown at 512." in line


class TestWhenToConvert:
    def test_beyond_a_length(self, written):
        text = short(written(results_of((31.0, 30.1, 27.0), extra={YARN: (30.0, 25.0, 60.0)})))
        line = says(text, "convert for contexts beyond 512 tokens")
        assert "From 2048 tokens on, **alibi** is better than **original** and all its baselines" in line
        assert "(cropped to 128, YaRN ×4)" in line
        assert "strongest of these at 2048 is **original, cropped to 128**" in line
        assert "0.900 [0.891, 0.909] times its." in line

    def test_everywhere(self, written):
        line = says(short(written(results_of((29.0, 28.0, 27.0)))), "at every length evaluated")
        assert "converting pays at any of these contexts" in line

    def test_nowhere(self, written):
        line = says(short(written(results_of((31.0, 31.0, 31.0)))), "nowhere better")
        assert "do not speak for converting" in line
        assert "1.033 [1.023, 1.044] times its" in line
        assert "convert for contexts" not in line

    def test_a_tie_is_not_a_win(self, written):
        says(short(written(results_of((30.0, 29.9, 29.9)))), "nowhere better")
        says(short(written(results_of((30.0, 29.9, 29.9), spread=0.001))), "convert for contexts beyond 128 tokens")

    def test_one_baseline_that_is_as_good_is_enough_to_not_convert(self, written):
        says(short(written(results_of((31.0, 28.0, 27.0), extra={YARN: (31.0, 28.0, 27.0)}))), "nowhere better")

    def test_better_than_the_original_itself_though_not_than_its_baselines(self, written):
        ends = {ORIGINAL: (25.0, 27.9, 60.0), YARN: (25.0, 25.0, 25.0)}
        line = says(short(written(results_of((31.0, 28.0, 27.0), extra=ends))), "nowhere better")
        assert "It is better than **original** itself from 2048 tokens on" in line
        assert "convert for contexts of 2048 tokens and more." in line
        # Not said where the length of the baselines is the same answer, or where the win does not last.
        without = results_of((31.0, 28.0, 27.0), cropped=False, extra={ORIGINAL: (25.0, 27.9, 60.0)})
        assert "itself" not in short(written(without))
        ends[ORIGINAL] = (60.0, 60.0, 25.0)
        assert "itself" not in short(written(results_of((31.0, 28.0, 27.0), extra=ends)))

    def test_somewhere_but_not_at_the_end(self, written):
        line = says(short(written(results_of((31.0, 28.0, 31.0)))), "at 512 only and not at the longest")
        assert "no context beyond which these numbers speak for converting" in line

    def test_where_nothing_else_runs(self, written):
        line = says(short(written(results_of((31.0, 30.0, 29.0), cropped=False))), "beyond 128 tokens")
        assert "At 512 and 2048 **alibi** is alone: **original** cannot run there." in line
        assert "strongest" not in line

    def test_the_slopes_of_the_converted_model_are_no_rival_in_this(self, written):
        text = short(written(results_of((29.0, 28.0, 27.0), extra={SLOPES: (9.0, 9.0, 9.0)})))
        says(text, "at every length evaluated")

    def test_without_a_converted_model_there_is_no_advice(self, written):
        text = written(made_up_results({ORIGINAL: (30.0, 31.0, 32.0)}, lengths=LENGTHS))
        assert "convert" not in text
        assert "above it" in says(text, "**original**, sliding")


class TestPasskeys:
    def found(self, results, alibi, original=(10, None)):
        return with_keys(results, {ALIBI: alibi, ORIGINAL: original}, lengths=[128, 2048])

    def test_not_run(self, written):
        text = written(results_of((29.0, 28.0, 27.0)))
        assert "The passkey probe was not run (`passkey_cases` is 0)" in short(text)
        assert "whether distant facts are found is not known" in text
        assert "passkey.png" not in text

    def test_lost_with_length(self, written):
        text = written(self.found(results_of((29.0, 28.0, 27.0)), (10, 1)))
        line = says(short(text), "**alibi**, passkey probe")
        assert "found 20 of 20 keys [84%, 100%] at 128 tokens, 2 of 20 keys [3%, 30%] at 2048" in line
        assert line.endswith(": it finds less where the context is long.")
        assert "| alibi | 100% [84%, 100%] | 10% [3%, 30%] |" in text
        assert "| original | 100% [84%, 100%] | cannot run |" in text
        assert "![Share of keys found by depth and length, one panel a model](passkey.png)" in text
        assert "was not run" not in text

    def test_a_loss_counts_though_the_intervals_of_both_ends_meet(self, written):
        line = says(short(written(self.found(results_of((29.0, 28.0, 27.0)), (10, 7)))), "passkey probe")
        assert "20 of 20 keys [84%, 100%] at 128 tokens, 14 of 20 keys [48%, 85%] at 2048: it finds less" in line

    def test_kept(self, written):
        line = says(short(written(self.found(results_of((29.0, 28.0, 27.0)), (10, 9)))), "passkey probe")
        assert line.endswith(": no loss with length is shown.")

    def test_a_low_start_says_nothing_about_length(self, written):
        line = says(short(written(self.found(results_of((29.0, 28.0, 27.0)), (4, 0)))), "passkey probe")
        assert "does not know the task: this says nothing about length." in line
        assert "finds less" not in line

    def test_table_rows_are_named(self):
        results = self.found(results_of((29.0, 28.0, 27.0)), (10, 1))
        assert [name for name, _ in passkey_rows(results)] == ["alibi", "original"]


def test_exploding_perplexity_is_a_factor(written):
    text = written(results_of((29.0, 300.0, 3000.0)))
    assert "100.0 [99.01, 101.0] times the other's (3000 against 30.00)" in text


def test_a_model_that_cannot_run_is_told_and_in_the_tables(written):
    text = written(results_of((29.0, 28.0, 27.0)))
    line = says(text, "**original** cannot run")
    assert "cannot run past 128 tokens (learned position table has 128 rows): it has no value at 512, 2048." in line
    assert text.count("| original | 30.00 [27.27, 33.00] | cannot run | cannot run |") == 2
    assert text.count("| original, cropped to 128 | " + " | ".join(["30.00 [27.27, 33.00]"] * 3)) == 2


def test_tables_have_both_protocols_intervals_and_units(written):
    text = written(results_of((29.0, 28.0, 27.0)))
    assert text.count(f"| model | 128 (1 {TIMES}) | 512 (4 {TIMES}) | 2048 (16 {TIMES}) |") == 4
    assert text.count("| alibi | 29.00 [26.36, 31.90] | 28.00 [25.45, 30.80] | 27.00 [24.55, 29.70] |") == 2
    assert text.count(f"| alibi | {math.log2(29):.3f} | {math.log2(28):.3f} | {math.log2(27):.3f} |") == 2
    assert "## Sliding window, stride 64" in text
    assert "## Non-overlapping windows" in text


def test_it_says_how_intervals_were_made(written):
    results = results_of((29.0, 28.0, 27.0))
    assert "95% percentile bootstrap, 2000 resamples, documents drawn with replacement, 40 of them" in written(results)
    results["intervals"] |= {"unit": "blocks", "units": 32, "documents": 3, "block_tokens": 256}
    text = written(results)
    assert "blocks of 256 neighbouring tokens drawn with replacement, 32 of them" in text
    assert "documents in the scored tokens: 3, too few to draw from" in text


def test_what_is_left_out_is_said_with_the_reason(written):
    results = results_of((29.0, 28.0, 27.0))
    results["models"]["original"]["left_out"] = {"rope_yarn": "of this", "rope_linear": "of this", "x": "of that"}
    text = written(results)
    assert "- **original** has no `rope_yarn` or `rope_linear`: of this." in text
    assert "- **original** has no `x`: of that." in text


def test_it_says_what_was_compared_and_what_is_not_shown(written):
    text = written(results_of((29.0, 28.0, 27.0)))
    assert "The same 8,192 tokens" in text
    assert "some text" in text
    assert r"p\|q" in text
    assert "12,345" in text
    assert "(perplexity.png)" in text
    assert "(position_loss.png)" in text
    assert "not long-context use" in text
    assert "early-token curse" in text
    assert "None" not in text


def test_the_cropped_baseline_is_explained_where_there_is_one(written):
    reason = "still reads the most recent 128 tokens"
    assert reason in written(results_of((29.0, 28.0, 27.0)))
    without = written(results_of((29.0, 28.0, 27.0), cropped=False))
    assert reason not in without
    assert "cropped" not in without


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.5, "0.500"), (1.23456, "1.235"), (999.96, "1000.0"), (12345.6, "12346")],
)
def test_numbers_have_four_digits(value, text):
    assert format_value(value) == text
