from pathlib import Path

import pytest
from transformers import TrainingArguments

from helpers.runs import ROOT, config_file, raising, run_python
from hf_alibi import cli
from hf_alibi.commands.fields import field_names, training_fields
from hf_alibi.commands.settings import load_settings
from hf_alibi.conversion.settings import ConversionArguments
from hf_alibi.errors import InputError
from hf_alibi.training.settings import DataArguments, FinetuneArguments


def fake(monkeypatch, action, name="finetune"):
    """Put `action` in the place of a command."""
    monkeypatch.setattr(f"hf_alibi.{cli._COMMANDS[name].run.replace(':', '.')}", action)


@pytest.mark.parametrize("command", [name for name, command in cli._COMMANDS.items() if command.settings])
def test_help_is_the_packages_own_fields_on_one_screen(command, capsys):
    assert cli.main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: hf-alibi {command} [CONFIG.yaml] [--field value ...]"
    assert len(lines) < 60
    assert any(line.startswith("  --") for line in lines)


def test_help_all_has_every_field(capsys):
    assert cli.main(["finetune", "--help-all"]) == 0
    found = capsys.readouterr().out
    assert "usage: hf-alibi finetune [CONFIG.yaml]" in found
    assert all(f"--{name}" in found for name in (*field_names([FinetuneArguments]), *training_fields()))


def test_help_and_mistyped_fields_take_no_torch():
    code = """
import sys
from hf_alibi.cli import main
codes = [main(["finetune", "--help"]), main(["convert", "--blok_size", "3"]), main(["benchmark", "--heds=3"])]
codes += [main(["export", "gguf", "--help"]), main(["verify", "--help"]), main(["verify", "tgi", "x"])]
print(codes, "torch" in sys.modules)
"""
    done = run_python("-c", code)
    assert done.stdout.splitlines()[-1] == "[0, 1, 1, 0, 0, 2] False"
    assert "unknown field 'blok_size' in the command line; did you mean block_size" in done.stderr
    assert "did you mean heads" in done.stderr


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hf-alibi ")


@pytest.mark.parametrize("argv", [[], ["finetun", "run.yaml"]])
def test_wrong_usage(argv, capsys):
    assert cli.main(argv) == 2
    assert "commands: convert, finetune, extrapolate, ablation, benchmark, export, verify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (InputError("bad\nvalue"), 1, "hf-alibi: error: bad value\n"),
        (OSError("bad value"), 1, "hf-alibi: error: bad value\n"),
        (InputError("not wrapped " * 50 + "end"), 1, "hf-alibi: error: " + "not wrapped " * 50 + "end\n"),
        (KeyboardInterrupt(), 130, "hf-alibi: interrupted\n"),
    ],
)
def test_errors_are_one_line(error, code, printed, monkeypatch, capsys):
    fake(monkeypatch, raising(error))
    assert cli.main(["finetune"]) == code
    captured = capsys.readouterr()
    assert captured.err == printed
    assert captured.out == ""


def test_bugs_keep_their_traceback(monkeypatch):
    fake(monkeypatch, raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["finetune"])


def test_arguments_reach_the_command(monkeypatch, tmp_path):
    seen = []
    fake(monkeypatch, seen.append)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("block_size: 8\n")
    assert cli.main(["finetune", "run.yaml", "--seed", "1"]) == 0
    assert seen == [["run.yaml", "--seed", "1"]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "probes", "gpt2-small"])
def test_shipped_configs_are_valid(name):
    classes = (FinetuneArguments, ConversionArguments, DataArguments, TrainingArguments)
    argv = [str(ROOT / f"configs/finetune/{name}.yaml")]
    arguments, _, data, training = load_settings(classes, argv)
    assert arguments.attention == ("original" if name == "gpt2-small" else "alibi")
    assert data.dataset_name is not None
    assert data.probe_block_size in (None, arguments.block_size)
    # One of them says how long the training is.
    assert (training.max_steps > 0) == (arguments.budget_tokens is None)
    assert not Path(training.output_dir).is_absolute()


SHIPPED = sorted(ROOT.glob("configs/*/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_fields_of_shipped_configs_are_known_to_their_command(path, monkeypatch):
    seen = []
    fake(monkeypatch, seen.append, name=path.parent.name)
    assert cli.main([path.parent.name, str(path)]) == 0
    assert seen == [[str(path)]]


def test_script_runs_from_start_to_end(tmp_path):
    settings = {
        "model_config": {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16},
        "tokenizer_name": "bytes",
        "train_file": ["text.txt"],
        "block_size": 32,
        "max_steps": 2,
        "output_dir": "run",
    }
    command = [str(ROOT / "scripts/finetune.py"), *config_file(settings, tmp_path / "run.yaml")]
    (tmp_path / "text.txt").write_text("".join(f"{number} is a number. " for number in range(100)))

    first = run_python(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "saved to run" in first.stdout
    assert {"loss.png", "metrics.json", "config.yaml"} <= {path.name for path in (tmp_path / "run").iterdir()}

    second = run_python(*command, cwd=tmp_path)
    assert second.returncode == 1
    assert second.stderr.strip().splitlines()[-1].startswith("hf-alibi: error: output_dir run holds an earlier run")
    assert "Traceback" not in second.stderr
