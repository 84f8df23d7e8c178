"""The report says what the numbers say, whichever way they go."""

import math
import re

import pytest

from helpers.made_up import made_up_results, with_keys
from hf_alibi.reporting.curves import format_value
from hf_alibi.reporting.findings import price
from hf_alibi.reporting.report import probe_rows, write_report

TIMES = "\N{MULTIPLICATION SIGN}"
LENGTHS = [128, 512, 2048]
ALIBI, ORIGINAL, CROPPED = ("alibi", "full"), ("original", "full"), ("original", "cropped")
YARN, SLOPES = ("original", "rope_yarn"), ("alibi", "alibi_linear")
FALLING = (29.0, 28.0, 27.0)
LABELS = {"rope_yarn": "YaRN ×4", "alibi_linear": "slopes ÷16"}


def results_of(alibi=FALLING, *, cropped=True, extra=None, **options):
    """Results of an ALiBi model with these perplexities and an original that stops at 128 with 30."""
    lines = {ALIBI: alibi, ORIGINAL: (30.0, None, None)}
    if cropped:
        lines[CROPPED] = (30.0, 30.0, 30.0)
    return made_up_results({**lines, **(extra or {})}, lengths=LENGTHS, labels=LABELS, **options)


def results_with_keys(alibi):
    """The same, with a probe that finds so many of ten keys at each depth."""
    return with_keys(results_of(), {ALIBI: alibi, ORIGINAL: (10, None)}, lengths=[128, 2048])


def results_with(values, *where):
    """The same, with these values at that place."""
    results = place = results_of()
    for name in where:
        place = place[name]
    place |= values
    return results


def trained(steps, tokens, *, model="alibi", continued=False):
    """The same, with a model that was trained so."""
    training = {"steps": steps, "tokens": tokens, "distilled": 0, "continued": continued}
    return results_with({"training": training}, "models", model)


@pytest.fixture
def written(tmp_path):
    """The text of the report of these results."""

    def write(results):
        tasks = results["probes"]["tasks"] if "probes" in results else []
        for name in ("perplexity", "position_loss", *tasks):
            (tmp_path / f"{name}.png").write_bytes(b"PNG")
        paths = write_report(results, tmp_path)
        assert [path.name for path in paths] == ["report.md", "report.html"]
        return paths[0].read_text(encoding="utf-8")

    return write


@pytest.fixture
def text(written):
    return written(results_of())


def findings(text):
    """The sentences of the findings."""
    return [line[2:] for line in text.split("## Findings\n")[1].split("\n## ")[0].splitlines() if line]


def says(text, *words):
    """The one finding that holds all the words."""
    found = [line for line in findings(text) if all(word in line for word in words)]
    assert len(found) == 1, (words, found)
    return found[0]


def reads(text, said):
    """Whether one finding is this sentence, in which … stands for anything."""
    pattern = ".*".join(map(re.escape, said.split("…")))
    return sum(re.fullmatch(pattern, line) is not None for line in findings(text)) == 1


def test_tables_come_first_and_findings_are_at_most_five_sentences(written):
    text = written(results_with_keys((10, 1)))
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[:4] == [
        "## Sliding window, stride an eighth of the length",
        "## Non-overlapping windows",
        "## Probes",
        "## Findings",
    ]
    assert len(findings(text)) == 5
    assert all(line.count(". ") == 0 for line in findings(text))


class TestTraining:
    def test_steps_and_tokens_come_first(self, written):
        assert findings(written(results_of()))[0] == (
            "**alibi** was trained for 2,000 steps on 1,000,000 tokens, after its layers were fitted to 300,000 "
            "tokens; **original** was trained for 2,000 steps on 1,000,000 tokens."
        )

    @pytest.mark.parametrize(("steps", "tokens"), [(6, 10**6), (1000, 99_999)])
    def test_too_little_training_gets_no_conclusions(self, written, steps, tokens):
        results = trained(steps, tokens)
        first, *others = findings(written(results))
        assert first.endswith(": too little for **alibi** to be judged by, so nothing is concluded here.")
        assert f"trained for {steps:,} steps on {tokens:,} tokens" in first
        assert len(others) == 1
        assert "no probe was run" in others[0]
        line = price(results, "alibi", "original", "sliding")
        assert line.endswith("(29.00 against 30.00): too little training to judge by.")

    def test_a_conversion_that_is_trained_further_is_not_judged_by_its_last_steps(self, written):
        first = findings(written(trained(2, 64, continued=True)))[0]
        assert first.startswith("**alibi** was trained further, for 2 steps on 64 tokens; **original**")
        assert "too little" not in first

    def test_keys_are_counted_and_not_read_after_too_little_training(self, written):
        results = results_with_keys((10, 0))
        results["models"]["alibi"]["training"]["steps"] = 10
        assert says(written(results), "Of passkeys").endswith("0 of 20 [0%, 16%] at 2048.")

    def test_just_enough_is_enough(self, written):
        assert len(findings(written(trained(50, 100_000)))) == 5

    def test_an_original_as_it_was_given_is_judged(self, written):
        results = results_with({"training": None}, "models", "original")
        assert findings(written(results))[0].endswith("; how long **original** was trained is not known.")
        assert len(findings(written(results))) == 5

    def test_a_comparison_of_unequal_training_gives_no_advice_and_no_price(self, written):
        unknown = results_with({"training": None}, "models", "original")
        for text in map(written, (unknown, trained(3, 192, model="original"))):
            assert says(text, "best form").endswith("(27.00 against 30.00).")
            assert says(text, "the length of the training").endswith(
                "not known to be trained alike, so not the price of the conversion alone."
            )


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (
            results_of((33.0, 28.0, 27.0)),
            "At 128 tokens, the length of the training, the perplexity of **alibi** is 1.100 [1.089, 1.111] times that "
            "of **original** (33.00 against 30.00): that is the price of the conversion.",
        ),
        (results_of(FALLING), "…the length of the training…costs nothing there…"),
        (results_of((30.1, 28.0, 27.0)), "…the length of the training…has no measurable price there…"),
        (
            results_of(FALLING),
            f"At 2048 tokens, 16 {TIMES} the training length, the perplexity of **alibi** is 0.931 [0.922, 0.940] "
            "times its own at 128 (27.00 against 29.00): the added context helps.",
        ),
        (results_of((29.0, 31.0, 33.0)), "…is 1.138 [1.127, 1.149] times its own…: the added context hurts."),
        (results_of((30.0, 30.0, 30.2)), "…times its own…: no difference is shown."),
        # The same numbers with narrower intervals are a difference.
        (results_of((30.0, 30.0, 30.2), spread=0.001), "…times its own…hurts…"),
        # The lowest perplexity at each length counts.
        (
            results_of((31.0, 30.1, 27.0), extra={YARN: (30.0, 25.0, 60.0)}),
            "Against the best form of **original** at each length (itself, cropped to 128, YaRN ×4), **alibi** wins at "
            "2048 and loses at 128 and 512; at 2048 that is **original, cropped to 128**, and the perplexity of "
            "**alibi** is 0.900 [0.891, 0.909] times its (27.00 against 30.00): these numbers speak for converting at "
            "2048 tokens.",
        ),
        # A tie is not a win.
        (
            results_of((31.0, 29.9, 29.9)),
            "…best form…loses at 128 and shows no difference at 512 and 2048…: these numbers do not speak for "
            "converting.",
        ),
        (results_of((31.0, 29.9, 29.9), spread=0.001), "…: these numbers speak for converting at 512 to 2048 tokens."),
        # One baseline that is as good is enough to not convert.
        (results_of((31.0, 28.0, 27.0), extra={YARN: (31.0, 28.0, 27.0)}), "…best form…do not speak for converting…"),
        # A win that does not last is no reason to convert.
        (results_of((31.0, 28.0, 31.0)), "…wins at 512 and loses at 128 and 2048…do not speak for converting…"),
        # Where nothing else runs it may be bad: alone is not better.
        (
            results_of((31.0, 30.0, 29.0), cropped=False),
            "…loses at 128 and is alone at 512 and 2048, where **original** cannot run.",
        ),
        (results_of((30.0, 30.0, 30.0)), "…**alibi** shows no difference at 128, 512 and 2048; at 2048…"),
        # The slopes of the converted model are no rival.
        (results_of(FALLING, extra={SLOPES: (9.0, 9.0, 9.0)}), "…best form…wins at 128, 512 and 2048…"),
        # Exploding perplexity is a factor.
        (results_of((29.0, 300.0, 3000.0)), "…best form…100.0 [99.01, 101.0] times its (3000 against 30.00)…"),
        # A loss of keys counts though the intervals of both ends meet, and a low start says nothing about length.
        (
            results_with_keys((10, 1)),
            "Of passkeys **alibi** finds 20 of 20 [84%, 100%] at 128 tokens and 2 of 20 [3%, 30%] at 2048: it finds "
            "less in long contexts.",
        ),
        (results_with_keys((10, 7)), "Of passkeys…14 of 20 [48%, 85%] at 2048: it finds less…"),
        (results_with_keys((10, 9)), "Of passkeys…: no loss with length is shown."),
        (results_with_keys((4, 0)), "Of passkeys…: it does not know the task, so this says nothing about length."),
    ],
)
def test_findings_follow_from_the_numbers(written, results, said):
    text = written(results)
    assert reads(text, said), findings(text)


def test_the_price_is_the_number_of_the_sliding_protocol(written):
    results = results_of((33.0, 28.0, 27.0))
    for entry in results["comparisons"]:
        if entry["protocol"] != "sliding":
            entry |= {"ratio": 9.0, "ratio_low": 8.0, "ratio_high": 9.5}
    assert "1.100" in says(written(results), "the length of the training")


def test_an_unconverted_model_has_no_training_length(written):
    text = written(made_up_results({ORIGINAL: (30.0, 31.0, 32.0)}, lengths=LENGTHS))
    assert says(text, "times its own").startswith("At 2048 tokens the perplexity of **original**")
    assert "converting" not in text


class TestProbes:
    def test_not_run(self, text):
        assert "is not known: no probe was run (`probe_cases`)" in says(text, "far back")
        assert "whether distant facts are found is not known" in text
        assert "passkey.png" not in text

    def test_keys_found_have_a_table_and_a_picture(self, written):
        results = results_with_keys((10, 1))
        assert [name for name, _ in probe_rows(results, "passkey")] == ["alibi", "original"]
        text = written(results)
        assert "| passkeys found | 128 | 2048 |" in text
        assert "| alibi | 100% [84%, 100%] | 10% [3%, 30%] |" in text
        assert "| original | 100% [84%, 100%] | cannot run |" in text
        assert "![Passkeys found by depth and length, one panel a model](passkey.png)" in text
        assert "No probe was run" not in text

    def test_a_probe_that_a_model_cannot_run_was_run(self, written):
        results = with_keys(results_of(), {ALIBI: (None,)}, lengths=[4096])
        said = "**alibi** was asked for passkeys at none of the lengths: learned position table has 128 rows."
        assert says(written(results), "none of the lengths") == said

    @pytest.fixture
    def asked(self):
        """Passkeys, which the model knows, and chains of variables, of which it finds so many in short prompts."""

        def results(found):
            first = results_with_keys((10, 1))
            second = with_keys(results_of(), {ALIBI: (found, 0)}, lengths=[128, 2048], task="tracking")
            rows = [*first["probes"]["rows"], *second["probes"]["rows"]]
            first["probes"] |= {"tasks": ["passkey", "tracking"], "if_known": True, "rows": rows}
            return first

        return results

    def test_tasks_have_tables_of_their_own(self, written, asked):
        text = written(asked(5))
        assert "| alibi | 100% [84%, 100%] | 10% [3%, 30%] |" in text
        assert "| chains of variables found | 128 | 2048 |" in text
        assert "| alibi | 50% [30%, 70%] | 0% [0%, 16%] |" in text
        assert "Of chains of variables **alibi** finds 10 of 20 [30%, 70%] at 128 tokens" in text
        assert "(tracking.png)" in text
        assert "knows" not in says(text, "Of passkeys")

    def test_tasks_that_no_model_knows_have_none_and_are_named(self, written, asked):
        results = asked(2)
        reason = "4 of 20 right at 128 tokens: the model does not know the task"
        for row in results["probes"]["rows"]:
            if row["task"] == "tracking" and row["length"] == 2048:
                row |= {"found": None, "low": None, "high": None, "status": "not asked", "reason": reason}
        text = written(results)
        assert "No model knows these tasks: chains of variables." in text
        assert f"- alibi was not asked for chains of variables at 2048 tokens: {reason}." in text
        assert says(text, "Of passkeys").endswith(
            "No model knows how to find chains of variables in short prompts, so none was asked in long ones."
        )
        assert "tracking.png" not in text
        assert "| alibi | 100% [84%, 100%] | 10% [3%, 30%] |" in text


def test_a_model_that_cannot_run_is_in_the_tables(text):
    assert text.count("| original | 30.00 [27.27, 33.00] | cannot run | cannot run |") == 2
    assert text.count("| original, cropped to 128 | " + " | ".join(["30.00 [27.27, 33.00]"] * 3)) == 2


def test_tables_have_both_protocols_intervals_and_units(text):
    assert text.count(f"| model | 128 (1 {TIMES}) | 512 (4 {TIMES}) | 2048 (16 {TIMES}) |") == 4
    assert text.count("| tokens seen | 113–128 | 449–512 | 1793–2048 |") == 2
    assert text.count("| tokens seen | 1–128 | 1–512 | 1–2048 |") == 2
    assert text.count("| alibi | 29.00 [26.36, 31.90] | 28.00 [25.45, 30.80] | 27.00 [24.55, 29.70] |") == 2
    assert text.count(f"| alibi | {math.log2(29):.3f} | {math.log2(28):.3f} | {math.log2(27):.3f} |") == 2


def test_every_comparison_is_in_a_table_of_ratios(written):
    text = written(results_of((31.0, 30.0, 27.0), extra={SLOPES: (40.0, 30.0, 20.0)}))
    assert "| original | 1.033 [1.023, 1.044] | - | - |" in text
    assert "| original, cropped to 128 | 1.033 [1.023, 1.044] | 1.000 [0.990, 1.010] | 0.900 [0.891, 0.909] |" in text
    assert "| alibi, slopes ÷16 | 0.775 [0.767, 0.783] | 1.000 [0.990, 1.010] | 1.350 [1.337, 1.364] |" in text


def test_each_model_has_its_own_limit_and_training(written):
    text = written(results_with({"made_for": 8192, "training": None}, "models", "original"))
    assert "| ALiBi | any length, trained at 128 | 2,000 steps, 1,000,000 tokens |" in text
    assert r"| p\|q | 8,192 tokens | not known |" in text
    assert "how many times the 128 tokens it is that conversions are trained at" in text
    assert r"| p\|q | not said |" in written(results_with({"made_for": None}, "models", "original"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "documents do not begin with a beginning-of-sequence token; nor does any window."),
        (
            {"document_bos": "<s>", "window_bos": "<s>"},
            "begins with `<s>`; every window begins with `<s>`, in place of its oldest token.",
        ),
        (
            {"document_bos": "<s>"},
            "every document begins with `<s>`; windows begin in the middle of documents, without one.",
        ),
        (
            {"window_bos": "<s>"},
            "documents do not begin with one; every window begins with `<s>`, in place of its oldest token.",
        ),
        ({"stride": 16}, "## Sliding window, stride 16 tokens"),
        ({"stride": 16}, "moves on by 16 tokens and scores only the tokens that are new in it."),
    ],
)
def test_the_beginning_of_sequence_and_a_fixed_stride_are_told(written, settings, words):
    assert words in written(results_with(settings, "settings"))


def test_one_window_is_singular(written):
    text = written(results_with({"windows": 1}, "position_loss", "alibi"))
    assert "alibi: 1 window of 2048 tokens" in text
    assert "original: 2 windows of 2048 tokens" in text


def test_it_says_how_intervals_were_made(text, written):
    assert "95% percentile bootstrap, 2000 resamples, documents drawn with replacement, 40 of them" in text
    blocks = {"unit": "blocks", "units": 32, "documents": 3, "block_tokens": 256}
    text = written(results_with(blocks, "intervals"))
    assert "blocks of 256 neighbouring tokens drawn with replacement, 32 of them" in text
    assert "documents in the scored tokens: 3, too few to draw from" in text


def test_what_is_left_out_is_said_with_the_reason(written):
    left_out = {"rope_yarn": "of this", "rope_linear": "of this", "x": "of that"}
    text = written(results_with({"left_out": left_out}, "models", "original"))
    assert "- **original** has no `rope_yarn` or `rope_linear`: of this." in text
    assert "- **original** has no `x`: of that." in text


def test_it_says_what_was_compared_and_what_is_not_shown(text):
    compared = ("The same 8,192 tokens", "some text", r"p\|q", "12,345", "(perplexity.png)", "(position_loss.png)")
    for words in (*compared, "not long-context use", "early-token curse"):
        assert words in text
    assert "None" not in text


def test_the_cropped_baseline_is_explained_where_there_is_one(text, written):
    reason = "which reads only the last 128 tokens at every length"
    assert reason in text
    without = written(results_of(cropped=False))
    assert reason not in without
    assert "cropped" not in without


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.5, "0.500"), (1.23456, "1.235"), (999.96, "1000.0"), (12345.6, "12346")],
)
def test_numbers_have_four_digits(value, text):
    assert format_value(value) == text
