"""The report says what the numbers say, whichever way they go."""

import math

import pytest

from hf_alibi.report import format_value, write_report

TIMES = "\N{MULTIPLICATION SIGN}"
LENGTHS = [128, 512, 2048]
CANNOT = "cannot run: learned position table has 128 rows"


def row(model, protocol, length, context, perplexity):
    nats = math.log(perplexity) if perplexity else None
    return {
        "model": model,
        "protocol": protocol,
        "length": length,
        "context": context,
        "nats_per_token": nats,
        "perplexity": perplexity,
        "bits_per_byte": nats / math.log(2) if perplexity else None,
        "tokens": 8192,
        "status": "ok" if perplexity else CANNOT,
    }


def report(tmp_path, alibi, *, cropped=True, protocols=("sliding", "non_overlapping")):
    """Report on an ALiBi model with these perplexities and an original that stops at 128 with 30."""
    rows = []
    for protocol in protocols:
        rows += [row("alibi", protocol, n, "full", p) for n, p in zip(LENGTHS, alibi, strict=True)]
        rows += [row("original", protocol, n, "full", 30.0 if n == 128 else None) for n in LENGTHS]
        rows += [row("original", protocol, n, "cropped", 30.0) for n in LENGTHS if cropped]
    model = {
        "source": "runs/x",
        "model_type": "gpt2",
        "positions": "p|q",
        "attention": "sdpa",
        "dtype": "float32",
    }
    results = {
        "settings": {
            "train_length": 128,
            "lengths": LENGTHS,
            "stride": 64,
            "scored_tokens": 8192,
            "text": "some text",
        },
        "environment": {
            "python": "3",
            "device": "cpu",
            "git_commit": None,
            "packages": {"torch": "2", "x": None},
        },
        "models": {
            "alibi": {**model, "parameters": 12345, "position_limit": None},
            "original": {**model, "parameters": 12345, "position_limit": 128},
        },
        "rows": rows,
        "position_loss": {"alibi": {"length": 2048, "windows": 4, "bins": []}},
    }
    write_report(results, tmp_path / "report.md")
    return (tmp_path / "report.md").read_text(encoding="utf-8")


def says(text, *words):
    """The one bullet that holds all the words."""
    found = [line for line in text.splitlines() if line.startswith("- ") and all(word in line for word in words)]
    assert len(found) == 1, (words, found)
    return found[0]


def test_falling_perplexity_is_better(tmp_path):
    text = report(tmp_path, (29.0, 28.0, 27.0))
    line = says(text, "**alibi**, sliding window")
    assert f"perplexity at 16 {TIMES} the training length is 0.931 of that at 1 {TIMES}" in line
    assert "(27.00 against 29.00; lower is better)" in line
    assert "helps (better)" in line
    assert "worse" not in line
    against = says(text, "**alibi** at 2048", "**original, cropped to 128**", "sliding window")
    assert "27.00 against 30.00, 10.0% lower (better)" in against
    # The control itself does not reach 2048, and its cropped form is no competitor of its own.
    assert "**original** at 2048" not in text


def test_rising_perplexity_is_worse(tmp_path):
    text = report(tmp_path, (29.0, 31.0, 33.0))
    line = says(text, "**alibi**, sliding window")
    assert f"is 1.138 of that at 1 {TIMES}" in line
    assert "hurts (worse)" in line
    assert "better)" not in line.replace("lower is better)", "")
    assert "33.00 against 30.00, 10.0% higher (worse)" in says(text, "**alibi** at 2048", "cropped", "sliding window")


def test_exploding_perplexity_is_a_factor(tmp_path):
    text = report(tmp_path, (29.0, 300.0, 3000.0))
    assert "3000 against 30.00, 100 times as high (worse)" in says(text, "**alibi** at 2048", "sliding window")


def test_equal_perplexity_is_called_equal(tmp_path):
    text = report(tmp_path, (30.0, 30.0, 30.01))
    for line in (says(text, "**alibi**, sliding"), says(text, "**alibi** at 2048", "sliding window")):
        assert "no difference to speak of" in line
        assert "(worse)" not in line
        assert "(better)" not in line


def test_fall_with_non_overlapping_windows_is_not_called_help(tmp_path):
    line = says(report(tmp_path, (29.0, 28.0, 27.0)), "**alibi**, non-overlapping")
    assert "fewer targets lack context (better)" in line
    assert "help" not in line


def test_a_model_that_cannot_run_is_told_and_in_the_tables(tmp_path):
    text = report(tmp_path, (29.0, 28.0, 27.0))
    line = says(text, "**original** cannot run")
    assert "cannot run past 128 tokens (learned position table has 128 rows): it has no value at 512, 2048." in line
    assert text.count("| original | 30.00 | cannot run | cannot run |") == 2
    assert text.count("| original, cropped to 128 | 30.00 | 30.00 | 30.00 |") == 2


def test_tables_have_both_protocols_and_units(tmp_path):
    text = report(tmp_path, (29.0, 28.0, 27.0))
    assert text.count(f"| model | 128 (1 {TIMES}) | 512 (4 {TIMES}) | 2048 (16 {TIMES}) |") == 4
    assert text.count("| alibi | 29.00 | 28.00 | 27.00 |") == 2
    assert text.count(f"| alibi | {math.log2(29):.3f} | {math.log2(28):.3f} | {math.log2(27):.3f} |") == 2
    assert "## Sliding window, stride 64" in text
    assert "## Non-overlapping windows" in text


def test_it_says_what_was_compared_and_what_is_not_shown(tmp_path):
    text = report(tmp_path, (29.0, 28.0, 27.0))
    assert "The same 8,192 tokens" in text
    assert "some text" in text
    assert r"p\|q" in text
    assert "12,345" in text
    assert "(perplexity.png)" in text
    assert "(position_loss.png)" in text
    assert "not long-context use" in text
    assert "early-token curse" in text
    assert "None" not in text


def test_the_cropped_baseline_is_explained_where_there_is_one(tmp_path):
    reason = "still reads the most recent 128 tokens"
    assert reason in report(tmp_path, (29.0, 28.0, 27.0))
    without = report(tmp_path, (29.0, 28.0, 27.0), cropped=False)
    assert reason not in without
    assert "cropped" not in without


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.5, "0.500"), (1.23456, "1.235"), (999.96, "1000.0"), (12345.6, "12346")],
)
def test_numbers_have_four_digits(value, text):
    assert format_value(value) == text
