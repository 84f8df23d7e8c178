import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments

from helpers.runs import config_file, refused
from hf_alibi.commands import settings as settings_module
from hf_alibi.commands.fields import field_names, read_yaml, training_fields
from hf_alibi.commands.settings import load_settings, resolve_settings, save_settings


@dataclasses.dataclass
class Colours:
    hue: str = "red"
    shades: list[str] | None = None
    mix: dict | str | None = None
    depth: float = 0.5
    bright: bool = True


CLASSES = (Colours, TrainingArguments)
NOT_SAVED = ("resume_from_checkpoint", "hub_token", "local_rank", "do_eval", "include_num_input_tokens_seen")


@pytest.fixture
def config(tmp_path):
    def write(**values):
        return config_file({"output_dir": str(tmp_path / "out"), **values}, tmp_path / "run.yaml")[0]

    return write


@pytest.mark.parametrize(
    ("values", "words", "expected"),
    [
        ({"hue": "blue", "shades": ["a", "b"]}, [], {"hue": "blue", "shades": ["a", "b"]}),
        ({"max_steps": 7, "bright": False}, [], {"max_steps": 7, "bright": False}),
        ({"mix": {"a": 1}}, [], {"mix": '{"a": 1}'}),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, [], {"lr_scheduler_kwargs": {"num_cycles": 2}}),
        # The command line wins, in any of its forms, and null takes the value of the file back.
        ({"hue": "blue"}, ["--hue", "green"], {"hue": "green"}),
        ({"hue": "blue"}, ["--hue=green"], {"hue": "green"}),
        ({"shades": ["a"]}, ["--max-steps", "3", "--shades", "x", "y"], {"max_steps": 3, "shades": ["x", "y"]}),
        ({}, ["--no_bright", "--max_steps", "3"], {"max_steps": 3, "bright": False}),
        ({"hue": "blue"}, ["--hue", "null", "--depth", "1"], {"hue": "red", "depth": 1.0}),
        ({"hue": "blue"}, ["--depth", "1", "--hue=null"], {"hue": "red", "depth": 1.0}),
    ],
)
def test_yaml_and_command_line_fill_the_dataclasses(config, values, words, expected):
    colours, training = load_settings(CLASSES, [config(**values), *words])
    found = vars(colours) | vars(training)
    assert {name: found[name] for name in expected} == expected


def test_exponents_without_a_dot_are_floats(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 5e-4\ndepth: -1e-3\n")
    assert yaml.safe_load(path.read_text())["learning_rate"] == "5e-4"  # why this needs care
    colours, training = load_settings(CLASSES, [str(path)])
    assert training.learning_rate == 5e-4
    assert colours.depth == -1e-3


def test_null_is_the_default(tmp_path):
    (tmp_path / "run.yaml").write_text("hue: null\noutput_dir: out\n")
    assert load_settings(CLASSES, [str(tmp_path / "run.yaml")])[0].hue == "red"


def test_the_file_may_be_left_out():
    colours, training = load_settings(CLASSES, ["--hue", "blue", "--output_dir", "out"])
    assert (colours.hue, training.output_dir) == ("blue", "out")
    assert load_settings((Colours,), []) == (Colours(),)


@pytest.mark.parametrize("fast", [True, False])
def test_precision_is_chosen_by_the_device(config, fast, monkeypatch):
    monkeypatch.setattr("hf_alibi.commands.settings._has_fast_bfloat16", lambda: fast)
    assert load_settings(CLASSES, [config(bf16="auto")])[1].bf16 is fast
    assert load_settings(CLASSES, [config(bf16=not fast), "--bf16", "auto"])[1].bf16 is fast
    assert load_settings(CLASSES, [config(bf16=not fast), "--bf16=auto"])[1].bf16 is fast
    assert load_settings(CLASSES, [config(bf16=True)])[1].bf16


@pytest.mark.parametrize(("flags", "fast"), [("avx2 avx512_bf16", True), ("amx_bf16", True), ("avx2 avx512f", False)])
def test_a_cpu_is_fast_by_its_instructions(flags, fast, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda *args, **kwargs: False)
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: f"flags : fpu {flags}\n")
    assert settings_module._has_fast_bfloat16() is fast


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds nothing"), ("- 1", "holds list"), ("a: [", "not valid YAML"), ("a: b: c", "not valid YAML")],
)
def test_yaml_that_is_no_mapping(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with refused(message):
        read_yaml(path)


def test_a_missing_file_is_an_error():
    with refused(r"cannot read the configuration file missing.yaml: No such file"):
        load_settings(CLASSES, ["missing.yaml"])


@pytest.mark.parametrize(
    ("values", "words", "message"),
    [
        ({"learning_rat": 1}, [], r"'learning_rat' in .*run\.yaml; did you mean learning_rate"),
        # argparse would take --max_step for --max_steps
        ({}, ["--max_step", "5"], r"unknown field 'max_step' in the command line; did you mean"),
        ({}, ["--max_step=5", "5"], r"unknown field 'max_step' in the command line; did you mean"),
        ({}, ["--no_hues", "5"], r"unknown field 'no_hues' in the command line; did you mean"),
        ({}, ["--max_steps", "many"], "invalid int value: 'many'"),
        ({}, ["--bright", "perhaps"], "bright"),
        ({}, ["--eval_strategy", "often"], "often"),
        ({}, ["--hue", "blue", "green"], "cannot place 'green'"),
        ({}, ["--hue"], "expected one argument"),
        ({"shades": []}, [], r"shades: \[\] is empty"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(config, values, words, message, capsys):
    with refused(message):
        load_settings(CLASSES, [config(**values), *words])
    assert capsys.readouterr().err == ""


def test_the_fields_of_a_training_are_read_from_its_source():
    assert set(training_fields()) == set(field_names([TrainingArguments]))


def test_saved_settings_load_as_the_same(config, tmp_path):
    argv = [config(shades=["a"], learning_rate=3e-4, warmup_steps=5, eval_strategy="steps", eval_steps=10)]
    first = load_settings(CLASSES, [*argv, "--depth", "0.25", "--lr_scheduler_type", "cosine"])
    save_settings(tmp_path / "saved.yaml", first)
    again = load_settings(CLASSES, [str(tmp_path / "saved.yaml")])
    assert again[0] == first[0]
    assert again[1].to_dict() == first[1].to_dict()


def test_every_setting_is_saved_but_what_belongs_to_the_machine(config, tmp_path):
    settings = load_settings(
        CLASSES, [config(max_steps=5), "--resume_from_checkpoint", "true", "--hub_token", "secret"]
    )
    resolved = resolve_settings(settings)
    own = {"hue": "red", "shades": None, "mix": None, "depth": 0.5, "bright": True}
    assert own.items() <= resolved.items()
    trained = {"max_steps": 5, "seed": 42, "lr_scheduler_type": "linear", "weight_decay": 0.0, "adam_beta2": 0.999}
    assert trained.items() <= resolved.items()
    left_out = settings[1].to_dict().keys() - resolved.keys()
    of_the_cpu = set() if torch.accelerator.is_available() else {"use_cpu", "dataloader_pin_memory"}
    assert left_out == {*NOT_SAVED, *of_the_cpu}
    assert resolved["output_dir"] == str(tmp_path / "out")


def test_mixed_precision_needs_no_word_about_the_cpu(config, monkeypatch):
    """transformers refuses bf16 without an accelerator unless it is told to use the CPU."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda *args, **kwargs: False)
    settings = load_settings(CLASSES, [config(bf16=True)])
    assert settings[1].bf16
    assert settings[1].use_cpu
    assert resolve_settings(settings)["bf16"] is True
    assert not {"use_cpu", "dataloader_pin_memory"} & resolve_settings(settings).keys()


def test_output_dir_is_kept_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("output_dir: runs/one\n")
    assert resolve_settings(load_settings(CLASSES, ["run.yaml"]))["output_dir"] == "runs/one"


def test_resolving_leaves_the_process_group_alone(config):
    from accelerate import PartialState

    settings = load_settings(CLASSES, [config(use_cpu=True)])
    before = dict(PartialState._shared_state)
    resolve_settings(settings)
    assert PartialState._shared_state is not None
    assert all(PartialState._shared_state[name] is value for name, value in before.items())
