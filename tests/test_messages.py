"""What users are told when they give the wrong thing: one line, with the remedy."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer, TextGenerationPipeline, TrainingArguments

import hf_alibi
from helpers.models import stock_model
from hf_alibi.errors import InputError
from hf_alibi.model import loading
from hf_alibi.model.loading import check_source
from hf_alibi.training.trainer import check_reporters

EVALUATION = {"lengths": [8], "train_length": 8, "scored_tokens": 16}


def test_apply_alibi_takes_a_model():
    pipe = TextGenerationPipeline(model=stock_model("llama"), tokenizer=ByT5Tokenizer())
    for given, remedy in {
        "gpt2": r"got str; load it first: AutoModelForCausalLM.from_pretrained\('gpt2'\)",
        pipe: r"got TextGenerationPipeline; give the model that the TextGenerationPipeline holds, its \.model",
        torch.nn.Linear(1, 1): "got Linear; wrappers such as PEFT's",
    }.items():
        with pytest.raises(TypeError, match=remedy):
            hf_alibi.apply_alibi(given)


def test_evaluation_takes_a_tensor():
    model = hf_alibi.apply_alibi(stock_model("llama"))
    with pytest.raises(InputError, match=r"tokens is a list; give a tensor, torch.tensor\(tokens\)"):
        hf_alibi.evaluate_extrapolation(model, [1, 2, 3] * 20, **EVALUATION)


def test_an_unknown_implementation_is_refused_in_the_words_of_transformers(tmp_path):
    hf_alibi.apply_alibi(stock_model("llama")).save_pretrained(tmp_path)
    message = r'Specified `attn_implementation="foo"` is not supported.*supported: eager, sdpa, flex_attention'
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="foo")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path).set_attn_implementation("foo")


def test_reports_print_as_a_table():
    reports = hf_alibi.verify_alibi(hf_alibi.apply_alibi(stock_model("llama")))
    head, *rows = str(reports).splitlines()
    assert head.split() == ["layer", "heads", "slopes,", "error", "of", "the", "output"]
    assert [row.split()[:5] for row in rows] == [
        [f"model.layers.{index}.self_attn", "4", "0.00390625", "to", "0.25"] for index in range(2)
    ]
    assert isinstance(reports, list)
    assert max(len(line) for line in str(reports).splitlines()) < 80


class _Unreachable(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "on_the_hub", "message"),
    [
        ("runs/gone", False, "model is 'runs/gone': there is no such folder, and the hub has no model of that name"),
        ("./runs/gone/x", False, "there is no such folder, and it is not a name on the hub"),
        ("runs/gone", _Unreachable("no route"), r"the hub could not be asked for a model of that name \(no route\)"),
        ("somebody/model", True, None),
    ],
)
def test_a_model_that_is_nowhere(name, on_the_hub, message, monkeypatch):
    def file_exists(repo_id, filename):
        if repo_id.count("/") > 1:
            raise loading.HFValidationError("no name")
        if isinstance(on_the_hub, Exception):
            raise on_the_hub
        return on_the_hub

    monkeypatch.setattr(loading, "file_exists", file_exists)
    if message is None:
        check_source(name, "model")
    else:
        with pytest.raises(InputError, match=message):
            check_source(name, "model")


def test_folders_and_nothing_need_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "file_exists", lambda *_: pytest.fail("asked the hub"))
    check_source(str(tmp_path), "model")
    check_source(None, "model")


def test_a_missing_package_of_report_to(tmp_path, monkeypatch):
    training = TrainingArguments(output_dir=str(tmp_path), report_to=["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"WandbCallback requires wandb to be installed.*leave it out of report_to"):
        check_reporters(training)
    check_reporters(TrainingArguments(output_dir=str(tmp_path), report_to=[]))


def run(*words, **environment):
    """Exit code and lines on stderr of the command line."""
    result = subprocess.run(
        [sys.executable, "-m", "hf_alibi", *words],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )
    return result.returncode, result.stderr.decode(errors="replace").strip().splitlines()


def test_a_name_that_the_locale_cannot_read():
    code, lines = run("finetune", "--output_dir", "öut", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert code == 1
    assert len(lines) == 1
    assert "cannot be read under this locale; set LC_ALL=C.UTF-8" in lines[0]


def test_a_setting_whose_package_is_missing(tmp_path):
    settings = {"output_dir": str(tmp_path / "x"), "deepspeed": "ds.json", "model_config": '{"model_type": "gpt2"}'}
    code, lines = run("finetune", *(f"--{name}={value}" for name, value in settings.items()))
    assert code == 1
    assert lines[-1].startswith("hf-alibi: error: a setting needs a package that is missing: ")
    assert "deepspeed" in lines[-1]
