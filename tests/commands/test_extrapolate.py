"""The run behind `hf-alibi extrapolate`: folders in, files out; wrong input stops it early."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_alibi
from helpers.models import VOCABULARY, stock_model
from helpers.runs import BYTES, config_file, cut, drop_weight, raising, refused, save
from hf_alibi.commands import extrapolate as extrapolation
from hf_alibi.commands.extrapolate import extrapolate
from hf_alibi.evaluation import memory
from hf_alibi.evaluation.perplexity import evaluate_extrapolation
from hf_alibi.evaluation.protocol import Protocol
from hf_alibi.evaluation.settings import ExtrapolateArguments
from hf_alibi.training.data import load_tokenizer

pytestmark = pytest.mark.usefixtures("workplace")

FILES = {"results.json", "results.csv", "report.md", "report.html", "perplexity.png", "position_loss.png"}
TEXT = "Bytes of a plain text, again and again; é is two of them. " * 40
PROTOCOL = {"train_length": 16, "lengths": [16, 32, 64], "scored_tokens": 128, "stride": 2}


def save_both(folder, family, **options):
    """A model and its conversion, which read bytes."""
    original, alibi = (stock_model(family, vocab_size=BYTES, **options) for _ in range(2))
    return {
        "alibi": save(hf_alibi.apply_alibi(alibi), folder / "alibi"),
        "original": save(original, folder / "original"),
    }


@pytest.fixture
def models(tmp_path):
    """A GPT-2 with 16 learned positions and its conversion."""
    return save_both(tmp_path, "gpt2", n_positions=16, initializer_range=0.02)


@pytest.fixture
def rotary(tmp_path):
    """A LLaMA made for 32 positions, and its conversion."""
    return save_both(tmp_path / "rotary", "llama", initializer_range=0.05)


@pytest.fixture
def command(tmp_path, models):
    """Run with these settings."""
    text = tmp_path / "bytes.txt"
    text.write_text(TEXT, encoding="utf-8")
    files = {"models": models, "train_file": [str(text)], "output_dir": str(tmp_path / "out")}

    def run(**changes):
        return extrapolate(config_file({**files, **PROTOCOL, "validation_fraction": 0.5, **changes}))

    return run


def direct_rows(model, tokens, **options):
    """Rows of the evaluation of a model on the end of these tokens, without the command."""
    return evaluate_extrapolation(model, torch.tensor(tokens), **PROTOCOL, **options, progress=False).rows


@pytest.fixture
def no_evaluation(monkeypatch):
    """Fails the test where a model is evaluated."""
    monkeypatch.setattr(extrapolation, "evaluate_extrapolation", raising(AssertionError("a model was evaluated")))


@pytest.fixture
def results(command):
    return command()


def test_a_run_writes_everything_it_found(command, tmp_path, capsys):
    results, out = command(), tmp_path / "out"
    assert {path.name for path in out.iterdir()} == FILES
    assert all(path.stat().st_size > 200 for path in out.iterdir())
    assert json.loads((out / "results.json").read_text()) == {"schema": 4, **json.loads(json.dumps(results))}
    for name in ("results.json", "results.csv", "report.md", "report.html"):
        assert str(tmp_path) not in (out / name).read_text(encoding="utf-8")  # no absolute paths
    rows = by_key(results)
    # Two protocols, three lengths; the unconverted model has a cropped baseline too.
    assert len(rows) == len(results["rows"]) == 2 * 3 * 3
    assert rows["original", "full", "sliding", 32]["reason"] == "learned position table has 16 rows"
    cropped, full = rows["original", "cropped", "sliding", 64], rows["original", "full", "sliding", 16]
    assert cropped["perplexity"] == full["perplexity"]
    assert all(200 < r["perplexity"] < 400 for r in rows.values() if r["status"] == "ok")
    printed = capsys.readouterr().out
    assert "cannot run" in printed
    assert all(name in printed for name in FILES)


def test_numbers_are_those_of_the_model_in_the_folder(results, models):
    model = hf_alibi.AlibiGPT2LMHeadModel.from_pretrained(models["alibi"])
    # The end-of-sequence token, the last of the 128, stands for no byte.
    direct = direct_rows(model, load_tokenizer("bytes")(TEXT).input_ids, num_bytes=127)
    given = [row for row in results["rows"] if row["model"] == "alibi"]
    for row, expected in zip(given, direct, strict=True):
        assert row["nats_per_token"] == pytest.approx(expected.nats_per_token, abs=1e-6)
        assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, abs=1e-6)


def test_defaults_reach_sixteen_times_the_training_length():
    args = ExtrapolateArguments(models={"a": "b"}, train_length=128, output_dir="out")
    assert args.protocol() == Protocol([128, 256, 512, 1024, 2048], 128, 8192, None)


def test_cropped_baselines_can_be_chosen_and_left_out(command):
    def cropped(results):
        return {row["model"] for row in results["rows"] if row["context"] == "cropped"}

    assert cropped(command(output_dir="a", cropped=["alibi"])) == {"alibi"}
    assert cropped(command(output_dir="b", cropped=["none"])) == set()


def by_key(results):
    return {(r["model"], r["context"], r["protocol"], r["length"]): r for r in results["rows"]}


BASELINE_LABELS = {
    "rope_linear": "linear RoPE scaling ×2",
    "rope_dynamic": "dynamic NTK ×2",
    "rope_yarn": "YaRN ×2",
    "sliding_window": "window of 16",
}


class TestBaselines:
    def test_all_that_fit_are_rows_of_their_own(self, command, rotary, tmp_path, capsys):
        results = command(models=rotary, baselines=["all"], cropped=["none"])
        assert results["models"]["original"]["baselines"] == BASELINE_LABELS
        assert results["models"]["alibi"]["baselines"] == {"alibi_linear": "slopes ÷4", "alibi_ntk": "NTK slopes ÷4"}
        contexts = list(dict.fromkeys((row["model"], row["context"]) for row in results["rows"]))
        assert contexts == [
            *(("alibi", context) for context in ("full", "alibi_linear", "alibi_ntk")),
            *(("original", context) for context in ("full", *BASELINE_LABELS)),
        ]
        for text in ((tmp_path / "out" / "report.md").read_text(encoding="utf-8"), capsys.readouterr().out):
            for label in ("original, YaRN ×2", "original, window of 16", "alibi, NTK slopes ÷4"):
                assert label in text

    def test_their_numbers_are_those_of_the_model_loaded_so(self, command, rotary):
        results = by_key(command(models=rotary, baselines=["all"]))
        parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        model = AutoModelForCausalLM.from_pretrained(rotary["original"], rope_parameters=parameters)
        for row in direct_rows(model, load_tokenizer("bytes")(TEXT).input_ids):
            given = results["original", "rope_dynamic", row.protocol, row.length]
            assert given["nats_per_token"] == pytest.approx(row.nats_per_token, abs=1e-5)
        own, dynamic = (results["original", context, "sliding", 32] for context in ("full", "rope_dynamic"))
        assert dynamic["perplexity"] == pytest.approx(own["perplexity"])
        for context in BASELINE_LABELS:
            assert results["original", context, "sliding", 64] != results["original", "full", "sliding", 64]

    def test_the_window_at_the_training_length_is_the_model_itself(self, command, rotary):
        rows = by_key(command(models=rotary, baselines=["sliding_window"]))
        own, windowed = (rows["original", context, "sliding", 16] for context in ("full", "sliding_window"))
        assert windowed["perplexity"] == pytest.approx(own["perplexity"], rel=1e-5)

    def test_what_is_left_out_is_in_the_report(self, command, rotary, tmp_path):
        results = command(models=rotary, baselines=["all"], lengths=[16, 32], scored_tokens=64)
        assert set(results["models"]["original"]["left_out"]) == {"rope_linear", "rope_dynamic", "rope_yarn"}
        report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        assert "`rope_dynamic` or `rope_yarn`: the longest length, 32, is within the 32 tokens" in report

    def test_lengths_of_the_probe_count_for_the_factor(self, command, rotary):
        results = command(models=rotary, baselines=["rope_yarn"], probe_cases=1, probe_lengths=[256])
        assert results["models"]["original"]["baselines"] == {"rope_yarn": "YaRN ×8"}


class TestIntervals:
    def test_every_number_has_one_and_the_file_says_how(self, results, tmp_path):
        for row in results["rows"]:
            low, high = row["perplexity_low"], row["perplexity_high"]
            assert (low is None) == (row["status"] != "ok")
            assert low is None or low < row["perplexity"] < high
        # The text is one document.
        assert results["intervals"]["unit"] == "blocks"
        assert (results["intervals"]["block_tokens"], results["intervals"]["units"]) == (6, 22)
        assert "perplexity_low,perplexity_high" in (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")

    def test_documents_are_those_of_the_text(self, command, tmp_path):
        path = tmp_path / "many.jsonl"
        path.write_text("".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(300)))
        results = command(train_file=[str(path)])
        scored = "".join(f"{n}|" for n in range(300))[-128:]
        assert results["intervals"]["unit"] == "documents"
        assert results["intervals"]["units"] == scored.count("|")

    def test_the_converted_model_is_compared_with_every_other_line(self, results):
        against = {
            (e["against_model"], e["against_context"], e["length"])
            for e in results["comparisons"]
            if e["length"] == e["against_length"] and e["protocol"] == "sliding"
        }
        assert against == {("original", "full", 16), *(("original", "cropped", n) for n in (16, 32, 64))}
        assert {e["model"] for e in results["comparisons"] if e["length"] != e["against_length"]} == {"alibi"}


def test_the_probes_ask_all_models_and_baselines(command, rotary, tmp_path, capsys):
    asked = {"probe_cases": 2, "probe_lengths": [160, 200], "probe_depths": [0, 1]}
    results = command(models=rotary, baselines=["rope_yarn"], **asked)
    probe = results["probes"]
    assert (probe["lengths"], probe["depths"], probe["cases"]) == ([160, 200], [0.0, 1.0], 2)
    asked = {(row["model"], row["context"], row["length"], row["depth"]) for row in probe["rows"]}
    lines = [("alibi", "full"), ("original", "full"), ("original", "rope_yarn")]
    assert asked == {(*line, n, depth) for line in lines for n in (160, 200) for depth in (0.0, 1.0, None)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "passkey.png"}
    assert "Passkeys found" in capsys.readouterr().out
    assert "## Probes" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_models_are_in_memory_one_at_a_time(command, rotary, monkeypatch):
    alive = weakref.WeakSet()
    load = extrapolation.load_complete

    def watched(*args, **kwargs):
        gc.collect()
        assert not list(alive)
        model = load(*args, **kwargs)
        alive.add(model)
        return model

    monkeypatch.setattr(extrapolation, "load_complete", watched)
    command(models=rotary, baselines=["all"])


def test_the_command_line_gives_models_as_json(command, models):
    command(cropped=["original"])
    again = json.dumps({"only": models["alibi"]})
    words = ["run.yaml", "--models", again, "--output_dir", "b", "--cropped", "none"]
    assert list(extrapolate(words)["models"]) == ["only"]


def drop_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def other_tokenizer(folder):
    """Put a tokenizer of characters, with other ids than those of bytes, beside a model."""
    drop_tokenizer(folder)
    vocabulary = {"<eos>": 0, "<unk>": 1, **{chr(c): c - 30 for c in range(32, 127)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)


def drop_shard(folder):
    """Save in several files, without the second."""
    (folder / "model.safetensors").unlink()
    stock_model("gpt2", vocab_size=BYTES).save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*"))[1].unlink()


@pytest.mark.usefixtures("no_evaluation")
class TestWrongInputStopsBeforeEvaluation:
    """One line, and nothing written."""

    @pytest.fixture
    def stops(self, command, tmp_path):
        def check(words, **changes):
            with refused(words):
                command(**changes)
            assert not (tmp_path / "out").exists()

        return check

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"models": {"a": "missing/model"}}, "no folder missing/model"),
            ({"models": {"a": "./missing"}}, r"no folder \./missing; give an existing folder or a hub name"),
            ({"models": "a"}, "not JSON"),
            ({"models": {}}, "must be a mapping"),
            ({"baselines": ["yarn"]}, "baselines names 'yarn'; allowed: rope_linear"),
            ({"baselines": ["rope_yarn"]}, "'rope_yarn', which is for none of the models alibi, original"),
            ({"probe_cases": -1}, "probe_cases is -1"),
            ({"probe_depths": [0.5, 1.5]}, "probe_depths is .*from 0 to 1"),
            ({"probe_lengths": [0]}, "probe_lengths is .*at least 1 token"),
            ({"probe_lengths": [256, 256]}, "give different numbers"),
            ({"probe_cases": 1}, r"probe_lengths has 16, and .* give probe_lengths of at least \d+"),
            ({"cropped": ["other"]}, "cropped names 'other'; the models are alibi, original"),
            ({"lengths": [32, 64]}, "train_length 16 is not among lengths"),
            ({"train_length": 0}, "must be at least 1 token"),
            ({"scored_tokens": 100}, "so set it to 128"),
            ({"scored_tokens": 4096}, "give more text, fewer scored_tokens or shorter lengths"),
            ({"validation_fraction": 0.0}, "no text is held out"),
            ({"attn_implementation": "warp"}, "cannot be built.*warp"),
            ({"dtype": "float8"}, "float8"),
            ({"train_file": ["missing.txt"]}, "missing.txt"),
            ({"lenghts": [16]}, "unknown field 'lenghts'.*did you mean lengths"),
        ],
    )
    def test_settings(self, stops, changes, words):
        stops(words, **changes)

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (
                lambda folder: cut(folder / "model.safetensors"),
                "model 'original': a weight file in .* is broken or cut short",
            ),
            (lambda folder: (folder / "model.safetensors").unlink(), "original has no model.safetensors"),
            (lambda folder: (folder / "config.json").unlink(), "model 'original' .* cannot be built"),
            (drop_shard, r"original has no model-00002"),
            (other_tokenizer, "tokenizer of model 'original' splits the text differently"),
        ],
    )
    def test_a_damaged_model(self, stops, models, damage, words):
        damage(Path(models["original"]))
        stops(words)

    def test_other_vocabulary(self, stops, tmp_path, models):
        other = save(stock_model("gpt2"), tmp_path / "small")
        assert stock_model("gpt2").config.vocab_size == VOCABULARY
        stops("vocabularies have different sizes", models={"alibi": models["alibi"], "small": other})

    def test_more_than_memory(self, stops, monkeypatch):
        monkeypatch.setattr(memory, "_available_bytes", lambda device: 1000)
        stops("of memory is free; use shorter lengths")

    def test_no_matplotlib(self, stops, monkeypatch):
        monkeypatch.setattr("hf_alibi.reporting.plots.find_spec", lambda name: None)
        stops(r"hf-alibi\[plots\]")

    def test_full_output_folder(self, command, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "results.json").write_text("mine")
        with refused("is not empty"):
            command()
        assert (tmp_path / "out" / "results.json").read_text() == "mine"


def test_weights_that_are_missing_in_the_file_are_not_made_up(command, models, tmp_path):
    drop_weight(models["original"], "wpe.weight")
    with refused(r"lacks 1 of its weights \(transformer\.wpe\.weight"):
        command()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_named_for_all_serves_models_without_one(command, models):
    for folder in models.values():
        drop_tokenizer(Path(folder))
    with refused("cannot load the tokenizer"):
        command()
    assert len(command(tokenizer_name="bytes")["rows"]) == 18
