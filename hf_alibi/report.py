"""The report of a comparison in words and tables, made from a result file alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .html_page import html_page
from .lines import (
    format_interval,
    line,
    line_name,
    lines,
    listed,
    markdown_table,
    protocol_lengths,
    protocol_title,
    protocols,
    stride_words,
    times,
)
from .results import Results, replacing
from .verdicts import in_short, passkey_statements, statements

__all__ = ["passkey_rows", "table_rows", "write_report"]

_TITLE = "Perplexity beyond the training length"

_INTRODUCTION = (
    "The same {tokens} tokens of held-out text are scored at every length and for every model; only the "
    "context before them varies. Every token counts once and equally."
)

_PROTOCOLS = {
    "sliding": (
        "Windows of the given length move by a stride of tokens and score only their last targets, as many, "
        "which have less than a stride of context less than the length ({stride}). A difference between two "
        "lengths is what the model makes of the tokens further away."
    ),
    "non_overlapping": (
        "Windows lie end to end and score all their targets, the first of which have almost no context. "
        "Longer windows have fewer such targets, so this perplexity falls with length even for a model "
        "that uses only the few tokens before a target (the early-token curse): a falling curve here is "
        "no evidence that distant context is used."
    ),
}

_WHY_CROPPED = (
    "A cropped model still reads the most recent {train_length} tokens, which hold most of what helps to "
    "predict the next one. So cropping, which needs no training, is a strong baseline in perplexity; a "
    "model that extrapolates has to be measured against it, not only against one that fails."
)

_BASELINES = (
    "Each baseline is a change of the config on the same weights, without training, for the longest length evaluated: "
    "RoPE scaling as transformers does it, by the longest length / `max_position_embeddings`; a window in which every "
    "layer sees the last {train_length} tokens; the slopes of a converted model scaled by the longest length / "
    "{train_length}."
)

_INTERVALS = {
    "documents": "documents drawn with replacement, {units} of them in the scored tokens",
    "blocks": (
        "blocks of {block_tokens} neighbouring tokens drawn with replacement, {units} of them (documents in the scored "
        "tokens: {documents}, too few to draw from; blocks of one document resemble each other, so that these "
        "intervals are rather too narrow)"
    ),
}

_PASSKEY = (
    "A number of five digits stands in filler text, at a depth from 0 % (the beginning) to 100 % (right before the "
    "question), and the prompt ends with the question for it; prompt and answer are exactly as long as said. A case "
    "counts where greedy generation gives the whole number. {cases} cases for each length and depth, the same ones for "
    "every model. In brackets: Wilson's 95 % interval."
)

_LIMITS = (
    "A flat perplexity curve shows that length does no harm. It is not long-context use: a model that "
    "ignored everything beyond the training length would have one too. Whether distant facts are found "
    "takes a retrieval test.",
    "The intervals are about the choice of text: how far the numbers would move with other documents like these. The "
    "seed of the training can move them as much and is not in them: this is one run on one text. Of twenty comparisons "
    "without any difference, one on average shows one.",
    "Perplexities compare only between models with the same tokenizer; bits per byte compare between tokenizers too.",
    "Where documents are shorter than the window, the added context is other documents.",
)

_PASSKEY_LIMITS = {
    True: (
        "The passkey probe asks for one number in filler that repeats itself, the easiest case of retrieval: to fail "
        "it says more than to pass it. A model that does not find the number in short prompts does not know the task, "
        "and its numbers say nothing about length; training on `dataset_name: passkey` teaches it."
    ),
    False: "The passkey probe was not run (`passkey_cases`): whether distant facts are found is not known.",
}


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write `report.md` and `report.html` of an extrapolation run into `folder`; returns both paths.

    The pictures lie beside them: `perplexity.png`, `position_loss.png`, and `passkey.png` where the probe was run. The
    page has them inside.
    """
    text = "\n\n".join(_sections(results)) + "\n"
    paths = [folder / "report.md", folder / "report.html"]
    for path, content in zip(paths, (text, html_page(text, title=_TITLE, folder=folder)), strict=True):
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return paths


def table_rows(
    results: Results, protocol: str, value: str, *, intervals: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each model and context, its name and `value` (a row's field) at each length as text.

    With `intervals` the fields `<value>_low` and `<value>_high` follow in brackets.
    """
    for model, context in lines(results):
        cells = []
        for row in line(results, model, protocol, context):
            ends = (row[f"{value}_low"], row[f"{value}_high"]) if intervals else (None, None)
            cells.append(format_interval(row[value], *ends) if row["status"] == "ok" else "cannot run")
        yield line_name(results, model, context), cells


def passkey_rows(results: Results) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each model and baseline, its name and the share of keys found at each length as text."""
    rows = [row for row in results["passkey"]["rows"] if row["depth"] is None]
    for model, context in dict.fromkeys((row["model"], row["context"]) for row in rows):
        cells = [_share(row) for row in rows if (row["model"], row["context"]) == (model, context)]
        yield line_name(results, model, context), cells


def _share(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return "cannot run"
    return f"{row['found'] / row['cases']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"


def _sections(results: Results) -> Iterator[str]:
    yield f"# {_TITLE}"
    yield _compared(results)
    if brief := list(in_short(results)):
        yield "## In short"
        yield _bullets(brief)
    yield from _baselines(results)
    for protocol in protocols(results):
        yield _protocol_section(results, protocol)
    yield "![Perplexity against evaluation length, one panel a protocol](perplexity.png)"
    yield "## What the numbers say"
    yield _bullets(statements(results))
    yield from _cropped_note(results)
    yield from _passkey(results)
    yield "## Loss by position"
    yield _position_text(results)
    yield "![Loss against the position in the window](position_loss.png)"
    yield "## What the numbers do not show"
    yield _bullets([*_LIMITS[:1], _PASSKEY_LIMITS["passkey" in results], *_LIMITS[1:]])
    yield "## How it was run"
    yield _environment(results)


def _compared(results: Results) -> str:
    settings = results["settings"]
    header = ["model", "source", "type", "positions", "attention", "dtype", "parameters"]
    cells = [
        [
            name,
            f"`{model['source']}`",
            model["model_type"],
            model["positions"],
            model["attention"],
            model["dtype"],
            f"{model['parameters']:,}",
        ]
        for name, model in results["models"].items()
    ]
    introduction = _INTRODUCTION.format(tokens=f"{settings['scored_tokens']:,}")
    text = settings.get("text")
    source = f" Text: {text}." if text else ""
    train_length = f" Training length: {settings['train_length']} tokens."
    return f"{introduction}{source}{train_length}\n\n{markdown_table(header, cells)}"


def _baselines(results: Results) -> Iterator[str]:
    """What the baselines are, and why a model has not all that are made for it."""
    models = results["models"]
    left_out: dict[tuple[str, str], list[str]] = {}
    for name, model in models.items():
        for baseline, reason in model["left_out"].items():
            left_out.setdefault((name, reason), []).append(f"`{baseline}`")
    if left_out or any(model["baselines"] for model in models.values()):
        yield "## Baselines"
        yield _BASELINES.format(train_length=results["settings"]["train_length"])
    if left_out:
        yield _bullets([f"**{name}** has no {listed(left, 'or')}: {why}." for (name, why), left in left_out.items()])


def _protocol_section(results: Results, protocol: str) -> str:
    settings = results["settings"]
    lengths = [
        f"{length} ({times(length, settings['train_length'])})" for length in protocol_lengths(results, protocol)
    ]
    parts = [
        f"## {protocol_title(results, protocol)}",
        _PROTOCOLS.get(protocol, "").format(stride=stride_words(results)),
    ]
    tables = (
        ("perplexity", "Perplexity per token (lower is better), in brackets its 95 % interval:", True),
        ("bits_per_byte", "Bits per byte (lower is better):", False),
    )
    for value, title, intervals in tables:
        cells = [[name, *cells] for name, cells in table_rows(results, protocol, value, intervals=intervals)]
        parts += [title, markdown_table(["model", *lengths], cells)]
    return "\n\n".join(parts)


def _cropped_note(results: Results) -> Iterator[str]:
    if any(row["context"] == "cropped" for row in results["rows"]):
        yield _WHY_CROPPED.format(train_length=results["settings"]["train_length"])


def _passkey(results: Results) -> Iterator[str]:
    if "passkey" not in results:
        return
    yield "## Passkey probe"
    yield _PASSKEY.format(cases=results["passkey"]["cases"])
    header = ["keys found", *map(str, results["passkey"]["lengths"])]
    yield markdown_table(header, [[name, *cells] for name, cells in passkey_rows(results)])
    yield "![Share of keys found by depth and length, one panel a model](passkey.png)"
    yield _bullets(passkey_statements(results))


def _position_text(results: Results) -> str:
    windows = ", ".join(
        f"{model}: {curve['windows']} windows of {curve['length']} tokens"
        for model, curve in results["position_loss"].items()
    )
    return (
        "Mean loss of the targets with a given number of tokens before them, over the non-overlapping "
        f"windows of the greatest length that it was read in ({windows}). Few windows make the first "
        "positions noisy."
    )


def _environment(results: Results) -> str:
    environment, settings, intervals = (results[part] for part in ("environment", "settings", "intervals"))
    packages = ", ".join(
        f"{name} {version}" for name, version in environment["packages"].items() if version is not None
    )
    commit = environment["git_commit"] or "not a checkout"
    resampling = _INTERVALS[intervals["unit"]].format(**intervals)
    return (
        f"Python {environment['python']}, {packages}; device: {environment['device']}; commit: {commit}. "
        f"Lengths {', '.join(map(str, settings['lengths']))}; {settings['scored_tokens']} tokens scored; "
        f"{stride_words(results)}. Intervals: {intervals['level']:.0%} percentile bootstrap, "
        f"{intervals['resamples']} resamples, {resampling}; ratios are paired, both perplexities being "
        "those of the same tokens. All numbers are in `results.json`, the perplexities in `results.csv` too."
    )


def _bullets(sentences: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
