"""Result files: what goes in comes out, nothing half-written stays, nothing private goes in."""

import csv
import getpass
import json
import platform
import subprocess
from pathlib import Path

import pytest

from helpers.runs import refused
from hf_alibi.reporting import results as module
from hf_alibi.reporting.results import check_output_dir, environment, write_results
from hf_alibi.utils import replacing

STATUS = "cannot run: 8 rows"
ROWS = [
    {"model": "a", "length": 8, "perplexity": 1.5, "status": "ok"},
    {"model": "ä, b", "length": 16, "perplexity": None, "status": STATUS, "extra": 1},
]
RESULTS = {"kind": "extrapolation", "settings": {"train_length": 8}, "rows": ROWS}


def test_the_file_holds_the_results(tmp_path):
    json_path, csv_path = write_results(RESULTS, tmp_path / "new")
    assert (json_path.name, csv_path.name) == ("results.json", "results.csv")
    assert json.loads(json_path.read_text(encoding="utf-8")) == {"schema": 4, **RESULTS}


def test_csv_has_every_field_of_any_row(tmp_path):
    _, path = write_results(RESULTS, tmp_path)
    with path.open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert first == {"model": "a", "length": "8", "perplexity": "1.5", "status": "ok", "extra": ""}
    assert second == {"model": "ä, b", "length": "16", "perplexity": "", "status": STATUS, "extra": "1"}


def test_a_value_that_is_no_number_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_results({"rows": [{"perplexity": float("nan")}]}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "report.md"
    target.write_text("old")

    def interrupted():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.md": "old"}
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.md": "new"}


def test_environment_names_versions_but_no_person_or_place():
    facts = environment(seed=3)
    text = json.dumps(facts)
    assert facts["seed"] == 3
    assert set(facts) == {"python", "system", "device", "threads", "packages", "git_commit", "seed"}
    assert facts["packages"]["torch"] == module.metadata.version("torch")
    assert module._version("no-such-package-here") is None
    for private in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert private not in text
    assert f'"{getpass.getuser()}"' not in text


def test_commit_is_that_of_the_checkout_and_says_when_it_was_changed(tmp_path):
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words]
        subprocess.run(command, check=True, capture_output=True)

    assert module._git_commit(tmp_path) is None
    git("init")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a").write_text("1")
    git("add", ".")
    git("commit", "-m", "m")
    commit = module._git_commit(tmp_path)
    assert len(commit) == 40
    assert module._git_commit(tmp_path / "package") is None
    (tmp_path / "package" / "a").write_text("2")
    assert module._git_commit(tmp_path) == f"{commit}-dirty"


def test_output_dir_must_be_new_or_empty_and_is_not_created(tmp_path):
    check_output_dir(tmp_path)
    check_output_dir(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder, message in (
        (tmp_path, "is not empty"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot be written"),
        (Path("/proc/hf-alibi/out"), "cannot be written"),
    ):
        with refused(message):
            check_output_dir(folder)
