"""A whole conversion, and an ablation, on tiny models."""

import json
import math
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, TrainingArguments

import hf_alibi
from helpers.models import stock_model
from helpers.runs import BYTES, ROOT, config_file, held_out, refused, save
from hf_alibi import cli
from hf_alibi.commands.ablation import ablation, ablation_table
from hf_alibi.commands.convert import _CLASSES, convert, cost, run
from hf_alibi.commands.fields import read_yaml
from hf_alibi.commands.finetune import finetune
from hf_alibi.commands.settings import make_settings
from hf_alibi.conversion.distillation import FitSettings
from hf_alibi.conversion.settings import ConversionArguments
from hf_alibi.errors import InputError
from hf_alibi.training.settings import DataArguments, FinetuneArguments

CONFIGS = ROOT / "configs"
BLOCK = 32
SETTINGS = {
    "model_name_or_path": "stock",
    "train_file": ["text.txt"],
    "validation_fraction": 0.2,
    "block_size": BLOCK,
    "budget_tokens": 6 * 4 * BLOCK,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 2,
    "disable_tqdm": True,
    "output_dir": "run",
}
RECIPE = {
    "match_tokens": 4 * BLOCK,
    "match_heads": True,
    "sink_tokens": 1,
    "distill_tokens": 32 * BLOCK,
    "distill_epochs": 1,
}
COMPARISON = {"lengths": [32, 64], "scored_tokens": 128, "stride": 4}
ROWS = {"control": {"attention": "original"}, "none": {}, "sink": {"sink_tokens": 1}}


@pytest.fixture(autouse=True)
def stock(one_thread, workplace):
    """An unconverted LLaMA beside the text."""
    save(stock_model("llama", vocab_size=BYTES, max_position_embeddings=2048), "stock")


def write(**values):
    return config_file({**SETTINGS, **values})


def test_one_call_converts_trains_and_compares():
    result = convert(SETTINGS, **RECIPE, **COMPARISON, control=True)
    training, control = result["training"], result["control"]
    # 6 steps of 4 blocks are what the budget is enough for.
    assert (training["steps"], training["tokens_seen"]) == (6, 6 * 4 * BLOCK)
    assert (control["steps"], control["tokens_seen"]) == (6, 6 * 4 * BLOCK)
    assert [sorted(order) for order in training["conversion"]["head_order"]] == [[0, 1, 2, 3]] * 2
    assert len(training["conversion"]["layer_error"]) == 2
    assert control["conversion"] == {}
    assert control["config"]["attention"] == "original"
    perplexity = {
        row["model"]: row["perplexity"]
        for row in result["evaluation"]["rows"]
        if (row["length"], row["protocol"], row["context"]) == (BLOCK, "sliding", "full")
    }
    card, control_card = (Path(folder, "README.md").read_text(encoding="utf-8") for folder in ("run", "run/control"))
    # One number of one protocol in the line, the table and the model card.
    ratio = perplexity["alibi"] / perplexity["original"]
    line = cost(result)
    assert line.startswith(
        "Sliding window, stride 4 tokens, 128 held-out tokens, original trained on the same tokens: At 32 tokens, the "
        f"length of the training, the perplexity of alibi is {ratio:.3f} ["
    )
    assert f"({perplexity['alibi']:.1f} against {perplexity['original']:.1f})" in line
    assert f"| alibi | {perplexity['alibi']:.1f} [" in Path("run/evaluation/report.md").read_text()
    assert f"- Price of the conversion. {line}" in card
    assert "Price" not in control_card

    model = AutoModelForCausalLM.from_pretrained("run")
    assert isinstance(model, hf_alibi.AlibiLlamaForCausalLM)
    assert (model.config.alibi_sink_tokens, model.config.alibi_train_length) == (1, BLOCK)
    assert AutoModelForCausalLM.from_pretrained("run/control").config.model_type == "llama"
    assert set(result["evaluation"]["models"]) == {"alibi", "original"}
    assert {row["length"] for row in result["evaluation"]["rows"]} == {32, 64}
    assert "- Conversion: heads matched to slopes on 128 tokens; sink tokens without bias: 1; " in card
    assert "attention fitted to the unconverted layers on 1,024 tokens, 1 ×" in card
    assert "Conversion:" not in control_card
    saved = json.loads(Path("run/metrics.json").read_text())
    assert saved["config"]["distill_tokens"] == RECIPE["distill_tokens"]


def test_the_control_has_a_rate_of_its_own_for_all_weights():
    scales = {"mlp_rate_scale": 0.5, "embedding_rate_scale": 0.0}
    convert(SETTINGS, **COMPARISON, **scales, control=True, control_learning_rate=2e-4)
    names = ("learning_rate", "mlp_rate_scale", "embedding_rate_scale")
    configs = [yaml.safe_load(Path(folder, "config.yaml").read_text()) for folder in ("run", "run/control")]
    assert [[config[name] for name in names] for config in configs] == [[1e-3, 0.5, 0.0], [2e-4, 1.0, 1.0]]


def test_without_a_control_the_untouched_model_is_compared():
    result = run([*write(**COMPARISON), "--sink_tokens", "2"])
    assert result["control"] is None
    assert ", original as it was given: At 32 tokens" in cost(result)
    models = result["evaluation"]["models"]
    assert models["alibi"]["training"] == {"steps": 6, "tokens": 6 * 4 * BLOCK, "distilled": 0, "continued": False}
    assert models["original"]["training"] is None
    assert [models[name]["made_for"] for name in ("alibi", "original")] == [BLOCK, 2048]
    assert models["original"]["source"] == "stock"
    assert AutoModelForCausalLM.from_pretrained("run").config.alibi_sink_tokens == 2


def test_the_recipe_is_seen_in_the_weights():
    """Each part changes where training starts, and no part changes the other settings."""
    losses = {}
    rows = {part: {part: value} for part, value in RECIPE.items()}
    rows["match_heads"] |= {"match_tokens": rows.pop("match_tokens")["match_tokens"]}
    for name, parts in {"none": {}, **rows}.items():
        metrics = finetune(write(**parts, output_dir=f"run-{name}", learning_rate=0.0))
        losses[name] = metrics["eval_loss"]
    assert len({round(loss, 6) for name, loss in losses.items() if name != "distill_epochs"}) == 4
    assert losses["distill_epochs"] == losses["none"]


def test_a_model_without_positions_is_made_by_the_recipe_with_all_heads_global():
    heads = AutoModelForCausalLM.from_pretrained("stock").config.num_attention_heads
    asked = {**RECIPE, "global_heads": heads, "save_strategy": "steps", "save_steps": 3}
    finetune(write(**asked))
    assert AutoModelForCausalLM.from_pretrained("run").config.alibi_slopes == [0.0] * heads
    Path("run/metrics.json").unlink()
    assert finetune(write(**asked, resume_from_checkpoint=True))["steps"] == 6
    with refused(f"given with attention: nope, which takes no recipe; .* and global_heads: {heads}, all heads"):
        finetune(write(**RECIPE, attention="nope", output_dir="other"))


def test_distillation_is_what_was_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr("hf_alibi.conversion.recipe.distill_layers", lambda *args, **kwargs: seen.append(args[3]) or [])
    asked = {"distill_epochs": 3, "distill_learning_rate": 2e-3, "distill_batch_size": 2}
    finetune(write(**{**RECIPE, **asked}, seed=7, bf16=True))
    assert seen == [FitSettings(epochs=3, learning_rate=2e-3, batch_size=2, bf16=True, seed=7)]


def test_learned_positions_are_read_within_their_table():
    save(stock_model("gpt2", vocab_size=BYTES, n_positions=16), "short")
    done = finetune(write(model_name_or_path="short", **RECIPE))["conversion"]
    assert len(done["head_order"]) == len(done["layer_error"]) == 2


def test_sinks_that_a_model_cannot_carry_are_refused_before_the_recipe_begins(monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    save(MistralForCausalLM(MistralConfig(vocab_size=BYTES, sliding_window=16, **sizes)), "sliding")
    monkeypatch.setattr("hf_alibi.conversion.recipe.match_heads", lambda *args: pytest.fail("began"))
    with refused(r"some self-attention layers of .* see only a part of the sequence"):
        finetune(write(model_name_or_path="sliding", tokenizer_name="bytes", sink_tokens=1, match_tokens=64))


def test_a_converted_model_is_not_converted_again():
    finetune(write())
    with refused("match_tokens given, but run is already converted; leave them out"):
        finetune(write(model_name_or_path="run", output_dir="again", match_tokens=64))


def test_unknown_fields_are_named():
    with refused("unknown field 'sink_token' in the arguments; did you mean sink_tokens"):
        convert(SETTINGS, sink_token=1)


def test_the_command_says_what_it_cost(capsys):
    assert cli.main(["convert", *write(**COMPARISON), "--control", "true"]) == 0
    assert "original trained on the same tokens: At 32 tokens, the length of the training" in capsys.readouterr().out
    assert Path("run/loss.png").is_file()
    assert Path("run/control/loss.png").is_file()


def test_the_held_out_loss_is_that_of_the_weights_in_their_own_type():
    """Training in half precision leaves a wrapper on the model, which would round its logits."""
    metrics = finetune(write(bf16=True, eval_strategy="steps", eval_steps=3))
    assert metrics["eval_loss"] == pytest.approx(held_out("run")[0], rel=1e-6)


def test_an_ablation_is_a_run_for_each_row_and_seed():
    results = ablation(write(rows=ROWS, seeds=[1, 2], control="control", output_dir="ablation"))
    assert [(row["row"], row["tokens"]) for row in results["rows"]] == [(name, 768) for name in ROWS]
    control, none, sink = results["rows"]
    assert control["ratio"] == 1
    losses = {(one["row"], one["seed"]): one["nats_per_token"] for one in results["runs"]}
    assert len(set(losses.values())) == 6
    assert none["nats_per_token"] == pytest.approx((losses["none", 1] + losses["none", 2]) / 2)
    assert none["nats_deviation"] == pytest.approx(abs(losses["none", 1] - losses["none", 2]) / math.sqrt(2))
    ratios = [math.exp(losses["sink", seed] - losses["control", seed]) for seed in (1, 2)]
    assert sink["ratio"] == pytest.approx(sum(ratios) / 2)
    for name in ("results.json", "results.csv", "ablation.md", "ablation.png"):
        assert Path("ablation", name).is_file()
    assert not list(Path("ablation").rglob("*.safetensors"))
    assert f"| sink | {sink['nats_per_token']:.3f} ±" in ablation_table(results)
    # Each row is the run that finetune makes of the same settings.
    alone = finetune(write(**ROWS["sink"], seed=2, output_dir="alone"))
    assert alone["eval_loss"] == losses["sink", 2]


def test_an_ablation_also_evaluates_at_lengths(monkeypatch):
    asked = {"rows": ROWS, "seeds": [1, 2], "output_dir": "ablation", **COMPARISON, "lengths": [32, 512]}
    asked |= {"scored_tokens": 32, "probes": ["passkey"], "probe_cases": 1, "probe_lengths": [200], "stride": 4}
    asked |= {"baselines": ["sliding_window"]}  # made for the unconverted row alone
    results = ablation(write(**asked))
    means = {(row["row"], row["value"], row["length"]): row["mean"] for row in results["by_length"]}
    for name in ROWS:
        runs = [json.loads(Path(f"ablation/{name}/seed-{seed}/evaluation/results.json").read_text()) for seed in (1, 2)]
        for length in (32, 512):
            each = [
                row["perplexity"]
                for run in runs
                for row in run["rows"]
                if (row["protocol"], row["length"], row["context"]) == ("sliding", length, "full")
            ]
            assert means[name, "perplexity", length] == pytest.approx(math.sqrt(each[0] * each[1]))
        assert means[name, "passkey", 200] == 0
    table = Path("ablation/ablation.md").read_text()
    assert "| row | perplexity at 32 | perplexity at 512 | passkey at 200 |" in table
    assert f"| sink | {means['sink', 'perplexity', 32]:.2f} | {means['sink', 'perplexity', 512]:.2f} | 0% |" in table
    assert "| control, cropped to 32 |" in table
    assert "| control, window of 32 |" in table
    assert "sink, window" not in table
    assert not list(Path("ablation").rglob("*.safetensors"))
    monkeypatch.setattr("hf_alibi.commands.ablation.compare", lambda *args: pytest.fail("evaluated again"))
    assert ablation(write(**asked))["by_length"] == results["by_length"]
    with refused("ablation/control/seed-1 holds a run without this evaluation, and no weights"):
        ablation(write(**{**asked, "probe_cases": 2}))


def test_complete_runs_are_not_repeated(monkeypatch):
    first = ablation(write(rows=ROWS, seeds=[1], output_dir="ablation"))
    monkeypatch.setattr("hf_alibi.commands.ablation.train", lambda *settings: pytest.fail("trained again"))
    again = ablation(write(rows=ROWS, seeds=[1], output_dir="ablation"))
    assert again["rows"] == first["rows"]
    with refused("holds a run with other settings"):
        ablation(write(rows=ROWS, seeds=[1], output_dir="ablation", learning_rate=2e-3))


@pytest.mark.parametrize(
    ("command", "values", "message"),
    [
        (finetune, {"match_tokens": -1}, "match_tokens is -1; it must be at least 0"),
        (finetune, {"distill_epochs": 0}, "distill_epochs is 0; it must be above 0"),
        (finetune, {"match_tokens": 10**9}, "match_tokens is 1,000,000,000, but there are"),
        (finetune, {"distill_tokens": BLOCK}, "was given 1 blocks of text and needs at least 16"),
        (finetune, {"budget_tokens": 40}, "budget_tokens 40 are less than one step of 128 tokens"),
        (finetune, {"budget_tokens": 4}, "budget_tokens is 4, less than one block of 32 tokens"),
        (finetune, {"max_steps": 4}, "both budget_tokens and max_steps given"),
        (
            finetune,
            {"train_file": None, "dataset_name": "probes", "probe_block_size": 64},
            "probe_block_size is 64 and block_size 32, so blocks would cut prompts",
        ),
        (run, {"attention": "nope"}, "leave attention as alibi"),
        (run, {"lengths": [32, 64], "scored_tokens": 12_800}, "the text has"),
        (ablation, {"rows": None}, "rows is None; it must be a mapping"),
        (ablation, {"rows": {"a": 1}}, "it must be a mapping, {name: {field: value"),
        (ablation, {"rows": ROWS, "control": "other"}, "control is 'other'; the rows are control, none, sink"),
        (ablation, {"rows": {"a b": {}, "a-b": {}}}, "do not have folders of their own"),
        (ablation, {"rows": {"a": {"sink_token": 1}}}, "unknown field 'sink_token'"),
        (ablation, {"rows": ROWS, "lengths": [32, 64], "scored_tokens": 6400, "stride": 4}, "more text, fewer scored"),
        (ablation, {"rows": ROWS, "lengths": [32], "baselines": ["yarn"]}, "baselines names 'yarn'; allowed"),
    ],
)
def test_what_cannot_be_is_refused_before_training(command, values, message):
    with refused(message):
        command(write(**values))
    assert not Path("run").exists()


@pytest.mark.parametrize("name", ["smollm2", "gpt2-small", "retrieval"])
def test_every_row_of_the_shipped_ablations_is_valid(name, monkeypatch):
    trained = []

    def train(args, recipe, data, training):
        trained.append((args.attention, args.budget_tokens, recipe.steps()))
        raise InputError("enough")

    monkeypatch.setattr("hf_alibi.commands.ablation.train", train)
    monkeypatch.setattr("hf_alibi.commands.ablation._check_text", lambda *settings: None)
    with pytest.raises(InputError, match="enough"):
        ablation(
            [str(CONFIGS / f"ablation/{name}.yaml"), *([] if name == "gpt2-small" else ["--train_file", "text.txt"])]
        )
    [(attention, budget, steps)] = trained
    assert (attention, budget > 0, steps) == ("original", True, [])


@pytest.mark.parametrize(
    ("name", "parts"),
    [("smollm2", {"sink_tokens", "mlp_rate_scale", "embedding_rate_scale"}), ("gpt2-small", set())],
)
def test_the_shipped_conversions_have_the_whole_recipe(name, parts):
    values = read_yaml(CONFIGS / f"convert/{name}.yaml")
    assert {"match_tokens", "distill_tokens", *parts} <= values.keys()
    make_settings(_CLASSES, values)


def test_the_shipped_teacher_reads_the_text_that_its_conversion_reads():
    teacher, converted = (read_yaml(CONFIGS / f"{command}/smollm2.yaml") for command in ("finetune", "convert"))
    for name in ("model_name_or_path", "block_size", "validation_fraction"):
        assert teacher[name] == converted[name]
    classes = (FinetuneArguments, ConversionArguments, DataArguments, TrainingArguments)
    args, recipe, *_ = make_settings(classes, {**teacher, "train_file": ["text.txt"]})
    assert (args.attention, recipe.steps()) == ("original", [])


def test_a_fine_tuned_model_is_converted_and_teaches():
    finetune(write(attention="original", output_dir="tuned"))
    asked = {"model_name_or_path": "tuned", "teacher_name_or_path": "tuned"}
    result = convert({**SETTINGS, **asked}, **RECIPE, **COMPARISON)
    assert result["training"]["config"]["teacher_name_or_path"] == "tuned"
    # What is learned is the distance to the teacher, far less than the loss of the text.
    assert result["training"]["train_loss"] < 0.5 * result["training"]["eval_loss"]
    assert result["evaluation"]["models"]["original"]["source"] == "tuned"


def test_a_conversion_that_is_trained_further_says_so():
    convert(SETTINGS, **COMPARISON)
    assert json.loads(Path("run/metrics.json").read_text())["continued"] is False
    further = {"model_name_or_path": "run", "output_dir": "further", "budget_tokens": 2 * 4 * BLOCK}
    assert finetune(write(**further))["continued"] is True
