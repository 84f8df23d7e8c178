"""`hf-alibi export` and `hf-alibi verify`: one line for what cannot be used, and a table of what was found."""

import pytest

from helpers.exports import converted
from hf_alibi import cli

pytest.importorskip("gguf")


def test_a_file_is_written_and_the_next_command_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    converted("model")
    assert cli.main(["export", "gguf", "model", "model.gguf", "--type", "q8_0"]) == 0
    assert "Compare it with transformers by: hf-alibi verify gguf model model.gguf" in capsys.readouterr().out
    assert (tmp_path / "model.gguf").stat().st_size > 10_000
    assert cli.main(["export", "gguf", "model", "model.gguf"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "hf-alibi: error: model.gguf exists; give another name, or delete it first"
    ]


def test_wrong_usage(capsys):
    assert cli.main(["export", "gguf", "model"]) == 2
    assert "the following arguments are required: OUT.gguf" in capsys.readouterr().err
    assert cli.main(["verify", "gguf", "model", "model.gguf", "--lenghts", "3"]) == 2


ROW = {"tokens": 10_000, "difference_at_once": 1e-6, "difference": 1.234e-5, "control": 12.34, "same_text": True}
FOUND = {"engine": "an engine 1.0", "bound": 5e-4, "rows": [ROW | {"rounding": None}, ROW | {"rounding": 1e-3}]}
PERPLEXITY = {"engine": "an engine 1.0", "bound": 0.02, "perplexity": {"engine": 10.1, "transformers": 10.0}}


def test_what_was_found_is_printed(monkeypatch, capsys):
    given = []

    def verify(**args):
        given.append(args)
        return FOUND if len(given) == 1 else PERPLEXITY

    monkeypatch.setattr("hf_alibi.export.parity.verify_export", verify)
    assert cli.main(["verify", "vllm", "model", "--lengths", "10", "10000", "--tensor_parallel", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == lines[3].split() == ["10,000", "1.0e-06", "1.2e-05", "yes"]
    assert lines[4].strip() == "from float64, of which transformers in float32 is off by 1.0e-03"
    assert (
        lines[5] == "an engine 1.0 agrees with transformers within 5e-04; without the bias it would be 1.2e+01 or more"
    )
    assert (given[0]["lengths"], given[0]["file"], given[0]["tensor_parallel"]) == ([10, 10000], None, 2)
    assert cli.main(["verify", "gguf", "model", "q8.gguf", "--text_file", "t.txt"]) == 0
    assert (
        "perplexity 10.100, transformers 10.000 with the whole weights: +1.00%, at most +2%" in capsys.readouterr().out
    )


def test_what_differs_is_one_line_and_exit_code_1(monkeypatch, capsys):
    from hf_alibi.errors import VerificationError

    def verify(**_):
        raise VerificationError("an engine differs")

    monkeypatch.setattr("hf_alibi.export.parity.verify_export", verify)
    assert cli.main(["verify", "vllm", "model"]) == 1
    assert capsys.readouterr().err == "hf-alibi: error: not verified: an engine differs\n"
