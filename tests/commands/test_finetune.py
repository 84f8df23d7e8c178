import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from helpers.runs import BYTES, config_file, cut, drop_weight, held_out, refused, run_python
from hf_alibi.commands import finetune as finetune_command
from hf_alibi.commands.fields import read_yaml
from hf_alibi.commands.finetune import finetune
from hf_alibi.training.checkpoints import last_complete_checkpoint
from hf_alibi.training.data import load_tokenizer, load_tokens
from hf_alibi.training.settings import DataArguments
from hf_alibi.training.token_blocks import TokenBlocks
from hf_alibi.training.trainer import RateScales, divergence, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread", "workplace")

BLOCK = 32
FRESH = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": BLOCK}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, **HEADS}
LLAMA = {"model_type": "llama", **SIZES}
EXPERTS = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
MIXTURE = {"model_type": "mixtral", **SIZES, **EXPERTS}
# Dropout is on by default in GPT-2, so the state of the random numbers matters too.
SETTINGS = {
    "model_config": FRESH,
    "tokenizer_name": "bytes",
    "train_file": ["text.txt"],
    "output_dir": "run",
    "block_size": BLOCK,
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "save_steps": 4,
    "disable_tqdm": True,
}
RESUME = ("--resume_from_checkpoint", "true")


def run(*words, **values):
    """Fine-tune with SETTINGS and `values`, of which None removes a setting, and `words` on the command line."""
    return finetune([*config_file({**SETTINGS, **values}), *words])


def start_from(folder):
    return {"model_config": None, "model_name_or_path": folder}


def save_model(folder, config=FRESH, *, seed=0, **changes):
    """Save a random model, without a tokenizer."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**config, "vocab_size": BYTES, "bos_token_id": 1, "eos_token_id": 1, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def weights(folder):
    return load_file(Path(folder, "model.safetensors"))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def card(folder="run"):
    return Path(folder, "README.md").read_text()


def test_output_folder(workplace):
    metrics = run()
    texts = {"README.md", "config.json", "config.yaml", "metrics.json"}
    others = {"generation_config.json", "model.safetensors", "tokenizer_config.json"}
    checkpoints = {"checkpoint-4", "checkpoint-8", "checkpoint-12"}
    assert {path.name for path in Path("run").iterdir()} == texts | others | checkpoints
    assert json.loads(Path("run/metrics.json").read_text()) == metrics
    for name in texts:
        assert str(workplace) not in Path("run", name).read_text()
    assert json.loads(Path("run/config.json").read_text())["use_cache"] is True


def test_metrics_are_those_of_the_saved_model():
    metrics = run()
    model = AutoModelForCausalLM.from_pretrained("run")
    assert type(model).__name__ == "AlibiGPT2LMHeadModel"
    assert model.config.alibi_train_length == BLOCK
    assert AutoTokenizer.from_pretrained("run").model_max_length > 10**20
    loss, blocks = held_out("run", tokenizer="run")
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    num_bytes = sum(int(token) > 2 for token in blocks.flatten())
    assert metrics["bits_per_byte"] == pytest.approx(loss / math.log(2) * blocks.numel() / num_bytes, rel=1e-3)
    assert metrics["tokens_seen"] == 12 * 4 * BLOCK
    # Logged at steps 5, 10 and, where training ends, 12, and at checkpoints: each is a mean since the one before.
    logged = [(entry["step"], entry["loss"]) for entry in metrics["history"] if "loss" in entry]
    steps = [0, *(step for step, _ in logged)]
    total = sum((step - before) * loss for before, (step, loss) in zip(steps, logged, strict=False))
    assert metrics["train_loss"] == pytest.approx(total / 12)
    assert metrics["last_train_loss"] == logged[-1][1] < metrics["train_loss"] < logged[0][1]
    assert [entry["step"] for entry in metrics["history"] if "eval_loss" in entry] == [6, 12]


@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing_factor": 0.3}, {"model_config": MIXTURE}, {"model_config": MIXTURE, "attention": "original"}],
)
def test_held_out_losses_are_of_the_text_alone(settings):
    """Label smoothing and the auxiliary loss of a router belong to training; neither is in the held-out loss."""
    metrics = run(**settings)
    expected, _ = held_out("run")
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-3)
    measured = [entry["eval_loss"] for entry in metrics["history"] if "eval_loss" in entry]
    assert measured[-1] == pytest.approx(expected, abs=1e-4)
    # Training itself has them still.
    plain = run(**{**settings, "label_smoothing_factor": 0.0, "output_dir": "plain"})
    if "label_smoothing_factor" in settings:
        assert metrics["train_loss"] > plain["train_loss"] + 0.1
        assert "(label smoothing of 0.3 included)" in card()
    else:
        assert metrics["train_loss"] > metrics["eval_loss"] + 0.3


def test_the_model_card_renders_and_says_what_the_held_out_loss_is():
    run()
    code = card().split("```")
    assert len(code) == 3
    assert code[1].startswith("python\nimport hf_alibi")
    assert "(non-overlapping blocks of 32 tokens, whose tokens see 1 to 31 before them)" in card()
    saved = read_yaml("run/config.yaml")
    assert {"seed": 42, "weight_decay": 0.0, "lr_scheduler_type": "linear"}.items() <= saved.items()


def test_saved_config_repeats_the_run():
    run(seed=7)
    finetune(["run/config.yaml", "--output_dir", "again"])
    assert same(weights("run"), weights("again"))
    finetune(["run/config.yaml", "--output_dir", "other", "--seed", "8"])
    assert not same(weights("run"), weights("other"))


@pytest.mark.parametrize(
    ("attention", "class_name"),
    [("alibi", "AlibiGPT2LMHeadModel"), ("original", "GPT2LMHeadModel"), ("nope", "AlibiGPT2LMHeadModel")],
)
def test_attention_of_a_checkpoint(attention, class_name):
    save_model("base")
    run(**start_from("base"), attention=attention, max_steps=2)
    model = AutoModelForCausalLM.from_pretrained("run").eval()
    assert type(model).__name__ == class_name
    # With no positions the order of earlier tokens cannot matter, with positions it must.
    tokens = torch.arange(3, 19)[None]
    swapped = tokens.clone()
    swapped[0, [2, 9]] = swapped[0, [9, 2]]
    change = (model(tokens).logits[0, -1] - model(swapped).logits[0, -1]).abs().max().item()
    assert (change < 1e-5) == (attention == "nope")


def test_llama_checkpoint():
    save_model("base", LLAMA)
    run(**start_from("base"), max_steps=2, use_cpu=True, bf16=True)
    assert type(AutoModelForCausalLM.from_pretrained("run")).__name__ == "AlibiLlamaForCausalLM"
    assert "Started from: base\n" in card()


def test_converted_model_is_trained_further_at_another_length():
    run(max_steps=2)
    run(**start_from("run"), output_dir="longer", block_size=2 * BLOCK, max_steps=2)
    assert AutoModelForCausalLM.from_pretrained("longer").config.alibi_train_length == 2 * BLOCK


@pytest.mark.parametrize("attention", ["alibi", "original"])
@pytest.mark.parametrize(("mlp", "embedding"), [(1.0, 1.0), (0.5, 0.25), (0.5, 0.0), (0.0, 2.0)])
def test_rate_scales_are_the_size_of_a_step(attention, mlp, embedding):
    # Adam's first step is as long as the rate in every weight that has a gradient.
    save_model("base", LLAMA)
    rate = 2e-3
    scales = {"mlp_rate_scale": mlp, "embedding_rate_scale": embedding}
    one_step = {"max_steps": 1, "learning_rate": rate, "warmup_steps": 0, "weight_decay": 5.0}
    metrics = run(**start_from("base"), attention=attention, **one_step, **scales)
    before, after = weights("base"), weights("run")
    assert metrics["config"]["mlp_rate_scale"] == mlp
    for name, weight in before.items():
        scale = 1.0 if "self_attn" in name else embedding if "embed" in name or "lm_head" in name else mlp
        decay = 0.0 if "norm" in name else 5.0
        assert scale != 0 or torch.equal(after[name], weight), name
        step = after[name] - (1 - rate * scale * decay) * weight
        assert step.abs().max().item() == pytest.approx(rate * scale, abs=1e-6), name


def test_a_rate_scale_of_0_freezes():
    save_model("base", LLAMA)
    model = AutoModelForCausalLM.from_pretrained("base")
    blocks = TokenBlocks(torch.zeros(2, BLOCK, dtype=torch.int64))
    scales = RateScales(mlp=0.0, embeddings=0.0)
    make_trainer(model, load_tokenizer("bytes"), TrainingArguments("run", report_to="none"), blocks, None, scales)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "self_attn" in name}


def taught_by(teacher):
    return {**start_from("base"), "attention": "original", "teacher_name_or_path": teacher}


def test_a_share_of_the_blocks_teaches_probes(monkeypatch):
    seen = []
    make = finetune_command.make_trainer
    monkeypatch.setattr(finetune_command, "make_trainer", lambda *args: seen.append(args[3]) or make(*args))
    save_model("base", LLAMA)
    run(**start_from("base"), max_steps=1, block_size=200, probe_share=0.25, probe_tasks=["passkey"])
    tokenizer, blocks = load_tokenizer("bytes"), seen[0]
    texts = [tokenizer.decode(blocks[index]["input_ids"]) for index in range(len(blocks))]
    hidden = [text for text in texts if "A pass key is hidden" in text]
    assert len(hidden) / len(texts) == pytest.approx(0.25, abs=0.5 / len(texts) + 0.01)
    assert "grass" not in "".join(hidden)
    assert not any("pass key" in text for text in texts if text not in hidden)


def test_a_teacher_is_learned_and_not_the_text():
    save_model("teacher", LLAMA, seed=1, initializer_range=0.3)
    save_model("base", LLAMA)
    asked = {**taught_by("teacher"), "max_steps": 40, "logging_steps": 20, "eval_strategy": "no"}
    metrics = run(**asked)
    text = run(**{**asked, "teacher_name_or_path": None}, output_dir="text")
    models = {name: AutoModelForCausalLM.from_pretrained(name).eval() for name in ("base", "run", "text", "teacher")}
    (stream,) = load_tokens(DataArguments(train_file=["text.txt"]), load_tokenizer("bytes")).train
    ids = stream[: 4 * BLOCK].read().view(4, BLOCK)

    @torch.no_grad()
    def distance(name):
        predicted, wanted = (models[of](ids).logits.double().softmax(-1) for of in (name, "teacher"))
        return (wanted * (wanted / predicted).log()).sum(-1).mean().item()

    assert distance("run") < 0.8 * distance("base")
    assert distance("text") > distance("base")
    # The held-out loss is that of the text, which this teacher knows nothing of.
    assert metrics["eval_loss"] > 5 > text["eval_loss"]
    assert metrics["train_loss"] < 1
    assert "nats per token (the distance to what a teacher predicts)" in card()
    assert "teacher" not in card("text")


def test_a_share_of_the_teacher_and_the_rest_of_the_text():
    """One step of plain gradient descent is that of the teacher and that of the text in these shares."""
    save_model("teacher", LLAMA, seed=1, initializer_range=0.3)
    save_model("base", LLAMA)
    asked = {**taught_by("teacher"), "max_steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "optim": "sgd"}
    asked |= {"eval_strategy": "no", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    run(**asked, output_dir="taught")
    run(**{**asked, "teacher_name_or_path": None}, output_dir="text")
    run(**asked, teacher_share=0.25, output_dir="both")
    taught, of_text, both = weights("taught"), weights("text"), weights("both")
    for name, weight in both.items():
        expected = 0.25 * taught[name] + 0.75 * of_text[name]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-4)
    assert any(not torch.allclose(taught[name], of_text[name], atol=1e-4) for name in both)
    assert "what a teacher predicts, 0.25 of it, and the loss of the text)" in card("both")


def test_a_teacher_of_itself_leaves_the_model_as_it_is():
    save_model("base", LLAMA)
    run(**taught_by("base"), max_steps=2, weight_decay=0.0, optim="sgd")
    torch.testing.assert_close(weights("run"), weights("base"), atol=1e-6, rtol=0)


def test_the_divergence_is_exact():
    logits, wanted = torch.randn(2, 3, 5, 7).unbind()
    target = wanted.double().softmax(-1)
    exact = (target * (target / logits.double().softmax(-1)).log()).sum(-1).mean()
    assert divergence(logits, wanted).item() == pytest.approx(exact.item(), rel=1e-6)


def test_a_teacher_counts_the_same_in_accumulated_batches():
    save_model("base", LLAMA)
    save_model("teacher", LLAMA, seed=1, initializer_range=0.3)
    one_step = {"max_steps": 1, "optim": "sgd", "warmup_steps": 0, "learning_rate": 1.0}
    for batch, folder in ((4, "whole"), (2, "parts")):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        run(**taught_by("teacher"), **one_step, **sizes, output_dir=folder)
    assert not same(weights("whole"), weights("base"))
    torch.testing.assert_close(weights("parts"), weights("whole"), atol=1e-5, rtol=0)


def test_no_held_out_text():
    metrics = run(validation_fraction=0.0, eval_strategy="no", max_steps=2)
    assert metrics["eval_loss"] is None
    assert "Held-out loss: unknown" in card()


# Ends itself by SIGKILL in the middle of writing checkpoint-8.
KILLED_RUN = """
import os, pathlib, signal, sys, torch
save = torch.save
def save_or_die(value, file, *args, **kwargs):
    if "checkpoint-8" in str(file) and "optimizer" in str(file):
        pathlib.Path(file).write_bytes(b"PK cut")
        os.kill(os.getpid(), signal.SIGKILL)
    save(value, file, *args, **kwargs)
torch.save = save_or_die
from hf_alibi.cli import main
sys.exit(main(["finetune", "run.yaml"]))
"""


MIXED = {"train_file": ["text.txt", "mine"], "train_weights": [2, 1], "probe_share": 0.25, "block_size": 160}
STREAMED = {"train_file": None, "dataset_name": "mine", "streaming": True, "max_tokens": 4000}


@pytest.mark.parametrize("data", [{}, MIXED, STREAMED], ids=["a file", "a mixture", "streamed"])
def test_killed_run_resumes_to_the_same_end(data):
    Path("mine").mkdir()
    words = Path("text.txt").read_text()
    lines = [json.dumps({"text": words[start : start + 200]}) for start in range(0, 5000, 200)]
    Path("mine/train.jsonl").write_text("\n".join(lines))
    epochs = {"num_train_epochs": 3, "max_steps": None, "logging_steps": 3, **data}
    whole = run(output_dir="whole", **epochs)
    assert whole["steps"] > 12  # more than one epoch
    argv = config_file({**SETTINGS, **epochs, "output_dir": "killed"})
    done = run_python("-c", KILLED_RUN)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Path("killed/checkpoint-8").is_dir()
    assert last_complete_checkpoint(Path("killed")) == Path("killed/checkpoint-4")
    resumed = finetune([*argv, *RESUME])
    for name in ("train_loss", "eval_loss", "steps", "tokens_seen", "history"):
        assert resumed[name] == whole[name], name
    assert same(weights("whole"), weights("killed"))


def test_run_killed_after_its_last_step_is_only_finished():
    whole = run()
    trained = weights("run")
    for name in ("metrics.json", "model.safetensors", "README.md"):
        Path("run", name).unlink()
    resumed = run(*RESUME)
    assert (resumed["steps"], resumed["eval_loss"]) == (12, whole["eval_loss"])
    assert same(weights("run"), trained)


def test_resume_without_a_checkpoint_starts_from_the_beginning(capsys):
    Path("run/checkpoint-4").mkdir(parents=True)
    metrics = run(*RESUME, max_steps=2)
    assert metrics["steps"] == 2
    assert "no complete checkpoint in run: starting from the beginning" in capsys.readouterr().out


def test_damaged_checkpoints_are_passed_over():
    run()
    folder, newest, older = Path("run"), Path("run/checkpoint-12"), Path("run/checkpoint-8")
    assert last_complete_checkpoint(folder) == newest
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[: len(content) // 2])
        assert last_complete_checkpoint(folder) == older, f"cut {name}"
        (newest / name).unlink()
        assert last_complete_checkpoint(folder) == older, f"no {name}"
        (newest / name).write_bytes(content)
    assert last_complete_checkpoint(folder) == newest


def stops(message, *words, trains=False, **values):
    """Check that a run stops with one line before its first step, and leaves the folder as it was."""

    def written():
        return Path("run").exists(), sorted(Path("run").rglob("*"))

    steps, before, training_step = [], written(), Trainer.training_step
    with pytest.MonkeyPatch.context() as patch, refused(message):
        patch.setattr(Trainer, "training_step", lambda *args: steps.append(args) or training_step(*args))
        run(*words, **values)
    assert bool(steps) == trains
    assert trains or written() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_config": None}, "neither of model_name_or_path and model_config"),
        ({"model_name_or_path": "base"}, "both of model_name_or_path and model_config"),
        ({"model_config": "gpt2"}, "'gpt2' is not JSON"),
        ({"model_config": [1]}, "must be a mapping"),
        ({"model_config": {"n_layer": 2}}, "cannot build a model"),
        ({"model_config": {**FRESH, "n_layers": 2}}, "unknown field 'n_layers'"),
        ({"model_config": {**FRESH, "n_head": 3}}, "cannot build a model"),
        ({"model_config": {**FRESH, "vocab_size": 100}}, "the model embeds only 100 tokens"),
        ({"tokenizer_name": None}, "no tokenizer of its own"),
        ({"block_size": 1}, "block_size is 1"),
        ({"block_size": 10_000}, "the training text has .* tokens, too few"),
        ({"block_size": 1000}, "the held-out text has .* tokens, too few"),
        ({"attention": "original", "block_size": 2 * BLOCK}, f"beyond the model's {BLOCK} learned positions"),
        ({"mlp_rate_scale": -0.1}, r"mlp_rate_scale is -0\.1; it must be at least 0"),
        ({"embedding_rate_scale": float("inf")}, "embedding_rate_scale is inf"),
        ({"attention": "rope"}, "invalid choice: 'rope'"),
        ({"train_file": ["gone.txt"]}, r"no file gone\.txt"),
        ({"learning_rat": 1}, "unknown field 'learning_rat'"),
        ({"attn_implementation": "flex_attention"}, "flex_attention"),
        ({"attn_implementation": "fast"}, "cannot build a model"),
        ({"output_dir": "text.txt"}, "text.txt is a file"),
        ({"output_dir": "text.txt/run"}, "Not a directory"),
        ({"resume_from_checkpoint": "gone"}, "gone is not a complete checkpoint"),
        ({"validation_fraction": 0.0}, "the held-out text has 0 tokens"),
        ({"model_config": {"model_type": "bloom"}}, "cannot convert the model to ALiBi: no ALiBi for .* 'bloom'"),
    ],
)
def test_refused_before_training(values, message):
    stops(message, **values)


def test_folder_in_use_is_left_alone():
    Path("run").mkdir()
    Path("run/thesis.tex").write_text("years of work")
    stops("run is not empty")
    stops("run is not empty", *RESUME)
    assert Path("run/thesis.tex").read_text() == "years of work"


def test_earlier_run_is_not_overwritten():
    run(max_steps=2)
    stops("choose another folder, or resume .* `--resume_from_checkpoint true`", max_steps=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 300}, r"the teacher 'teacher' predicts 300 tokens and the model 259; give a teacher with"),
        ({"n_positions": 16}, r"beyond the 16 learned positions of the teacher 'teacher'; set block_size to"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(sizes, message):
    save_model("base", LLAMA)
    save_model("teacher", **sizes)
    stops(message, **taught_by("teacher"))


def _widen(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 16', '"n_embd": 32'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "cannot load .*'base'.*check that its files are complete"),
        (lambda folder: drop_weight(folder, "c_attn.weight"), "the model 'base' lacks 1 of its weights"),
        (_widen, "cannot load the model 'base'"),
        (lambda folder: (folder / "config.json").unlink(), "cannot load the model 'base'"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "cannot load the model 'base'",
        ),
        (shutil.rmtree, "model_name_or_path is 'base': there is no such folder"),
    ],
)
def test_damaged_model_is_refused(damage, message):
    save_model("base")
    damage(Path("base"))
    stops(message, **start_from("base"))


def test_other_families_train():
    run(model_config={"model_type": "qwen3", **SIZES, "head_dim": 8}, max_steps=2)
    assert json.loads(Path("run/config.json").read_text())["model_type"] == "alibi_qwen3"


@pytest.mark.parametrize("attention", ["original", "nope"])
def test_converted_model_is_not_taken_for_a_control(attention):
    run(max_steps=2, output_dir="converted")
    message = "converted is already converted; set attention: alibi"
    stops(message, **start_from("converted"), attention=attention)


def test_loss_that_is_not_finite_stops_the_run():
    diverges = {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0.0}
    stops(r"the training loss is (nan|inf) at step \d+.*lower learning_rate", trains=True, **diverges)
    assert not Path("run/model.safetensors").exists()
    assert not Path("run/metrics.json").exists()


def test_weights_that_are_not_finite_are_not_saved():
    one_step = {"learning_rate": 1e38, "weight_decay": 1e38, "warmup_steps": 0, "max_steps": 1, "eval_strategy": "no"}
    stops("is not finite|loss is nan", trains=True, **one_step)
    assert {path.name for path in Path("run").iterdir()} == {"config.yaml"}
