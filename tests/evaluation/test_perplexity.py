"""Perplexity at lengths, against a loop that scores one token at a time from its own context in float64."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from helpers.models import VOCABULARY, stock_model, tokens
from helpers.runs import refused
from hf_alibi.evaluation import memory
from hf_alibi.evaluation import perplexity as evaluation
from hf_alibi.evaluation.memory import check_memory, peak_bytes
from hf_alibi.evaluation.perplexity import PositionLoss, evaluate_extrapolation, window_losses
from hf_alibi.evaluation.protocol import NON_OVERLAPPING, SLIDING, Protocol

LENGTHS = (8, 16, 32)
PROTOCOL = {"lengths": LENGTHS, "train_length": 8, "scored_tokens": 64, "stride": None}
STREAM = tokens(110)


@pytest.fixture
def llama():
    return stock_model("llama")


def windows_of(kind, num_tokens, *, length, scored_tokens, stride=None):
    return Protocol([length], length, scored_tokens, stride).windows(kind, length, num_tokens)


def run(model, stream=STREAM, **changes):
    return evaluate_extrapolation(model, stream, **{**PROTOCOL, "progress": False, **changes})


def value(result, protocol, length, context="full", field="nats_per_token"):
    (row,) = [r for r in result.rows if (r.protocol, r.length, r.context) == (protocol, length, context)]
    return getattr(row, field)


def context_start(protocol, target, *, total, length, scored, stride):
    """First token that a target sees, from the definitions of the protocols."""
    first = total - scored
    if protocol == NON_OVERLAPPING:
        return first + (target - first) // length * length - 1
    stride = stride or length // 8
    chunk_end = min(first + ((target - first) // stride + 1) * stride, total)
    return chunk_end - 1 - length


@torch.no_grad()
def naive_losses(model, protocol, length, *, scored=64, stride=None):
    """Nats of each scored token, every one from a forward pass over exactly its own context, in float64."""
    model = model.double().eval()
    losses = []
    for target in range(len(STREAM) - scored, len(STREAM)):
        start = context_start(protocol, target, total=len(STREAM), length=length, scored=scored, stride=stride)
        logits = model(input_ids=STREAM[None, start:target], use_cache=False).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[STREAM[target]])
    model.float()
    return torch.stack(losses)


def naive_mean(*args, **kwargs):
    return pytest.approx(float(naive_losses(*args, **kwargs).mean()), abs=1e-6)


def lookup_model(shift: int):
    """A GPT-2 whose prediction is its newest input plus ``shift``, and nothing else."""
    model = stock_model("gpt2", heads=8, tie_word_embeddings=False, n_positions=64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(VOCABULARY))
        model.lm_head.weight.copy_(50 * torch.eye(VOCABULARY).roll(shift, 0))
    return model


@pytest.mark.parametrize("protocol", [SLIDING, NON_OVERLAPPING])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_a_loop_over_single_tokens(family, protocol, length):
    model = stock_model(family)
    assert value(run(model), protocol, length) == naive_mean(model, protocol, length)


def test_losses_of_single_tokens_equal_the_loop_in_order(llama):
    windows = windows_of(SLIDING, 110, length=16, scored_tokens=64, stride=5)
    expected = naive_losses(llama, SLIDING, 16, stride=5)
    for batch in (1, 3, 100):
        for sliced in (True, False):
            with torch.no_grad():
                losses = window_losses(llama, STREAM, windows, batch=batch, sliced_logits=sliced)
            assert losses.dtype == torch.float32
            torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)


def test_logits_are_made_in_slices_that_lose_nothing(llama, monkeypatch):
    widest = []
    llama.lm_head.register_forward_pre_hook(lambda module, args: widest.append(args[0].shape[-2]))
    expected = run(llama)
    assert max(widest) > 7
    monkeypatch.setattr(memory, "LOGITS_SLICE", 7)
    monkeypatch.setattr(evaluation, "_logits_follow_from_hidden_states", lambda *_: True)
    widest.clear()
    for row, wanted in zip(run(llama).rows, expected.rows, strict=True):
        assert row.nats_per_token == pytest.approx(wanted.nats_per_token, abs=1e-6)
    assert max(widest) == 7


def test_the_next_token_is_the_target_and_the_newest_input_is_not():
    stream = torch.arange(200) % VOCABULARY
    successor, copier = run(lookup_model(1), stream), run(lookup_model(0), stream)
    for right, wrong in zip(successor.rows, copier.rows, strict=True):
        assert right.perplexity == pytest.approx(1.0, abs=1e-4)
        assert wrong.nats_per_token > 10


@given(data=st.data())
def test_every_scored_token_is_a_target_once_at_every_length(data):
    length = data.draw(st.integers(1, 40))
    stride = data.draw(st.integers(1, length))  # of windows; `Protocol.check` allows less
    scored = length * data.draw(st.integers(1, 5))
    total = scored + length + data.draw(st.integers(0, 9))
    options = {"length": length, "scored_tokens": scored, "stride": stride}
    for windows in (windows_of(SLIDING, total, **options), windows_of(NON_OVERLAPPING, total, **options)):
        targets = [target for w in windows for target in range(w.first_target, w.first_target + w.num_targets)]
        assert targets == list(range(total - scored, total))
        assert min(w.start for w in windows) >= 0
        assert all(w.start + w.length < total for w in windows)
    for window in windows_of(SLIDING, total, **options):
        assert length - stride + 1 <= window.first_target - window.start <= length
    for window in windows_of(NON_OVERLAPPING, total, **options):
        assert window.first_target - window.start == 1


def test_the_stride_is_an_eighth_of_each_length_or_the_one_given(llama):
    found, given = run(llama), run(llama, stride=1)
    for length, stride, result in ((8, 1, found), (16, 2, found), (32, 4, found), (32, 1, given)):
        assert value(result, SLIDING, length) == naive_mean(llama, SLIDING, length, stride=stride)
        assert value(result, SLIDING, length, field="fewest_seen") == length - stride + 1
        assert value(result, SLIDING, length, field="most_seen") == length


def test_the_first_input_of_each_window_can_be_the_beginning_of_sequence(llama):
    windows = windows_of(SLIDING, 110, length=16, scored_tokens=64, stride=2)
    given = []
    llama.model.embed_tokens.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    with torch.no_grad():
        window_losses(llama, STREAM, windows, bos_token_id=1, batch=5)
    ids = torch.cat(given)
    assert (ids[:, 0] == 1).all()
    assert torch.equal(ids[:, 1:], torch.stack([STREAM[w.start + 1 : w.start + 16] for w in windows]))
    assert not (STREAM == 1).any()


def test_windows_longer_than_what_is_scored_only_slide(llama):
    found = run(llama, scored_tokens=16)
    assert [row.length for row in found.rows if row.protocol == NON_OVERLAPPING] == [8, 16]
    assert value(found, SLIDING, 32) == naive_mean(llama, SLIDING, 32, scored=16)
    assert found.position_loss.length == 16


def test_a_stride_of_the_length_makes_the_protocols_one():
    options = {"length": 16, "scored_tokens": 64, "stride": 16}
    assert windows_of(SLIDING, 100, **options) == windows_of(NON_OVERLAPPING, 100, **options)


def test_only_the_context_changes_with_the_length(llama):
    """Tokens before the longest context do not count; the last scored token does, at every length."""
    stream = tokens(200)
    before = run(llama, stream)
    far, last = stream.clone(), stream.clone()
    far[: 200 - 64 - 32] = 5
    last[-1] = (last[-1] + 1) % VOCABULARY
    assert run(llama, far).rows == before.rows
    assert all(a.nats_per_token != b.nats_per_token for a, b in zip(run(llama, last).rows, before.rows, strict=True))


def test_perplexity_and_bits_per_byte_follow_from_the_nats():
    model = stock_model("gpt2")
    for row in run(model, num_bytes=150).rows:
        assert row.perplexity == pytest.approx(math.exp(row.nats_per_token))
        assert row.bits_per_byte == pytest.approx(row.nats_per_token * 64 / math.log(2) / 150)
        assert (row.tokens, row.status) == (64, "ok")
    assert all(row.bits_per_byte is None for row in run(model).rows)


def test_a_learned_table_ends_in_rows_that_say_so():
    result = run(stock_model("gpt2", n_positions=16), cropped=True)
    for protocol in (SLIDING, NON_OVERLAPPING):
        assert value(result, protocol, 16, field="status") == "ok"
        fields = ("status", "reason", "nats_per_token", "perplexity", "bits_per_byte")
        beyond = [value(result, protocol, 32, field=field) for field in fields]
        assert beyond == ["cannot run", "learned position table has 16 rows", None, None, None]
    assert result.position_loss.length == 16
    assert len(result.rows) == 2 * 2 * len(LENGTHS)


def test_a_model_that_runs_at_no_length_still_has_its_rows():
    result = run(stock_model("gpt2", n_positions=4))
    assert [row.perplexity for row in result.rows] == [None] * 6
    assert result.position_loss is None


def test_cropped_baseline_stays_at_the_training_length(llama):
    result = run(llama, cropped=True, train_length=16)
    for protocol in (SLIDING, NON_OVERLAPPING):
        full = {length: value(result, protocol, length) for length in LENGTHS}
        cropped = [value(result, protocol, length, "cropped") for length in LENGTHS]
        assert cropped == [full[8], full[16], full[16]]
        assert full[32] != full[16]
    assert not any(row.context == "cropped" for row in run(llama).rows)


def test_loss_by_position_is_that_of_the_longest_non_overlapping_windows(llama):
    found = run(llama).position_loss
    expected = naive_losses(llama, NON_OVERLAPPING, 32).view(2, 32).mean(0)
    assert (found.length, found.windows) == (32, 2)
    torch.testing.assert_close(torch.tensor(found.nats, dtype=torch.float64), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 1000])
def test_bins_cover_every_position_once_and_keep_the_mean(length):
    nats = torch.rand(length, dtype=torch.float64).tolist()
    bins = PositionLoss(length, 3, nats).bins()
    assert [p for b in bins for p in range(b.first, b.last + 1)] == list(range(1, length + 1))
    assert sum(b.tokens for b in bins) == 3 * length
    total = sum(b.nats_per_token * b.tokens for b in bins)
    assert total / (3 * length) == pytest.approx(sum(nats) / length)


def llama_whose_logits(change, **options):
    """A LLaMA whose logits are not just the output embeddings of the hidden states."""

    class ChangedLlama(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    return ChangedLlama(stock_model("llama", **options).config).eval()


def test_scaled_logits_are_not_bypassed():
    scaled = llama_whose_logits(lambda logits: 0.5 * logits)
    assert value(run(scaled), SLIDING, 16) == naive_mean(scaled, SLIDING, 16)


@torch.inference_mode()
def test_softly_capped_logits_are_noticed_even_where_they_are_small(llama):
    capped = llama_whose_logits(lambda logits: 30 * torch.tanh(logits / 30), initializer_range=0.02)
    assert not evaluation._logits_follow_from_hidden_states(capped, tokens(20))
    assert evaluation._logits_follow_from_hidden_states(llama, tokens(20))


def test_runs_in_evaluation_mode_and_gives_every_module_its_mode_back():
    model = stock_model("gpt2", resid_pdrop=0.5)
    expected = run(model)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert run(model).rows == expected.rows
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_too_little_memory_is_said_before_any_long_pass(monkeypatch):
    lengths_seen = []
    model = stock_model("llama", attn_implementation="eager")
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths_seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(memory, "_available_bytes", lambda device: 1000)
    with refused(r"length 32 needs about .* shorter lengths or attn_implementation sdpa"):
        run(model)
    assert max(lengths_seen) <= 16


def test_estimate_counts_quadratic_scores_for_eager_only():
    sizes = {"batch": 1, "dtype": torch.float32}
    eager, sdpa = (stock_model("llama", attn_implementation=name).config for name in ("eager", "sdpa"))
    scores = 4 * 4096**2 * 12
    assert peak_bytes(eager, length=4096, **sizes) - peak_bytes(sdpa, length=4096, **sizes) == scores
    whole = peak_bytes(sdpa, length=4096, sliced_logits=False, **sizes)
    assert whole - peak_bytes(sdpa, length=4096, **sizes) == (4096 - 1024) * VOCABULARY * 12


def test_weights_still_to_be_loaded_count(llama, monkeypatch):
    monkeypatch.setattr(memory, "_available_bytes", lambda device: 2**30)
    options = {"length": 32, "batch": 1, "dtype": torch.float32, "device": torch.device("cpu")}
    check_memory(llama.config, **options)
    with refused(r"needs about 1\.0 GiB and 1\.0 GiB"):
        check_memory(llama.config, weight_bytes=2**30, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": ()}, r"lengths \[\] given"),
        ({"lengths": (8, 8)}, "different numbers"),
        ({"lengths": (0, 8)}, "each >= 1"),
        ({"train_length": 9}, r"train_length 9 is not among lengths \[8, 16, 32\]"),
        ({"stride": 2}, "stride 2 given; allowed: 1 to 1, an eighth of the smallest length, 8. .* comes out too high"),
        ({"stride": 0}, "stride 0 given"),
        ({"scored_tokens": 70}, "scored_tokens 70 given; .* multiples of 32 only, so set it to 64"),
        ({"scored_tokens": 0}, "windows of 8 tokens tile multiples of 8 only, so set it to 8"),
        ({"lengths": (8, 12), "scored_tokens": 36}, "multiples of 24 only, so set it to 48"),
        ({"num_tokens": 92}, "the text has 92 tokens and 93 are needed .64 scored and 29 before"),
    ],
)
def test_what_does_not_fit_together_is_named(changes, words):
    settings = {"num_tokens": 93, **PROTOCOL, **changes}
    with refused(words):
        Protocol(**{name: settings[name] for name in PROTOCOL}).check(settings["num_tokens"])


def test_the_shortest_text_that_fits_is_enough(llama):
    Protocol(**PROTOCOL).check(93)
    assert len(run(llama, tokens(93)).rows) == 6


def test_non_finite_losses_are_an_error(llama):
    llama.lm_head.weight.data[3] = math.nan
    with refused("64 of 64 losses are NaN or infinite at length 8"):
        run(llama, name="broken")


def test_tokens_outside_the_vocabulary_and_wrong_models_are_errors(llama):
    with refused("knows 0 to 63; use the tokenizer"):
        run(llama, torch.where(STREAM[0] == STREAM, 64, STREAM))
    with refused(r"give one dimension of torch\.int64"):
        run(llama, STREAM[None])
    with refused("needs a causal language model"):
        run(llama.model)


def test_rows_are_plain_data(llama):
    row = dataclasses.asdict(run(llama, name="llama").rows[0])
    fields = "model protocol length context fewest_seen most_seen nats_per_token perplexity bits_per_byte tokens"
    assert list(row) == [*fields.split(), "status", "reason"]


def test_the_losses_behind_each_number_are_kept():
    result = run(stock_model("gpt2", n_positions=16), cropped=True, train_length=16)
    numbers = {(r.context, r.protocol, r.length): r.nats_per_token for r in result.rows if r.status == "ok"}
    assert set(result.losses) == set(numbers)
    assert len(numbers) == 2 * (2 + 3)
    for key, losses in result.losses.items():
        assert losses.shape == (64,)
        assert float(losses.double().mean()) == pytest.approx(numbers[key])
    assert result.losses["cropped", SLIDING, 32] is result.losses["full", SLIDING, 16]
