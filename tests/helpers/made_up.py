"""Made-up results of a comparison, in the form that `hf-alibi extrapolate` writes, and a made-up tokenizer."""

import math
from itertools import pairwise, product

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_alibi.evaluation.intervals import wilson

PROTOCOLS = ("sliding", "non_overlapping")
WORDS = [f"w{number}" for number in range(61)]
KINDS = {"alibi": "ALiBi", "original": "p|q", "nope": "none"}


def made_up_results(lines, *, lengths, train_length=None, kinds=None, spread=0.01, labels=None, protocols=PROTOCOLS):
    """Results with these perplexities, {(model, context): one a length}, equal in all protocols; None: cannot run.

    `spread` is how far intervals of ratios reach to both sides, relatively; those of perplexities reach ten times as
    far. `kinds` gives the kind of a model that is not of that name, `labels` those of baselines.
    """
    train_length = train_length or lengths[0]
    kinds = {name: (kinds or {}).get(name, name) for name, _ in lines}
    perplexities = {
        (name, context, protocol, length): value
        for (name, context), values in lines.items()
        for protocol in protocols
        for length, value in zip(lengths, values, strict=True)
    }
    rows = [made_up_row(*key, value, spread=10 * spread) for key, value in perplexities.items()]
    subjects = [name for name, kind in kinds.items() if kind == "alibi"]
    comparisons = []
    for (first, value), (second, other) in product(perplexities.items(), repeat=2):
        within = first[:3] == second[:3] and second[3] == train_length < first[3] and first[1] != "cropped"
        between = first[:2] != second[:2] and first[2:] == second[2:] and first[0] in subjects and first[1] == "full"
        if value and other and (within or between):
            comparisons.append(made_up_comparison(first, second, value / other, spread=spread))
    described = {"source": "runs/x", "model_type": "gpt2", "attention": "sdpa", "dtype": "float32", "parameters": 12345}
    models = {
        name: {
            **described,
            "kind": kind,
            "positions": KINDS[kind],
            "position_limit": next((n for n in lengths if kind == "original"), None),
            "made_for": lengths[0],
            "training": {
                "steps": 2000,
                "tokens": 1_000_000,
                "distilled": 300_000 if kind == "alibi" else 0,
                "continued": False,
            },
            "baselines": {c: (labels or {})[c] for n, c in lines if n == name and c not in ("full", "cropped")},
            "left_out": {},
        }
        for name, kind in kinds.items()
    }
    bins = [{"first": a, "last": b - 1, "nats_per_token": 3.0, "tokens": 4} for a, b in pairwise((1, 2, 5, 33))]
    return {
        "settings": {
            "train_length": train_length,
            "lengths": lengths,
            "stride": None,
            "scored_tokens": 8192,
            "text": "some text",
            "document_bos": None,
            "window_bos": None,
        },
        "environment": {"python": "3", "device": "cpu", "git_commit": None, "packages": {"torch": "2", "x": None}},
        "intervals": {
            "level": 0.95,
            "resamples": 2000,
            "seed": 0,
            "unit": "documents",
            "units": 40,
            "documents": 40,
            "block_tokens": None,
        },
        "models": models,
        "rows": rows,
        "comparisons": comparisons,
        "position_loss": {name: {"length": lengths[-1], "windows": 2, "bins": bins} for name in models},
    }


def made_up_row(model, context, protocol, length, perplexity, *, spread):
    nats = math.log(perplexity) if perplexity else None
    return {
        "model": model,
        "protocol": protocol,
        "length": length,
        "context": context,
        "fewest_seen": length - length // 8 + 1 if protocol == "sliding" else 1,
        "most_seen": length,
        "nats_per_token": nats,
        "perplexity": perplexity,
        "bits_per_byte": nats / math.log(2) if perplexity else None,
        "tokens": 8192,
        "status": "ok" if perplexity else "cannot run",
        "reason": None if perplexity else "learned position table has 128 rows",
        "perplexity_low": perplexity / (1 + spread) if perplexity else None,
        "perplexity_high": perplexity * (1 + spread) if perplexity else None,
    }


def made_up_comparison(first, second, ratio, *, spread):
    fields = ("model", "context", "protocol", "length")
    against = {f"against_{field}": value for field, value in zip(fields, second, strict=True) if field != "protocol"}
    ends = {"ratio_low": ratio / (1 + spread), "ratio_high": ratio * (1 + spread)}
    return {**dict(zip(fields, first, strict=True)), **against, "ratio": ratio, **ends}


def with_keys(results, found, *, lengths, depths=(0.0, 1.0), cases=10, task="passkey"):
    """The same with a probe: {(model, context): keys found in each cell of a length}; None: cannot run."""
    rows = []
    for (model, context), counts in found.items():
        for length, count in zip(lengths, counts, strict=True):
            for depth in (*depths, None):
                asked = cases * (1 if depth is not None else len(depths))
                right = None if count is None else count * asked // cases
                low, high = (None, None) if right is None else wilson(right, asked)
                status = "cannot run" if right is None else "ok"
                cell = {"length": length, "depth": depth, "found": right, "cases": asked, "low": low, "high": high}
                which = {"model": model, "context": context, "task": task}
                reason = "learned position table has 128 rows" if right is None else None
                rows.append({**which, **cell, "status": status, "reason": reason})
    probe = {"lengths": list(lengths), "depths": list(depths), "cases": cases, "seed": 0, "tasks": [task]}
    return {**results, "probes": {**probe, "if_known": False, "rows": rows}}


def word_tokenizer(*, with_bos):
    """Words as tokens; like LLaMA's it begins each text with <s>, or like GPT-2's it does not."""
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **{w: i + 3 for i, w in enumerate(WORDS)}})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
