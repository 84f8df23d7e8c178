"""The report of a comparison in words and tables, made from a result file alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.probe_tasks import TASKS
from ..evaluation.probes import NOT_ASKED
from ..evaluation.protocol import CANNOT_RUN, CROPPED, NON_OVERLAPPING, OK, SLIDING
from ..utils import replacing
from .curves import (
    Comparison,
    format_interval,
    listed,
    markdown_table,
    times,
)
from .findings import findings
from .html_page import html_page
from .results import Results

__all__ = ["probe_rows", "table_rows", "write_report"]

_TITLE = "Perplexity beyond the training length"

_INTRODUCTION = (
    "The same {tokens} tokens of held-out text are scored at every length and for every model; only the context before "
    "them varies. Every token counts once and equally."
)

_PROTOCOLS = {
    SLIDING: (
        "Each token is scored with nearly the whole length before it: a window of that length moves on by {stride} "
        "and scores only the tokens that are new in it."
    ),
    NON_OVERLAPPING: (
        "Windows lie end to end and score all their tokens, the first of which have almost no context. Longer windows "
        "have fewer such tokens, so this perplexity falls with length even for a model that uses only the few tokens "
        "before each (the early-token curse)."
    ),
}

_SEEN = "tokens seen"

_CROPPED = (
    "**Cropped to {train_length}**: the same model, which reads only the last {train_length} tokens at every length. "
    "It needs no training, and these tokens hold most of what helps to predict the next one: a strong baseline."
)

_SLIDING_WINDOW = (
    "**Window of {train_length}**: the same model, which reads the whole length, but each of whose layers sees only "
    "the last {train_length} tokens."
)

_OTHER_BASELINES = (
    "**Scaled rotations and slopes**: the same weights, without training. RoPE scaling is that of transformers, by the "
    "longest length / `max_position_embeddings`; slopes are scaled by the longest length / {train_length}."
)

_INTERVALS = {
    "documents": "documents drawn with replacement, {units} of them in the scored tokens",
    "blocks": (
        "blocks of {block_tokens} neighbouring tokens drawn with replacement, {units} of them (documents in the scored "
        "tokens: {documents}, too few to draw from; blocks of one document resemble each other, so that these "
        "intervals are somewhat too narrow)"
    ),
}

_PROBES = (
    "Statements stand in filler text, and the prompt ends with a question for one of them, which is at a depth from "
    "0 % (the beginning) to 100 % (right before the question); prompt and answer are exactly as long as said. A case "
    "counts if greedy generation gives the whole answer. {cases} cases for each length and depth, the same ones for "
    "every model. In brackets: Wilson's 95 % interval.{if_known}"
)

_IF_KNOWN = (
    " A model that is right in less than half of the cases of the shortest length does not know the task and is not "
    "asked at longer ones."
)

_LIMITS = (
    "A flat perplexity curve shows that length does no harm. It is not long-context use: a model that "
    "ignored everything beyond the training length would have one as well. Whether distant facts are found "
    "takes a retrieval test.",
    "The intervals are about the choice of text: how far the numbers would move with other documents like these. The "
    "seed of the training can move them as much and is not in them: this is one run on one text. Of twenty comparisons "
    "without any difference, one on average shows one.",
    "Perplexities compare only between models with the same tokenizer; bits per byte also compare between tokenizers.",
    "Where documents are shorter than the window, the added context is other documents.",
)

_PROBE_LIMITS = {
    True: (
        "The filler of the probes repeats itself, so that what is hidden stands out: to fail says more than to pass. A "
        "model that fails in short prompts does not know the task, and its numbers say nothing about length; training "
        "on `dataset_name: probes` teaches it."
    ),
    False: "No probe was run (`probe_cases`): whether distant facts are found is not known.",
}


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write `report.md` and `report.html` of an extrapolation run into `folder`; returns both paths.

    The pictures lie beside them: `perplexity.png`, `position_loss.png`, and one by the name of each probe's task. The
    page has them inside.
    """
    results = Comparison(results)
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
    results = Comparison(results)
    for model, context in results.curves():
        cells = []
        for row in results.curve(model, protocol, context):
            ends = (row[f"{value}_low"], row[f"{value}_high"]) if intervals else (None, None)
            cells.append(format_interval(row[value], *ends) if row["status"] == OK else CANNOT_RUN)
        yield results.curve_name(model, context), cells


def probe_rows(results: Results, task: str) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each model and baseline, its name and the share of a probe that was found at each length as text."""
    results = Comparison(results)
    rows = [row for row in results["probes"]["rows"] if row["task"] == task and row["depth"] is None]
    for model, context in dict.fromkeys((row["model"], row["context"]) for row in rows):
        cells = [_share(row) for row in rows if (row["model"], row["context"]) == (model, context)]
        yield results.curve_name(model, context), cells


def _share(row: Mapping[str, Any]) -> str:
    if row["status"] != OK:
        return str(row["status"])
    return f"{row['found'] / row['cases']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"


def _sections(results: Comparison) -> Iterator[str]:
    yield f"# {_TITLE}"
    yield _compared(results)
    for protocol in results.protocols():
        yield _protocol_section(results, protocol)
    yield "![Perplexity against evaluation length, one panel a protocol](perplexity.png)"
    yield from _ratios(results)
    yield from _probes(results)
    yield "## Findings"
    yield _bullets(findings(results))
    yield "## Loss by position"
    yield _position_text(results)
    yield "![Loss against the position in the window](position_loss.png)"
    yield "## What the models and baselines are"
    yield _bullets(_definitions(results))
    yield "## What the numbers do not show"
    yield _bullets([*_LIMITS[:1], _PROBE_LIMITS["probes" in results], *_LIMITS[1:]])
    yield "## How it was run"
    yield _environment(results)


def _compared(results: Comparison) -> str:
    settings = results["settings"]
    header = ["model", "source", "type", "positions", "made for", "trained here", "attention", "dtype", "parameters"]
    cells = [
        [
            name,
            f"`{model['source']}`",
            model["model_type"],
            model["positions"],
            _made_for(results, name),
            _trained(model),
            model["attention"],
            model["dtype"],
            f"{model['parameters']:,}",
        ]
        for name, model in results["models"].items()
    ]
    introduction = _INTRODUCTION.format(tokens=f"{settings['scored_tokens']:,}")
    text = settings.get("text")
    source = f" Text: {text}." if text else ""
    train_length = (
        f" Beside each length stands how many times the {settings['train_length']} tokens it is that conversions are "
        f'trained at. The row "{_SEEN}" says how many tokens each scored token has before it in its window.'
    )
    return f"{introduction}{source}{train_length}\n\n{markdown_table(header, cells)}"


def _trained(model: Mapping[str, Any]) -> str:
    training = model["training"]
    return "not known" if training is None else f"{training['steps']:,} steps, {training['tokens']:,} tokens"


def _made_for(results: Comparison, model: str) -> str:
    """For which length a model was made, and at which a conversion was trained."""
    described = results["models"][model]
    length = described["made_for"]
    if described["kind"] != "original":
        return "any length" if length is None else f"any length, trained at {length:,}"
    return "not said" if length is None else f"{length:,} tokens"


def _ratios(results: Comparison) -> Iterator[str]:
    """A table for each converted model: its perplexity divided by that of every other line at the same length."""
    protocol = results.protocols()[0]
    entries = [
        entry
        for entry in results["comparisons"]
        if entry["protocol"] == protocol and entry["length"] == entry["against_length"]
    ]
    lengths, title = results.protocol_lengths(protocol), results.protocol_title(protocol).lower()
    for model in dict.fromkeys(entry["model"] for entry in entries):
        cells = []
        for other in results.curves():
            found = {
                entry["length"]: format_interval(entry["ratio"], entry["ratio_low"], entry["ratio_high"])
                for entry in entries
                if (entry["model"], entry["against_model"], entry["against_context"]) == (model, *other)
            }
            if found:
                cells.append([results.curve_name(*other), *(found.get(length, "-") for length in lengths)])
        yield (
            f"Perplexity of **{model}** divided by that of another model at the same length, {title} (below 1: it is "
            "better), in brackets the paired 95 % interval:"
        )
        yield markdown_table(["divided by", *map(str, lengths)], cells)


def _definitions(results: Comparison) -> Iterator[str]:
    """What each baseline is, and why a model does not have all that are made for it."""
    models, train_length = results["models"], results["settings"]["train_length"]
    if any(row["context"] == CROPPED for row in results["rows"]):
        yield _CROPPED.format(train_length=train_length)
    chosen = {baseline for model in models.values() for baseline in model["baselines"]}
    if "sliding_window" in chosen:
        yield _SLIDING_WINDOW.format(train_length=train_length)
    if chosen - {"sliding_window"}:
        yield _OTHER_BASELINES.format(train_length=train_length)
    left_out: dict[tuple[str, str], list[str]] = {}
    for name, model in models.items():
        for baseline, reason in model["left_out"].items():
            left_out.setdefault((name, reason), []).append(f"`{baseline}`")
    for (name, why), left in left_out.items():
        yield f"**{name}** has no {listed(left, 'or')}: {why}."
    yield f"**Beginning of sequence**: {_bos(results)}"


def _bos(results: Comparison) -> str:
    settings = results["settings"]
    documents, windows = (settings[name] for name in ("document_bos", "window_bos"))
    parts = [
        f"every document begins with `{documents}`"
        if documents
        else "documents do not begin with a beginning-of-sequence token",
        f"every window begins with `{windows}`, in place of its oldest token" if windows else "nor does any window",
    ]
    if documents and not windows:
        parts[1] = "windows begin in the middle of documents, without one"
    if windows and not documents:
        parts[0] = "documents do not begin with one"
    return "; ".join(parts) + ". End-of-sequence tokens stand between documents; all tokens of the stream are scored."


def _protocol_section(results: Comparison, protocol: str) -> str:
    settings = results["settings"]
    lengths = [f"{length} ({times(length, settings['train_length'])})" for length in results.protocol_lengths(protocol)]
    parts = [
        f"## {results.protocol_title(protocol)}",
        _PROTOCOLS.get(protocol, "").format(stride=results.stride_words()),
    ]
    tables = (
        ("perplexity", "Perplexity per token (lower is better), in brackets its 95 % interval:", True),
        ("bits_per_byte", "Bits per byte (lower is better):", False),
    )
    for value, title, intervals in tables:
        cells = [[name, *cells] for name, cells in table_rows(results, protocol, value, intervals=intervals)]
        rows = [[_SEEN, *results.tokens_seen(protocol)], *cells]
        parts += [title, markdown_table(["model", *lengths], rows)]
    return "\n\n".join(parts)


def _probes(results: Comparison) -> Iterator[str]:
    if "probes" not in results:
        return
    probe = results["probes"]
    yield "## Probes"
    yield _PROBES.format(cases=probe["cases"], if_known=_IF_KNOWN if probe["if_known"] else "")
    for task in results.probe_tasks():
        plural = TASKS[task].plural.capitalize()
        yield f"**{plural}**: the prompt asks {TASKS[task].asks}."
        header = [f"{plural.lower()} found", *map(str, probe["lengths"])]
        yield markdown_table(header, [[name, *cells] for name, cells in probe_rows(results, task)])
        if reasons := _bullets(list(_reasons(results, task))):
            yield reasons
        yield f"![{plural} found by depth and length, one panel a model]({task}.png)"
    if unknown := results.probe_tasks(known=False):
        yield f"No model knows these tasks: {listed([TASKS[task].plural for task in unknown])}."
        yield _bullets([reason for task in unknown for reason in _reasons(results, task)])


def _reasons(results: Comparison, task: str) -> Iterator[str]:
    """Why models were not asked."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in results["probes"]["rows"]:
        if (row["task"], row["depth"], row["status"]) == (task, None, NOT_ASKED):
            name = results.curve_name(row["model"], row["context"])
            found.setdefault((name, row["reason"]), []).append(row["length"])
    for (name, reason), lengths in found.items():
        yield f"{name} was not asked for {TASKS[task].plural} at {listed(lengths)} tokens: {reason}."


def _position_text(results: Comparison) -> str:
    windows = ", ".join(
        f"{model}: {curve['windows']} window{'' if curve['windows'] == 1 else 's'} of {curve['length']} tokens"
        for model, curve in results["position_loss"].items()
    )
    return (
        "Mean loss of the tokens that have a given number of tokens before them, in the longest non-overlapping "
        f"windows ({windows}). Few windows make the first positions noisy."
    )


def _environment(results: Comparison) -> str:
    environment, settings, intervals = (results[part] for part in ("environment", "settings", "intervals"))
    packages = ", ".join(
        f"{name} {version}" for name, version in environment["packages"].items() if version is not None
    )
    commit = environment["git_commit"] or "not a checkout"
    resampling = _INTERVALS[intervals["unit"]].format(**intervals)
    return (
        f"Python {environment['python']}, {packages}; device: {environment['device']}; commit: {commit}. "
        f"Lengths {', '.join(map(str, settings['lengths']))}; {settings['scored_tokens']} tokens scored; "
        f"stride {results.stride_words()}. Intervals: {intervals['level']:.0%} percentile bootstrap, "
        f"{intervals['resamples']} resamples, {resampling}; ratios are paired, both perplexities being "
        "those of the same tokens. All numbers are in `results.json`, the perplexities also in `results.csv`."
    )


def _bullets(sentences: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
