"""What the numbers of a comparison say, in at most five sentences: made from the numbers alone, whichever way they go.

A difference counts if its paired 95 % interval leaves no choice of sign; otherwise none is shown. The sentences are
about the first converted model and the first unconverted one, in the sliding protocol; the tables hold the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..evaluation.intervals import share_difference
from ..evaluation.probe_tasks import TASKS
from ..evaluation.probes import KNOWN
from ..evaluation.protocol import FULL, OK
from .curves import Comparison, format_interval, format_value, listed, times
from .results import Results

__all__ = ["NOT_SHOWN", "findings", "price"]

NOT_SHOWN = "no difference is shown"

_BETTER, _WORSE = "better", "worse"
# With less training than this nothing is concluded: what a conversion costs still falls fast there. SmolLM2-135M cost a
# factor of 1.3 after 65,000 tokens and 1.14 after 200,000.
_FEWEST_STEPS, _FEWEST_TOKENS = 50, 100_000


def findings(results: Results) -> list[str]:
    """Sentences: the training, the price, longer than in training, against the original's best form, and the probes."""
    results = Comparison(results)
    model = next(iter([*_of_kind(results, "alibi"), *results["models"]]))
    original = next(iter(_of_kind(results, "original")), None)
    too_little = _trained_too_little(results, model)
    sentences = [_budget(results, model if too_little else None)]
    if not too_little:
        protocol = results.protocols()[0]
        sentences += _length_ratio(results, model, protocol)
        if original is not None and results["models"][model]["kind"] == "alibi":
            found = price(results, model, original, protocol)
            sentences[1:1] = [] if found is None else [found]
            sentences += _against_the_best(results, model, original, protocol)
    return [*sentences, _probes(results, model, read=not too_little)]


def _of_kind(results: Comparison, kind: str) -> list[str]:
    return [name for name, model in results["models"].items() if model["kind"] == kind]


def _trained_too_little(results: Comparison, model: str) -> bool:
    described = results["models"][model]
    training = described["training"]
    if described["kind"] != "alibi" or training is None or training["continued"]:
        return False  # of a model that was converted before this training, nothing is known of the training then
    return bool(training["steps"] < _FEWEST_STEPS or training["tokens"] < _FEWEST_TOKENS)


def _trained_alike(results: Comparison, model: str, original: str) -> bool:
    """Whether both models were trained on the same number of tokens, so that their ratio is the conversion's."""
    tokens = [(results["models"][name]["training"] or {}).get("tokens") for name in (model, original)]
    return tokens[0] is not None and tokens[0] == tokens[1]


def _budget(results: Comparison, too_little: str | None) -> str:
    """For how many steps and tokens each model was trained, and which of them `too_little` to judge by, if any."""
    parts = []
    for name, model in results["models"].items():
        training = model["training"]
        if training is None:
            parts.append(f"how long **{name}** was trained is not known")
            continue
        fitted = f", after its layers were fitted to {training['distilled']:,} tokens" if training["distilled"] else ""
        steps = f"{training['steps']:,} step{'' if training['steps'] == 1 else 's'}"
        trained = "was trained further, for" if training["continued"] else "was trained for"
        parts.append(f"**{name}** {trained} {steps} on {training['tokens']:,} tokens{fitted}")
    end = f": too little for **{too_little}** to be judged by, so nothing is concluded here" if too_little else ""
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}{end}."


class _Against(NamedTuple):
    """A comparison at one length, with the perplexities of both sides."""

    entry: Mapping[str, Any]
    own: float
    other: float

    @property
    def outcome(self) -> str:
        """On which side of 1 the whole interval of the ratio lies; lower is better."""
        if self.entry["ratio_high"] < 1:
            return _BETTER
        return _WORSE if self.entry["ratio_low"] > 1 else NOT_SHOWN

    @property
    def ratio(self) -> str:
        return format_interval(self.entry["ratio"], self.entry["ratio_low"], self.entry["ratio_high"])

    @property
    def values(self) -> str:
        return f"{format_value(self.own)} against {format_value(self.other)}"


def _comparisons(results: Comparison, model: str, protocol: str) -> Iterator[_Against]:
    """All comparisons of a model, read with its whole context, under one protocol."""
    perplexities = {
        (row["model"], row["context"], row["length"]): row["perplexity"]
        for row in results["rows"]
        if row["protocol"] == protocol
    }
    for entry in results["comparisons"]:
        if (entry["model"], entry["context"], entry["protocol"]) == (model, FULL, protocol):
            other = (entry["against_model"], entry["against_context"], entry["against_length"])
            yield _Against(entry, perplexities[model, FULL, entry["length"]], perplexities[other])


def price(results: Results, model: str, original: str, protocol: str) -> str | None:
    """What a conversion costs at the length of its training, in a sentence; None if the original does not run there."""
    results = Comparison(results)
    length = results["settings"]["train_length"]
    wanted = {"length": length, "against_length": length, "against_model": original, "against_context": FULL}
    found = next((one for one in _comparisons(results, model, protocol) if wanted.items() <= one.entry.items()), None)
    if found is None:
        return None
    meaning = {
        _BETTER: "the conversion costs nothing there",
        _WORSE: "that is the price of the conversion",
        NOT_SHOWN: f"{NOT_SHOWN}, so the conversion has no measurable price there",
    }
    reading = meaning[found.outcome]
    if _trained_too_little(results, model):
        reading = "too little training to judge by"
    elif not _trained_alike(results, model, original):
        reading = "not known to be trained alike, so not the price of the conversion alone"
    return (
        f"At {length} tokens, the length of the training, the perplexity of **{model}** is {found.ratio} times that of "
        f"**{original}** ({found.values}): {reading}."
    )


def _length_ratio(results: Comparison, model: str, protocol: str) -> Iterator[str]:
    """Compare the greatest length that a model runs at with the training length."""
    start = results["settings"]["train_length"]
    own = [
        one
        for one in _comparisons(results, model, protocol)
        if (one.entry["against_model"], one.entry["against_context"]) == (model, FULL)
    ]
    if not own:
        return
    last = max(own, key=lambda one: one.entry["length"])
    length = last.entry["length"]
    # An unconverted model was not made for the training length of the conversion.
    of_training = (
        f", {times(length, start)} the training length," if results["models"][model]["kind"] == "alibi" else ""
    )
    meaning = {
        _BETTER: "the added context helps",
        _WORSE: "the added context hurts",
        NOT_SHOWN: NOT_SHOWN,
    }
    yield (
        f"At {length} tokens{of_training} the perplexity of **{model}** is {last.ratio} times its own at {start} "
        f"({last.values}): {meaning[last.outcome]}."
    )


def _against_the_best(results: Comparison, model: str, original: str, protocol: str) -> Iterator[str]:
    """Say at which lengths a conversion beats the best form of an unconverted model, and by how much at the longest."""
    best: dict[int, _Against] = {}
    for one in _comparisons(results, model, protocol):
        length = one.entry["length"]
        if one.entry["against_model"] == original and one.entry["against_length"] == length:
            best[length] = max(best.get(length, one), one, key=lambda found: found.entry["ratio"])
    lengths = [row["length"] for row in results.curve(model, protocol, FULL) if row["status"] == OK]
    alone = [length for length in lengths if length not in best]
    by_outcome = {
        outcome: [length for length in lengths if length in best and best[length].outcome == outcome]
        for outcome in (_BETTER, _WORSE, NOT_SHOWN)
    }
    words = {_BETTER: "wins at", _WORSE: "loses at", NOT_SHOWN: "shows no difference at"}
    parts = [f"{words[outcome]} {listed(at)}" for outcome, at in by_outcome.items() if at]
    if alone:
        parts.append(f"is alone at {listed(alone)}, where **{original}** cannot run")
    forms = [results.curve_name(*pair) for pair in results.curves() if pair[0] == original and pair[1] != FULL]
    others = ", ".join(["itself", *(name.removeprefix(f"{original}, ") for name in forms)])
    last = best.get(lengths[-1])
    closing = ""
    if last is not None:
        rival = results.curve_name(original, last.entry["against_context"])
        closing = (
            f"; at {lengths[-1]} that is **{rival}**, and the perplexity of **{model}** is {last.ratio} times its "
            f"({last.values})"
        )
    advice = "" if alone else _advice(lengths, by_outcome[_BETTER])
    if not _trained_alike(results, model, original):
        advice = ""  # what training did is in the numbers
    yield (
        f"Against the best form of **{original}** at each length ({others}), **{model}** {listed(parts)}{closing}"
        f"{advice}."
    )


def _advice(lengths: Sequence[int], wins: Sequence[int]) -> str:
    """At which lengths converting pays, if it does up to the longest; nothing is said of longer ones."""
    first = next((n for n in lengths if all(later in wins for later in lengths if later >= n)), None)
    if first is None:
        return ": these numbers do not speak for converting"
    last = f" to {lengths[-1]}" if first < lengths[-1] else ""
    return f": these numbers speak for converting at {first}{last} tokens"


def _probes(results: Comparison, model: str, *, read: bool) -> str:
    """What is found of each probe at the shortest and the longest length and, if it may be `read`, what that means."""
    if "probes" not in results:
        return (
            f"Whether **{model}** finds what stands far back in its context is not known: no probe was run "
            "(`probe_cases`)."
        )
    sentences = [_probe(results, model, task, read=read) for task in results.probe_tasks()]
    if unknown := results.probe_tasks(known=False):
        tasks = listed([TASKS[task].plural for task in unknown])
        sentences.append(f"No model knows how to find {tasks} in short prompts, so none was asked in long ones.")
    return " ".join(sentences)


def _probe(results: Comparison, model: str, task: str, *, read: bool) -> str:
    rows = [
        row
        for row in results["probes"]["rows"]
        if (row["model"], row["context"], row["task"], row["depth"]) == (model, FULL, task, None)
    ]
    asked, plural = [row for row in rows if row["status"] == OK], TASKS[task].plural
    if not asked:
        return f"**{model}** was asked for {plural} at none of the lengths: {rows[0]['reason']}."
    first, last = (pick(asked, key=lambda row: row["length"]) for pick in (min, max))
    share = f"{_share(first)} at {first['length']} tokens"
    if last is not first:
        share += f" and {_share(last)} at {last['length']}"
    return f"Of {plural} **{model}** finds {share}{_probe_reading(first, last) if read else ''}."


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['found']} of {row['cases']} [{row['low']:.0%}, {row['high']:.0%}]"


def _probe_reading(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    if first["found"] < KNOWN * first["cases"]:
        return ": it does not know the task, so this says nothing about length"
    if last is first:
        return ""
    low, _ = share_difference(first["found"], first["cases"], last["found"], last["cases"])
    return ": it finds less in long contexts" if low > 0 else ": no loss with length is shown"
