"""Every protocol and baseline against brute force: for each scored token one pass of a float64 LLaMA written here.

No code of the package is used for what is expected: which tokens a target sees, rotations with their scalings, windows,
slopes and the beginning-of-sequence token are all written from their definitions.
"""

import json
import math

import pytest
import torch

import hf_alibi
from helpers.made_up import WORDS, word_tokenizer
from helpers.models import stock_model
from helpers.reference import attention, slopes
from helpers.runs import config_file, save
from hf_alibi.commands.extrapolate import extrapolate

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS, TRAIN_LENGTH, SCORED, KNOWN = (16, 32, 64), 16, 64, 32
BOS, EOS = 1, 2


def documents():
    """Six documents of words at random."""
    drawn = torch.Generator().manual_seed(5)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=drawn).tolist())
        for size in (70, 40, 90, 50, 60, 80)
    ]


def frequencies(width, kind, length):
    """Radians a token for each pair of dimensions, and the factor of cosine and sine."""
    pairs = torch.arange(width // 2, dtype=torch.float64)
    base, factor = 10000.0, max(LENGTHS) / KNOWN
    if kind == "rope_dynamic" and length > KNOWN:  # NTK-aware, for the length that is read
        base *= (factor * length / KNOWN - (factor - 1)) ** (width / (width - 2))
    plain = base ** (-2 * pairs / width)
    if kind == "rope_linear":
        return plain / factor, 1.0
    if kind == "rope_yarn":  # Peng et al. 2023, section 3.2, with beta 32 and 1

        def pair_with(turns):
            return width * math.log(KNOWN / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(pair_with(32)), 0), min(math.ceil(pair_with(1)), width - 1)
        scaled = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
        return plain / factor * scaled + plain * (1 - scaled), 0.1 * math.log(factor) + 1
    return plain, 1.0


def rotate(x, angles, factor):
    cosine, sine = (torch.cat([f(angles)] * 2, dim=-1) * factor for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def slopes_of(kind):
    """The paper's slopes of four heads, scaled."""
    plain, factor = slopes(4), max(LENGTHS) / TRAIN_LENGTH
    if kind == "alibi_linear":
        return plain / factor
    if kind == "alibi_ntk":
        return plain / factor ** (torch.arange(4, dtype=torch.float64) / 3)
    return plain


def next_logits(w, ids, *, alibi, kind, length):
    """float64 (vocabulary,): what a LLaMA with these weights predicts after `ids`, in a window of `length`."""
    count, width = len(ids), 8
    norm = lambda x, weight: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight  # noqa: E731
    position = torch.arange(count)
    distance = position[:, None] - position
    seen = (distance >= 0) & ((distance < TRAIN_LENGTH) | (kind != "sliding_window"))
    head_slopes = slopes_of(kind) if alibi else torch.zeros(4)
    speed, factor = frequencies(width, kind, length)
    angles = position[:, None].double() * speed
    x = w["model.embed_tokens.weight"][ids]
    for layer in ("model.layers.0.", "model.layers.1."):
        h = norm(x, w[layer + "input_layernorm.weight"])
        q, k, v = (
            (h @ w[f"{layer}self_attn.{n}_proj.weight"].T).view(1, count, -1, width).transpose(1, 2) for n in "qkv"
        )
        if not alibi:
            q, k = rotate(q, angles, factor), rotate(k, angles, factor)
        mixed = attention(q, k, v, seen[None], position[None], head_slopes, width**-0.5)[0]
        x = x + mixed.transpose(0, 1).flatten(1) @ w[layer + "self_attn.o_proj.weight"].T
        h = norm(x, w[layer + "post_attention_layernorm.weight"])
        gate = h @ w[layer + "mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ w[layer + "mlp.up_proj.weight"].T)) @ w[layer + "mlp.down_proj.weight"].T
    return norm(x[-1], w["model.norm.weight"]) @ w["lm_head.weight"].T


def brute_force(w, stream, *, protocol, length, context, alibi, stride, bos):
    """Mean nats of the scored tokens and the fewest and most tokens that one of them sees."""
    read = min(length, TRAIN_LENGTH) if context == "cropped" else length
    stride = stride or read // 8
    first, losses, seen = len(stream) - SCORED, [], []
    for target in range(first, len(stream)):
        new = stride if protocol == "sliding" else read
        last = min(first + ((target - first) // new + 1) * new, len(stream)) - 1  # the last target of its window
        ids = stream[last - read : target].clone()
        seen.append(len(ids))
        if bos:
            ids[0] = BOS
        logits = next_logits(w, ids, alibi=alibi, kind=context, length=read)
        losses.append(logits.logsumexp(-1) - logits[stream[target]])
    return float(torch.stack(losses).mean()), min(seen), max(seen)


@pytest.fixture
def run(tmp_path):
    """Save a LLaMA, its conversion and a text, and compare them; returns results, stream of tokens and weights."""

    def compare(*, with_bos=False, **settings):
        tokenizer = word_tokenizer(with_bos=with_bos)
        options = {"vocab_size": 64, "initializer_range": 0.3, "max_position_embeddings": KNOWN}
        original, alibi = (stock_model("llama", **options) for _ in range(2))
        weights = {name: value.double() for name, value in original.state_dict().items()}
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents()))
        config = {
            "models": {
                "alibi": save(hf_alibi.apply_alibi(alibi), tmp_path / "alibi", tokenizer),
                "original": save(original, tmp_path / "original", tokenizer),
            },
            "train_length": TRAIN_LENGTH,
            "lengths": list(LENGTHS),
            "scored_tokens": SCORED,
            "train_file": [str(text)],
            "validation_fraction": 0.5,
            "output_dir": str(tmp_path / "out"),
            **settings,
        }
        return extrapolate(config_file(config, tmp_path / "run.yaml")), weights

    return compare


def stream_of(*, document_bos):
    """The held-out half of the tokens."""
    start = [BOS] if document_bos else []
    ids = [i for text in documents() for i in [*start, *(WORDS.index(word) + 3 for word in text.split()), EOS]]
    return torch.tensor(ids[len(ids) - int(len(ids) * 0.5) :])


def check(rows, weights, stream, *, stride=None, bos=False):
    assert rows
    for row in rows:
        wanted = {name: row[name] for name in ("protocol", "length", "context")}
        nats, fewest, most = brute_force(
            weights, stream, **wanted, alibi=row["model"] == "alibi", stride=stride, bos=bos
        )
        assert row["nats_per_token"] == pytest.approx(nats, abs=2e-6), wanted
        assert row["perplexity"] == pytest.approx(math.exp(nats), rel=2e-6), wanted
        assert (row["fewest_seen"], row["most_seen"]) == (fewest, most), wanted
        assert row["tokens"] == SCORED


def test_every_protocol_and_baseline_is_that_of_brute_force(run):
    results, weights = run(baselines=["all"])
    contexts = {(row["model"], row["context"]) for row in results["rows"]}
    assert contexts == {
        *(("alibi", context) for context in ("full", "alibi_linear", "alibi_ntk")),
        *(("original", context) for context in ("full", "cropped", "sliding_window")),
        *(("original", context) for context in ("rope_linear", "rope_dynamic", "rope_yarn")),
    }
    assert len(results["rows"]) == 9 * 2 * len(LENGTHS)
    check(results["rows"], weights, stream_of(document_bos=False))
    # The numbers differ, or equal ones would prove nothing.
    at_64 = [round(row["nats_per_token"], 5) for row in results["rows"] if row["length"] == 64]
    assert len(set(at_64)) == len(at_64)


def test_a_given_stride_is_that_of_brute_force(run):
    results, weights = run(stride=1)
    check(results["rows"], weights, stream_of(document_bos=False), stride=1)
    assert {r["fewest_seen"] for r in results["rows"] if r["protocol"] == "sliding" and r["length"] == 64} == {16, 64}


@pytest.mark.parametrize(
    ("settings", "document_bos", "window_bos"),
    [
        ({"with_bos": True}, True, True),
        ({"with_bos": True, "window_bos": False}, True, False),
        ({"with_bos": True, "document_bos": False}, False, False),
        ({"with_bos": False, "document_bos": True}, True, True),
        ({"with_bos": False, "window_bos": True}, False, True),
    ],
)
def test_the_beginning_of_sequence_is_where_the_settings_say(run, settings, document_bos, window_bos):
    results, weights = run(**settings)
    told = [results["settings"][name] for name in ("document_bos", "window_bos")]
    assert told == ["<s>" if each else None for each in (document_bos, window_bos)]
    check(results["rows"], weights, stream_of(document_bos=document_bos), bos=window_bos)
