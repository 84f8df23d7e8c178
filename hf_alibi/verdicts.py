"""What the numbers of a comparison say in words: made from the numbers alone, whichever way they go.

A difference counts where its paired 95 % interval leaves it no choice of sign; otherwise none is shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .intervals import share_difference
from .lines import (
    format_interval,
    format_value,
    line,
    line_name,
    lines,
    listed,
    protocol_title,
    protocols,
    times,
)
from .results import Results

__all__ = ["NOT_SHOWN", "in_short", "passkey_statements", "statements"]

NOT_SHOWN = "no difference shown"

_BETTER, _WORSE = "better", "worse"
# Below this share of keys found at the shortest length, a probe says that the model does not know the task.
_KNOWS_THE_TASK = 0.5

# What a ratio of perplexities below and above 1 means under each protocol.
_READINGS = {
    "sliding": ("the added context helps", "the added context hurts"),
    "non_overlapping": ("it falls, as it does where fewer targets lack context", "the added context hurts"),
}


def in_short(results: Results) -> Iterator[str]:
    """Yield, for each converted model: longer than in training, against each unconverted model, and the passkeys."""
    protocol = protocols(results)[0]
    for model in _of_kind(results, "alibi"):
        yield from _length_ratio(results, model, protocol)
        for other in _of_kind(results, "original"):
            yield _break_even(results, model, other, protocol)
        yield from _passkey(results, model, "full")
    if "passkey" not in results:
        yield (
            "The passkey probe was not run (`passkey_cases` is 0), so nothing here says whether a model finds what "
            "stands far back in its context."
        )


def statements(results: Results) -> Iterator[str]:
    """Yield sentences on every model and protocol: longer than in training, and each comparison at the same length."""
    for model in results["models"]:
        yield from _cannot_run(results, model)
        for protocol in protocols(results):
            yield from _length_ratio(results, model, protocol)
    for protocol in protocols(results):
        for model in _subjects(results):
            for other in lines(results):
                if other != (model, "full"):
                    yield from _against(results, model, other, protocol)


def passkey_statements(results: Results) -> Iterator[str]:
    """Yield a sentence for each model and baseline that was asked for keys."""
    for model, context in dict.fromkeys((row["model"], row["context"]) for row in results["passkey"]["rows"]):
        yield from _passkey(results, model, context)


def _of_kind(results: Results, kind: str) -> list[str]:
    return [name for name, model in results["models"].items() if model["kind"] == kind]


def _subjects(results: Results) -> list[str]:
    """The models that are compared with all others."""
    return list(dict.fromkeys(entry["model"] for entry in results["comparisons"] if not _within_line(entry)))


def _within_line(entry: Mapping[str, Any]) -> bool:
    return (entry["model"], entry["context"]) == (entry["against_model"], entry["against_context"])


def _outcome(entry: Mapping[str, Any]) -> str:
    """On which side of 1 the whole interval of a ratio of perplexities lies; lower is better."""
    if entry["ratio_high"] < 1:
        return _BETTER
    return _WORSE if entry["ratio_low"] > 1 else NOT_SHOWN


def _ratio(entry: Mapping[str, Any]) -> str:
    return format_interval(entry["ratio"], entry["ratio_low"], entry["ratio_high"])


def _cannot_run(results: Results, model: str) -> Iterator[str]:
    stopped = [row for row in line(results, model, protocols(results)[0], "full") if row["status"] != "ok"]
    if not stopped:
        return
    reason = stopped[0]["status"].removeprefix("cannot run: ")
    limit = results["models"][model].get("position_limit")
    where = f" past {limit} tokens" if limit else ""
    missing = ", ".join(str(row["length"]) for row in stopped)
    yield f"**{model}** cannot run{where} ({reason}): it has no value at {missing}."


def _length_ratio(results: Results, model: str, protocol: str) -> Iterator[str]:
    """Compare the greatest length that a model runs at with the training length."""
    train_length = results["settings"]["train_length"]
    longer = [
        entry
        for entry in results["comparisons"]
        if _within_line(entry) and (entry["model"], entry["context"], entry["protocol"]) == (model, "full", protocol)
    ]
    if not longer:
        return
    last = max(longer, key=lambda entry: entry["length"])
    perplexities = {row["length"]: row["perplexity"] for row in line(results, model, protocol, "full")}
    helps, hurts = _READINGS.get(protocol, ("lower", "higher"))
    words = {
        _BETTER: f"below it: {helps} (better)",
        _WORSE: f"above it: {hurts} (worse)",
        NOT_SHOWN: f"equal as far as these tokens can tell: {NOT_SHOWN}",
    }
    yield (
        f"**{model}**, {protocol_title(results, protocol).lower()}: perplexity at {last['length']} tokens, "
        f"{times(last['length'], train_length)} the training length, is {_ratio(last)} times that at {train_length} "
        f"({format_value(perplexities[last['length']])} against {format_value(perplexities[train_length])}), "
        f"{words[_outcome(last)]}."
    )


def _same_length(results: Results, model: str, other: tuple[str, str], protocol: str) -> dict[int, Mapping[str, Any]]:
    """Comparisons of a model with another line, by length, where both run."""
    found = {
        entry["length"]: entry
        for entry in results["comparisons"]
        if (entry["model"], entry["protocol"]) == (model, protocol)
        and (entry["against_model"], entry["against_context"]) == other
        and entry["length"] == entry["against_length"]
    }
    return dict(sorted(found.items()))


def _against(results: Results, model: str, other: tuple[str, str], protocol: str) -> Iterator[str]:
    """Say at which lengths a model wins, loses, or neither, and by how much at the greatest where both run."""
    found = _same_length(results, model, other, protocol)
    if not found:
        return
    outcomes = {length: _outcome(entry) for length, entry in found.items()}
    words = []
    for outcome, verb in ((_BETTER, "wins at"), (_WORSE, "loses at"), (NOT_SHOWN, f"{NOT_SHOWN} at")):
        lengths = [length for length, each in outcomes.items() if each == outcome]
        if lengths:
            words.append(f"{verb} {listed(lengths)}")
    last = max(found)
    own, others = (
        {row["length"]: row["perplexity"] for row in line(results, *name)}
        for name in ((model, protocol, "full"), (other[0], protocol, other[1]))
    )
    yield (
        f"**{model}** against **{line_name(results, *other)}**, {protocol_title(results, protocol).lower()}: "
        f"{'; '.join(words)}. At {last} tokens its perplexity is {_ratio(found[last])} times the other's "
        f"({format_value(own[last])} against {format_value(others[last])})."
    )


def _break_even(results: Results, model: str, other: str, protocol: str) -> str:
    """Say from which length on a converted model is better than an unconverted one in each of its forms."""
    rivals = [pair for pair in lines(results) if pair[0] == other]
    against = [_same_length(results, model, rival, protocol) for rival in rivals]
    lengths = [row["length"] for row in line(results, model, protocol, "full") if row["status"] == "ok"]
    # Where nothing of the other runs, there is nothing to be better than: all() holds, and a sentence says so.
    wins = [n for n in lengths if all(_outcome(found[n]) == _BETTER for found in against if n in found)]
    alone = [n for n in lengths if not any(n in found for found in against)]
    names = f"**{other}**{_with_baselines(results, rivals)}"
    first = _from_on(lengths, wins)
    parts = [_where(model, names, lengths, wins, first)]
    itself = against[rivals.index((other, "full"))]
    unaided = _from_on(lengths, [n for n, entry in itself.items() if _outcome(entry) == _BETTER])
    if first is None and unaided is not None:
        parts.append(
            f"It is better than **{other}** itself from {unaided} tokens on: where none of the others can be used, "
            f"convert for contexts of {unaided} tokens and more."
        )
    if alone:
        parts.append(f"At {listed(alone)} **{model}** is alone: **{other}** cannot run there.")
    best = _closest(results, rivals, against, lengths[-1])
    return " ".join([*parts, *best])


def _with_baselines(results: Results, rivals: Sequence[tuple[str, str]]) -> str:
    labels = [line_name(results, *rival).removeprefix(f"{rival[0]}, ") for rival in rivals if rival[1] != "full"]
    return f" and all its baselines ({', '.join(labels)})" if labels else ""


def _where(model: str, names: str, lengths: Sequence[int], wins: Sequence[int], first: int | None) -> str:
    """That a model wins from the length `first` on to the end, or at which `wins` alone."""
    if first is not None and first == lengths[0]:
        return (
            f"**{model}** is better than {names} at every length evaluated, from {lengths[0]} tokens on: on this text "
            "converting pays at any of these contexts."
        )
    if first is not None:
        before = max(n for n in lengths if n < first)
        return (
            f"From {first} tokens on, **{model}** is better than {names}; at {before}, the length before, it is not: "
            f"convert for contexts beyond {before} tokens."
        )
    if wins:
        return (
            f"**{model}** is better than {names} at {listed(wins)} only and not at the longest: there is no context "
            "beyond which these numbers speak for converting."
        )
    return f"**{model}** is nowhere better than {names} on this text: these numbers do not speak for converting."


def _from_on(lengths: Sequence[int], wins: Sequence[int]) -> int | None:
    """The length from which on all `lengths` are wins; None where the longest is none."""
    return next((n for n in lengths if all(later in wins for later in lengths if later >= n)), None)


def _closest(
    results: Results,
    rivals: Sequence[tuple[str, str]],
    against: Sequence[Mapping[int, Mapping[str, Any]]],
    longest: int,
) -> Iterator[str]:
    """Name the rival with the lowest perplexity at the longest length."""
    running = [(found[longest], rival) for found, rival in zip(against, rivals, strict=True) if longest in found]
    if not running:
        return
    entry, rival = max(running, key=lambda pair: pair[0]["ratio"])
    yield (
        f"The strongest of these at {longest} is **{line_name(results, *rival)}**: perplexity of **{entry['model']}** "
        f"is {_ratio(entry)} times its."
    )


def _passkey(results: Results, model: str, context: str) -> Iterator[str]:
    """Say how many keys are found at the shortest and at the longest length, and what a low start means."""
    rows = [
        row
        for row in results.get("passkey", {}).get("rows", [])
        if (row["model"], row["context"], row["depth"], row["status"]) == (model, context, None, "ok")
    ]
    if not rows:
        return
    first, last = (pick(rows, key=lambda row: row["length"]) for pick in (min, max))
    share = f"{_share(first)} at {first['length']} tokens"
    if last is not first:
        share += f", {_share(last)} at {last['length']}"
    name = line_name(results, model, context)
    yield f"**{name}**, passkey probe: found {share}{_passkey_reading(first, last)}"


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['found']} of {row['cases']} keys [{row['low']:.0%}, {row['high']:.0%}]"


def _passkey_reading(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    if first["found"] < _KNOWS_THE_TASK * first["cases"]:
        return (
            ". A model that misses most keys in the shortest prompts does not know the task: this says nothing about "
            "length."
        )
    if last is first:
        return "."
    low, _ = share_difference(first["found"], first["cases"], last["found"], last["cases"])
    if low > 0:
        return ": it finds less where the context is long."
    return ": no loss with length is shown."
