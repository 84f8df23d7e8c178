"""Files, folders and patterns that a setting may name, and what each kind of file gives."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_alibi.errors import InputError
from hf_alibi.training.files import load_files


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    return home


def read(*names, column="text"):
    return load_files([str(name) for name in names], column)["text"][:]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("name", ["a[1].txt", "s*.txt", "q?.txt", "{a,b}.txt", "ä b.txt", "#1.jsonl", "**.csv"])
def test_a_file_is_read_under_its_very_name(name, folder):
    # What the name would match as a pattern.
    for other in ("a1.txt", "sx.txt", "qx.txt", "a.txt", "b.txt", "x.csv"):
        (folder / other).write_text("text\nWRONG")
    content = {".txt": "right", ".jsonl": lines({"text": "right"}), ".csv": "text\nright\n"}
    (folder / name).write_text(content[Path(name).suffix])
    assert read(name) == read(folder / name) == ["right"]


@pytest.mark.parametrize("name", ["a.TXT", "a.Txt.GZ", "a.txt.gz", "a.txt.bz2", "a.txt.xz"])
def test_text_in_any_case_and_compressed(name, folder):
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(Path(name).suffix.lower(), open)
    with opened(folder / name, "wt") as file:
        file.write("one\ntwo")
    assert read(name) == ["one\ntwo"]


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "csv", "tsv"])
def test_records_in_any_case_and_compressed(extension, folder):
    content = {
        "jsonl": lines({"text": 'a, "b"', "n": 1}),
        "csv": 'n,text\n1,"a, ""b"""\n',
        "tsv": 'n\ttext\n1\t"a, ""b"""\n',
    }
    content = content[extension.split(".")[0]].encode()
    (folder / f"a.{extension}").write_bytes(gzip.compress(content) if extension.endswith("gz") else content)
    assert read(f"a.{extension}") == ['a, "b"']


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", "word"), ("a.jsonl", lines({"text": "word"})), ("a.csv", "text\nword\n")]
)
def test_a_byte_order_mark_is_no_text(name, content, folder):
    (folder / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read(name) == ["word"]


def test_folders_and_patterns_in_the_order_of_names(folder):
    (folder / "data/deep").mkdir(parents=True)
    for name in ("data/b.txt", "data/a.txt", "data/deep/c.jsonl"):
        (folder / name).write_text(lines({"text": name}) if name.endswith("jsonl") else name)
    (folder / "data/notes.pdf").write_text("no text")
    everything = ["data/a.txt", "data/b.txt", "data/deep/c.jsonl"]
    assert read("data") == read("~/data") == read(folder / "data") == read("data/**") == everything
    assert read("data/*.txt") == read("~/data/[ab].txt") == everything[:2]
    assert read("data/b.txt", "data/*.txt") == ["data/b.txt", *everything[:2]]


def test_files_may_differ_in_their_other_columns(folder):
    (folder / "a.jsonl").write_text(lines({"text": "a", "id": 1}))
    (folder / "b.jsonl").write_text(lines({"text": "b", "id": "one", "more": {"x": [1]}}))
    assert read("a.jsonl", "b.jsonl") == ["a", "b"]


def test_other_types_of_text(folder):
    (folder / "dates.jsonl").write_text(lines({"text": "2020-01-01 10:00:00"}, {"text": "2021-02-03 00:00:00"}))
    assert read("dates.jsonl") == ["2020-01-01 10:00:00", "2021-02-03 00:00:00"]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        pq.write_table(pa.table({"text": pa.array(["a", None, "b"], kind)}), folder / f"{kind}.parquet")
        assert read(f"{kind}.parquet") == ["a", None, "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "mixed.jsonl",
            lines({"text": "a"}, {"text": 1}),
            "'text' of mixed.jsonl holds int and str, not text alone",
        ),
        ("numbers.csv", "text\n1\n2\n", "holds int64, not text alone"),
        ("lists.jsonl", lines({"text": ["a"]}), "holds list, not text alone"),
        ("other.csv", "words\na\n", "no column 'text'; set text_column to one of words"),
    ],
)
def test_what_is_not_text_is_named(name, content, message, folder):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        read(name)
    assert "\n" not in str(raised.value)


def test_nothing_to_read(folder):
    (folder / "empty").mkdir()
    (folder / "empty/a.pdf").write_text("x")
    for name, message in {
        "empty": "no file that can be read in the folder empty",
        "*.txt": r"no file \*.txt; give existing .txt,",
        "gone.txt": "no file gone.txt",
        "empty/a.pdf": "its extension must be one of .txt",
    }.items():
        with pytest.raises(InputError, match=message):
            read(name)


def test_a_cache_that_cannot_be_written_is_named(folder, monkeypatch):
    (folder / "a.txt").write_text("text")
    (folder / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "file" / "cache")
    with pytest.raises(InputError, match=r"cannot write to .*cache.*set the environment variable HF_DATASETS_CACHE"):
        read("a.txt")
