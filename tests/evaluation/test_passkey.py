"""The passkey probe: prompts of exact length, an oracle that finds every key, a blind model that finds none."""

import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from helpers.models import stock_model
from hf_alibi.errors import InputError
from hf_alibi.evaluation import passkey
from hf_alibi.evaluation.passkey import evaluate_passkey
from hf_alibi.evaluation.passkey_prompts import PasskeyProbe, PasskeyText, passkey_training_tokens
from hf_alibi.training.data import load_tokenizer

QUESTION = "What is the pass key? The pass key is"


def merging_tokenizer():
    """Byte-pair tokens that join some digits, so that keys have different numbers of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=letters)
    text = ["The grass is green. The pass key is hidden. " + " ".join(str(7 * n) for n in range(1500, 1700))]
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(params=["bytes", "merges"])
def tokenizer(request):
    return load_tokenizer("bytes") if request.param == "bytes" else merging_tokenizer()


@pytest.fixture
def text(tokenizer):
    return PasskeyText(tokenizer)


PROBE = PasskeyProbe(lengths=[200, 330], depths=[0.0, 0.5, 1.0], cases=4)


def found(model, text, probe=PROBE, **options):
    return evaluate_passkey(model, text, probe, **options, progress=False)


def test_prompts_begin_with_the_beginning_of_sequence_if_told(tokenizer):
    plain, marked = PasskeyText(tokenizer), PasskeyText(tokenizer, 7)
    case = marked.case(length=200, depth=0.5, key=12345)
    assert len(case.tokens) == 200
    assert case.tokens[0] == 7
    assert torch.equal(case.tokens[1:], plain.case(length=199, depth=0.5, key=12345).tokens)
    assert marked.first_token().tolist() == [[7]]
    assert marked.shortest() == plain.shortest() + 1
    stream = passkey_training_tokens(tokenizer, block_size=330, blocks=3, seed=0, bos_token_id=7)
    starts = [0, *(i + 1 for i, token in enumerate(stream.tolist()[:-1]) if token == tokenizer.eos_token_id)]
    assert len(starts) >= 3
    assert all(stream[start] == 7 for start in starts)


class Reader(nn.Module):
    """Says at each answer position what `said(text so far)` gives."""

    device = torch.device("cpu")

    def __init__(self, said):
        super().__init__()
        self.said, self.computed = said, []

    def forward(self, input_ids, use_cache, logits_to_keep=0):
        positions = range(input_ids.shape[1])[-logits_to_keep or None :]
        logits = torch.zeros(*input_ids.shape[:1], len(positions), 500)
        for case, ids in enumerate(input_ids.tolist()):
            for index, position in enumerate(positions):
                logits[case, index, self.said(ids[: position + 1])] = 1.0
        self.computed.append(logits.shape[1])
        return SimpleNamespace(logits=logits)


def oracle(tokenizer, *, sees=10**6):
    """What follows after the beginning of the key: the rest of the key, if it is among the last `sees` tokens."""
    before_key = tokenizer.encode("\nThe pass key is", add_special_tokens=False)
    question = tokenizer.encode("\n" + QUESTION, add_special_tokens=False)

    def said(ids):
        starts = [n for n in range(len(ids)) if ids[n : n + len(before_key)] == before_key]
        asked = next((n + len(question) for n in range(len(ids)) if ids[n : n + len(question)] == question), None)
        if asked is None or not starts or starts[0] < len(ids) - sees:
            return 0
        return ids[starts[0] + len(before_key) + len(ids) - asked]

    return Reader(said)


@pytest.mark.parametrize("length", [150, 151, 177, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_and_answer_have_exactly_the_length(tokenizer, text, length, depth):
    for key in (10_003, 54_321, 99_995):
        case = text.case(length=length, depth=depth, key=key, turn=0.5)
        assert case.tokens.shape == (length,)
        words = tokenizer.decode(case.tokens.tolist())
        assert words.startswith("A pass key is hidden")
        assert words.endswith(f"\n{QUESTION} {key}")
        assert words.count(str(key)) == 2
        assert tokenizer.decode(case.tokens[-case.answer :].tolist()) == f" {key}"


def test_the_key_stands_at_its_depth(tokenizer, text):
    for depth in (0.0, 0.25, 0.5, 1.0):
        words = tokenizer.decode(text.case(length=2000, depth=depth, key=12345).tokens.tolist())
        pattern = r"(?s)A pass.*?Remember it\.(.*)\nThe pass key is 12345. Remember it\.(.*)\nWhat"
        before, after = (len(tokenizer.encode(part)) for part in re.match(pattern, words).groups())
        assert before / (before + after) == pytest.approx(depth, abs=0.01)


def test_an_oracle_finds_every_key_and_a_blind_model_none(tokenizer, text):
    rows = found(oracle(tokenizer), text, name="oracle")
    assert [(row.length, row.depth) for row in rows] == [(n, d) for n in (200, 330) for d in (0.0, 0.5, 1.0, None)]
    assert all(row.found == row.cases == (12 if row.depth is None else 4) for row in rows)
    assert all(row.low < row.high == 1.0 and row.status == "ok" for row in rows)
    blind = found(Reader(lambda ids: 3), text)
    assert all(row.found == row.low == 0 < row.high for row in blind)


def test_what_a_model_sees_decides_at_which_depth_it_finds(tokenizer, text):
    rows = found(oracle(tokenizer, sees=120), text)
    keys = {(r.length, r.depth): r.found for r in rows if r.depth is not None}
    assert keys.pop((200, 0.5)) in range(5)
    assert keys == {(200, 0.0): 0, (200, 1.0): 4, (330, 0.0): 0, (330, 0.5): 0, (330, 1.0): 4}


def test_half_a_key_does_not_count(tokenizer, text):
    right = oracle(tokenizer)

    def all_but_the_last(ids):
        return right.said(ids) if tokenizer.decode(ids).endswith("pass key is") else 3

    rows = found(Reader(all_but_the_last), text)
    assert all(row.found == 0 for row in rows)


def test_only_the_logits_of_the_answer_are_computed():
    tokenizer = load_tokenizer("bytes")
    model = oracle(tokenizer)
    found(model, PasskeyText(tokenizer))
    assert max(model.computed[1:]) == 6  # a space and five digits


def test_equals_greedy_generation():
    """A random model's own continuation is taken for the answer: the probe must agree token by token."""
    model = stock_model("llama", vocab_size=259, max_position_embeddings=512)
    prompt = torch.randint(3, 259, (1, 40))
    full = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    right = passkey.PasskeyCase(full, 5)
    wrong = passkey.PasskeyCase(torch.cat([full[:-1], (full[-1:] + 1) % 259]), 5)
    short = passkey.PasskeyCase(full, 3)
    with torch.no_grad():
        assert list(passkey._answers(model, [right, wrong, short])) == [True, False, True]


def test_cases_are_the_same_for_all_models_and_at_every_call(tokenizer):
    asked = []
    for _ in range(2):
        found(Reader(lambda ids: asked.append(tuple(ids)) or 3), PasskeyText(tokenizer))
    half = len(asked) // 2
    assert asked[:half] == asked[half:]
    cell = PROBE.cell(PasskeyText(tokenizer), 330, 0.5)
    assert len({tuple(case.tokens.tolist()) for case in cell}) == 4
    other = PasskeyProbe(lengths=[330], depths=[0.5], cases=4, seed=1).cell(PasskeyText(tokenizer), 330, 0.5)
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(cell, other, strict=True))


def test_batches_change_nothing(tokenizer, text):
    expected = found(oracle(tokenizer, sees=120), text)
    for batch_tokens in (1, 700, 10_000):
        rows = found(oracle(tokenizer, sees=120), text, batch_tokens=batch_tokens)
        assert rows == expected


def test_lengths_beyond_the_table_have_rows_that_say_so(tokenizer, text):
    rows = found(oracle(tokenizer), text, limit=256)
    assert all(row.status == "ok" for row in rows if row.length == 200)
    beyond = [row for row in rows if row.length == 330]
    assert len(beyond) == 4
    assert all((row.status, row.reason) == ("cannot run", "learned position table has 256 rows") for row in beyond)
    assert all(row.found is row.low is row.high is None for row in beyond)


def test_too_short_prompts_are_refused_with_the_least_length(text):
    with pytest.raises(InputError, match=r"of 20 tokens was asked for.*give lengths of at least \d+") as error:
        text.case(length=20, depth=0.5, key=12345)
    least = int(str(error.value).split()[-1])
    assert text.case(length=least, depth=0.5, key=12345).tokens.shape == (least,)
    with pytest.raises(InputError):
        text.case(length=least - 1, depth=0.5, key=12345)


def keys_of(tokenizer, tokens):
    return {int(key) for key in re.findall(rf"{re.escape(QUESTION)} (\d{{5}})", tokenizer.decode(tokens.tolist()))}


def test_training_blocks_hold_whole_cases_of_all_lengths(tokenizer):
    tokens = passkey_training_tokens(tokenizer, block_size=640, blocks=60, seed=0)
    lengths = []
    for block in tokens.view(60, 640):
        assert block[-1] == tokenizer.eos_token_id
        ends = (block == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        for start, end in zip([-1, *ends[:-1]], ends, strict=True):
            words = tokenizer.decode(block[start + 1 : end].tolist())
            assert words.startswith("A pass key is hidden")
            key = re.search(r"\nThe pass key is (\d{5})\. Remember", words).group(1)
            assert words.endswith(f"{QUESTION} {key}")
            lengths.append(end - start)
    assert max(lengths) == 640
    assert min(lengths) < 200
    assert len(set(lengths)) > 20


def test_keys_of_training_are_never_asked_for_in_evaluation(tokenizer):
    trained = keys_of(tokenizer, passkey_training_tokens(tokenizer, block_size=400, blocks=200, seed=0))
    probe = PasskeyProbe(lengths=[200], depths=[0.0], cases=100)
    asked = set().union(*(keys_of(tokenizer, case.tokens) for case in probe.cell(PasskeyText(tokenizer), 200, 0.0)))
    assert len(trained) > 150
    assert len(asked) > 90
    assert not trained & asked
    assert {key % 7 == 0 for key in trained} == {False}
    assert {key % 7 == 0 for key in asked} == {True}


def test_blocks_that_are_too_short_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"passkey_block_size is 30.*give at least (\d+)") as error:
        passkey_training_tokens(tokenizer, block_size=30, blocks=1, seed=0)
    least = int(str(error.value).split()[-1])
    assert passkey_training_tokens(tokenizer, block_size=least, blocks=20, seed=0).shape == (20 * least,)


def test_numbers_that_look_alike_are_refused():
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match="all numbers the same tokens"):
        PasskeyText(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>"))


def test_rotations_that_remember_a_longer_text_are_reset():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = stock_model("llama", vocab_size=259, max_position_embeddings=150, rope_parameters=rope)
    with torch.no_grad():
        model(torch.randint(3, 259, (1, 600)))
    text = PasskeyText(load_tokenizer("bytes"))
    found(model, text, PasskeyProbe(lengths=[200], depths=[0.0], cases=1))
    assert model.model.rotary_emb.max_seq_len_cached == 199
