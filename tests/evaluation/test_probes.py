"""The probes: prompts of exact length, an oracle that finds every key, a blind model that finds none."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from helpers.models import stock_model
from hf_alibi.errors import InputError
from hf_alibi.evaluation import probes
from hf_alibi.evaluation.probe_prompts import Probe, ProbeBlocks, ProbeText
from hf_alibi.evaluation.probe_tasks import TASKS
from hf_alibi.evaluation.probes import evaluate_probe
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
    return ProbeText(tokenizer)


def case_of(text, *, length, depth, key, turn=0.5):
    """The passkey prompt that hides this key."""
    return text.case("passkey", TASKS["passkey"].draft(random.Random(0), [key], depth), length=length, turn=turn)


PROBE = Probe(lengths=[200, 330], depths=[0.0, 0.5, 1.0], cases=4)


def found(model, text, probe=PROBE, **options):
    return evaluate_probe(model, text, probe, **options, progress=False)


def training_tokens(tokenizer, bos_token_id=None, **options):
    text = ProbeText(tokenizer, bos_token_id)
    blocks = ProbeBlocks(text, eos_token_id=tokenizer.eos_token_id, **options)
    return torch.cat([blocks[index] for index in range(len(blocks))])


def test_prompts_begin_with_the_beginning_of_sequence_if_told(tokenizer):
    plain, marked = ProbeText(tokenizer), ProbeText(tokenizer, 7)
    case = case_of(marked, length=200, depth=0.5, key=12345)
    assert len(case.tokens) == 200
    assert case.tokens[0] == 7
    assert torch.equal(case.tokens[1:], case_of(plain, length=199, depth=0.5, key=12345).tokens)
    assert marked.first_token("passkey").tolist() == [[7]]
    assert marked.shortest("passkey") == plain.shortest("passkey") + 1
    stream = training_tokens(tokenizer, block_size=330, blocks=3, seed=0, bos_token_id=7)
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
        case = case_of(text, length=length, depth=depth, key=key, turn=0.5)
        assert case.tokens.shape == (length,)
        words = tokenizer.decode(case.tokens.tolist())
        assert words.startswith("A pass key is hidden")
        assert words.endswith(f"\n{QUESTION} {key}")
        assert words.count(str(key)) == 2
        assert tokenizer.decode(case.tokens[-case.answer :].tolist()) == f" {key}"


def test_the_key_stands_at_its_depth(tokenizer, text):
    for depth in (0.0, 0.25, 0.5, 1.0):
        words = tokenizer.decode(case_of(text, length=2000, depth=depth, key=12345).tokens.tolist())
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
    found(model, ProbeText(tokenizer))
    assert max(model.computed[1:]) == 6  # a space and five digits


def test_equals_greedy_generation():
    """A random model's own continuation is taken for the answer: the probe must agree token by token."""
    model = stock_model("llama", vocab_size=259, max_position_embeddings=512)
    prompt = torch.randint(3, 259, (1, 40))
    full = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    right = probes.ProbeCase(full, 5)
    wrong = probes.ProbeCase(torch.cat([full[:-1], (full[-1:] + 1) % 259]), 5)
    short = probes.ProbeCase(full, 3)
    with torch.no_grad():
        assert list(probes._answers(model, [right, wrong, short])) == [True, False, True]


def test_cases_are_the_same_for_all_models_and_at_every_call(tokenizer):
    asked = []
    for _ in range(2):
        found(Reader(lambda ids: asked.append(tuple(ids)) or 3), ProbeText(tokenizer))
    half = len(asked) // 2
    assert asked[:half] == asked[half:]
    cell = PROBE.cell(ProbeText(tokenizer), "passkey", 330, 0.5)
    assert len({tuple(case.tokens.tolist()) for case in cell}) == 4
    other = Probe(lengths=[330], depths=[0.5], cases=4, seed=1).cell(ProbeText(tokenizer), "passkey", 330, 0.5)
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
        case_of(text, length=20, depth=0.5, key=12345)
    least = int(str(error.value).split()[-1])
    assert case_of(text, length=least, depth=0.5, key=12345).tokens.shape == (least,)
    with pytest.raises(InputError):
        case_of(text, length=least - 1, depth=0.5, key=12345)


def keys_of(tokenizer, tokens):
    return {int(key) for key in re.findall(rf"{re.escape(QUESTION)} (\d{{5}})", tokenizer.decode(tokens.tolist()))}


def test_training_blocks_hold_whole_cases_of_all_lengths(tokenizer):
    tokens = training_tokens(tokenizer, block_size=640, blocks=60, seed=0)
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
    trained = keys_of(tokenizer, training_tokens(tokenizer, block_size=400, blocks=200, seed=0))
    probe = Probe(lengths=[200], depths=[0.0], cases=100)
    asked = set().union(
        *(keys_of(tokenizer, case.tokens) for case in probe.cell(ProbeText(tokenizer), "passkey", 200, 0.0))
    )
    assert len(trained) > 150
    assert len(asked) > 90
    assert not trained & asked
    assert {key % 7 == 0 for key in trained} == {False}
    assert {key % 7 == 0 for key in asked} == {True}


def test_blocks_that_are_too_short_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"blocks of probes have 30 tokens.*give at least (\d+)") as error:
        training_tokens(tokenizer, block_size=30, blocks=1, seed=0)
    least = int(str(error.value).split()[-1])
    assert training_tokens(tokenizer, block_size=least, blocks=20, seed=0).shape == (20 * least,)


def test_numbers_that_look_alike_are_refused():
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match="all numbers the same tokens"):
        ProbeText(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>"))


def test_rotations_that_remember_a_longer_text_are_reset():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = stock_model("llama", vocab_size=259, max_position_embeddings=150, rope_parameters=rope)
    with torch.no_grad():
        model(torch.randint(3, 259, (1, 600)))
    text = ProbeText(load_tokenizer("bytes"))
    found(model, text, Probe(lengths=[200], depths=[0.0], cases=1))
    assert model.model.rotary_emb.max_seq_len_cached == 199


def answer_to(words):
    """What a reader answers to a prompt: an oracle that knows nothing of how the prompts are made."""
    if asked := re.search(r"\nWhat is the pass key of (\w+)\? The pass key of \1 is", words):
        return re.findall(rf"\nThe pass key of {asked[1]} is( \d{{5}})\. Remember it\.", words)[0]
    value = re.search(r"\nWhich variables have the value (\d{5})\? The variables", words)[1]
    assigned = dict(re.findall(r"\nVAR (\w+) = (?:VAR )?(\w+)\.", words))
    name, found = value, []
    while (name := next((to for to, source in assigned.items() if source == name), None)) is not None:
        found.append(f" {name}")
    return "".join(found)


@pytest.mark.parametrize("task", ["multikey", "tracking"])
def test_a_reader_answers_every_case(task, tokenizer, text):
    for depth in (0.0, 0.5, 1.0):
        for case in Probe(lengths=[700], depths=[depth], cases=30).cell(text, task, 700, depth):
            words = tokenizer.decode(case.tokens[: -case.answer].tolist())
            assert case.tokens.shape == (700,)
            assert words.startswith(TASKS[task].opening)
            assert answer_to(words) == tokenizer.decode(case.tokens[-case.answer :].tolist())


def test_one_of_several_keys_is_asked_for(tokenizer, text):
    places = []
    for case in Probe(lengths=[900], depths=[0.5], cases=30).cell(text, "multikey", 900, 0.5):
        words = tokenizer.decode(case.tokens.tolist())
        hidden = dict(re.findall(r"\nThe pass key of (\w+) is (\d{5})\.", words))
        assert len(hidden) == len(set(hidden.values())) == 4
        asked = re.search(r"What is the pass key of (\w+)\?", words)[1]
        assert words.endswith(f" {hidden[asked]}")
        places.append(words.index(f"of {asked} is") / len(words))
        assert len({words.index(f"of {name} is") for name in hidden}) == 4
    assert 0.35 < sum(places) / 30 < 0.65


def test_a_value_is_followed_over_several_variables_beside_another_chain(tokenizer, text):
    for case in Probe(lengths=[900], depths=[0.25], cases=20).cell(text, "tracking", 900, 0.25):
        words = tokenizer.decode(case.tokens.tolist())
        assigned = re.findall(r"\nVAR (\w+) = (VAR )?(\w+)\.", words)
        assert len({name for name, _, _ in assigned}) == 10
        assert sum(not source for _, source, _ in assigned) == 2
        for name, source, of in assigned:  # nothing is used before it has a value
            assert not source or words.index(f"\nVAR {of} =") < words.index(f"\nVAR {name} =")
        answer = tokenizer.decode(case.tokens[-case.answer :].tolist()).split()
        assert len(answer) == 5
        assert words.index(f"\nVAR {answer[0]} =") == min(words.index(f"\nVAR {name} =") for name in answer)


@pytest.mark.parametrize("task", TASKS)
def test_every_case_fits_into_the_shortest_length(task, tokenizer, text):
    shortest = text.shortest(task)
    for seed in range(5):
        assert len(Probe(lengths=[shortest], depths=[0.5], cases=40, seed=seed).cell(text, task, shortest, 0.5)) == 40
    assert len(text._filler) > 0
    with pytest.raises(InputError, match=f"a {task} prompt of {shortest // 2} tokens was asked for"):
        Probe(lengths=[shortest // 2], depths=[0.5], cases=1).cell(text, task, shortest // 2, 0.5)


def test_rows_of_each_task(tokenizer, text):
    probe = Probe(lengths=[700], depths=[0.0, 1.0], cases=3, tasks=["passkey", "tracking"])
    rows = found(oracle(tokenizer), text, probe)
    assert [(row.task, row.depth) for row in rows] == [(t, d) for t in probe.tasks for d in (0.0, 1.0, None)]
    assert [row.found for row in rows] == [3, 3, 6, 0, 0, 0]


def test_a_model_is_asked_no_longer_prompts_of_a_task_that_it_does_not_know(tokenizer, text):
    probe = Probe(lengths=[700, 1000], depths=[0.0, 1.0], cases=3, tasks=["passkey", "multikey"], if_known=True)
    rows = {(row.task, row.length): row for row in found(oracle(tokenizer), text, probe) if row.depth is None}
    assert rows["passkey", 700].found == rows["passkey", 1000].found == 6
    assert rows["multikey", 700].found == 0
    last = rows["multikey", 1000]
    assert (last.found, last.low, last.status) == (None, None, "not asked")
    assert last.reason == "0 of 6 right at 700 tokens: the model does not know the task"


def test_half_of_the_cases_are_enough_to_know_a_task(tokenizer, text):
    probe = Probe(lengths=[200, 330], depths=[0.0, 1.0], cases=4, if_known=True)
    half = found(oracle(tokenizer, sees=120), text, probe)
    assert [row.found for row in half if row.depth is None] == [4, 4]


def test_lengths_that_a_task_does_not_fit_in_are_left_out_if_only_known_tasks_are_asked(tokenizer, text):
    probe = Probe(lengths=[100, 700], depths=[0.0], cases=2, tasks=["multikey"], if_known=True)
    probe.check(text)
    rows = found(Reader(lambda ids: 3), text, probe)
    assert [row.status for row in rows] == ["not asked", "not asked", "ok", "ok"]
    assert rows[0].reason == f"a prompt of this task has up to {text.shortest('multikey')} tokens"
    with pytest.raises(InputError, match=r"probe_lengths has 100, and a multikey prompt"):
        Probe(lengths=[100, 700], depths=[0.0], cases=2, tasks=["multikey"]).check(text)


def test_training_on_several_tasks_takes_them_in_turn(tokenizer):
    tokens = training_tokens(tokenizer, block_size=900, blocks=30, seed=0, tasks=list(TASKS))
    words = tokenizer.decode(tokens.tolist())
    counts = [words.count(task.opening) for task in TASKS.values()]
    assert min(counts) > 0.25 * sum(counts)
    assert sum(counts) >= 30
    trained = {int(key) for key in re.findall(r"\d{5}", words)}
    assert trained
    assert {key % 7 == 0 for key in trained} == {False}


def test_cases_may_stand_in_a_text(tokenizer):
    around = torch.arange(100, 400).view(3, 100)
    options = {"block_size": 640, "blocks": 12, "seed": 0, "tasks": list(TASKS)}
    tokens = training_tokens(tokenizer, **options, around=around).view(12, 640)
    assert torch.equal(tokens, training_tokens(tokenizer, **options, around=around).view(12, 640))
    chosen = set()
    for block in tokens:
        of_text = [(row + 1) * 100 for row in range(3) if set(around[row].tolist()) <= set(block.tolist())]
        chosen.update(of_text)
        assert len(of_text) <= 1
    assert len(chosen) > 1
    assert "grass" not in tokenizer.decode([token for token in tokens.flatten().tolist() if token < 100])
