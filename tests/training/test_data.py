import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch

from helpers.made_up import word_tokenizer
from helpers.runs import BYTES, refused
from hf_alibi.training import data
from hf_alibi.training.data import (
    bos_token_id,
    count_bytes,
    document_numbers,
    load_documents,
    load_tokenizer,
    load_tokens,
)
from hf_alibi.training.settings import DataArguments

EOS = 1  # of the byte tokenizer


pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


def write(name, *texts):
    """Write documents in the format that the file's name says."""
    if name.endswith(".txt"):
        Path(name).write_text("".join(texts))
    elif name.endswith(".parquet"):
        datasets.Dataset.from_dict({"text": list(texts)}).to_parquet(name)
    else:
        datasets.Dataset.from_dict({"text": list(texts)}).to_json(name, lines=name.endswith("l"))
    return name


def documents(**settings):
    return load_documents(DataArguments(**settings))["text"][:]


def split(tokenizer, *texts, validation_fraction=0, **settings):
    """Tokens to train on and held out of documents with these texts."""
    files = [write("a.jsonl", *texts)]
    settings = DataArguments(train_file=files, validation_fraction=validation_fraction, **settings)
    return read(load_tokens(settings, tokenizer))


def read(split):
    """The tokens of a split, that are trained on and that are held out."""
    (train,) = split.train
    return train.read(), split.held_out.read()


def byte_ids(text):
    return [byte + 3 for byte in text.encode()]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file(suffix):
    assert documents(train_file=[write(f"a{suffix}", "one\ntwo\n")]) == ["one\ntwo\n"]


def test_documents_keep_the_order_of_mixed_files():
    files = [write("z.txt", "first"), write("a.jsonl", "second"), write("m.txt", "third")]
    assert documents(train_file=files) == ["first", "second", "third"]


def test_documents_are_joined_by_the_end_of_sequence_token(tokenizer):
    train, held_out = split(tokenizer, "ab", "é")
    assert train.tolist() == [*byte_ids("ab"), EOS, *byte_ids("é"), EOS]
    assert train.dtype == torch.int64
    assert held_out.numel() == 0


def test_equal_and_empty_documents_are_dropped(tokenizer):
    train, _ = split(tokenizer, "ab", "cd", "ab", "", " \n", "ef")
    assert tokenizer.decode(train.tolist()) == "ab</s>cd</s>ef</s>"


def test_the_tail_is_held_out(tokenizer):
    whole, _ = split(tokenizer, "0123456789" * 10)
    train, held_out = split(tokenizer, "0123456789" * 10, validation_fraction=0.2)
    assert len(held_out) == int(0.2 * len(whole))
    assert torch.equal(torch.cat([train, held_out]), whole)


def test_validation_file_shares_no_document_with_training(tokenizer):
    train, held_out = split(tokenizer, "ab", "cd", validation_file=[write("b.jsonl", "cd", "ef")])
    assert tokenizer.decode(train.tolist()) == "ab</s>cd</s>"
    assert tokenizer.decode(held_out.tolist()) == "ef</s>"


def test_python_docs_is_the_same_every_time():
    first, second = documents(dataset_name="python-docs"), documents(dataset_name="python-docs")
    assert first == second
    assert sum(map(len, first)) > 100_000
    assert len(first) > 50


def test_dataset_folder_by_name(tmp_path):
    Path("mine").mkdir()
    write("mine/train.jsonl", "ab")
    assert documents(dataset_name=str(tmp_path / "mine")) == ["ab"]


def test_other_text_column():
    Path("a.jsonl").write_text('{"body": "ab", "n": 1}\n')
    assert documents(train_file=["a.jsonl"], text_column="body") == ["ab"]
    with refused("no column 'text'; set text_column to one of body, n"):
        documents(train_file=["a.jsonl"])
    with refused(r"column 'n' .* holds int64, not text"):
        documents(train_file=["a.jsonl"], text_column="n")


def test_bytes_behind_tokens(tokenizer):
    tokens = torch.tensor([*byte_ids("aé"), EOS])
    assert count_bytes(tokens, tokenizer) == 3


@pytest.mark.parametrize("model_type", [None, "llama", "mixtral", "alibi_mixtral", "alibi_qwen3", "alibi_gpt2"])
def test_byte_tokenizer_reloads(model_type, tmp_path):
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = load_tokenizer(str(tmp_path))
    text = "naïve\n\ttext"
    assert again(text, add_special_tokens=False).input_ids == byte_ids(text)
    assert len(again) == len(tokenizer) == BYTES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither of dataset_name and train_file given"),
        ({"dataset_name": "python-docs", "train_file": ["a.txt"]}, "both of dataset_name and train_file"),
        ({"train_file": ["gone.txt"]}, r"no file gone\.txt"),
        ({"dataset_name": "./gone"}, "cannot load the dataset './gone'"),
    ],
)
def test_bad_source(arguments, message):
    with refused(message):
        documents(**arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", r"a\.pdf: its extension must be one of \.txt, \.jsonl, \.json, \.parquet, \.csv, \.tsv"),
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n ", "the training data is empty"),
        ("a.txt", b"\xff\xfe\xfa", "cannot"),
        ("a.jsonl", b"{not json", "cannot"),
        ("a.parquet", b"not parquet", "cannot"),
    ],
)
def test_bad_file(tokenizer, name, content, message):
    Path(name).write_bytes(content)
    with refused(message):
        load_tokens(DataArguments(train_file=[name]), tokenizer)


def test_unknown_tokenizer(tmp_path):
    with refused("cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_document_numbers_follow_the_end_of_sequence_tokens(tokenizer):
    tokens = torch.tensor([*byte_ids("ab"), EOS, EOS, *byte_ids("c")])
    assert document_numbers(tokens, tokenizer).tolist() == [0, 0, 0, 1, 2]


def test_passkeys_fill_blocks_and_are_held_out_in_blocks(tokenizer):
    args = DataArguments(dataset_name="probes", probe_block_size=256, probe_blocks=10, validation_fraction=0.25)
    train, held_out = read(load_tokens(args, tokenizer))
    assert (len(train), len(held_out)) == (8 * 256, 2 * 256)
    for block in torch.cat([train, held_out]).view(-1, 256):
        assert block[-1] == EOS
        assert "pass key" in tokenizer.decode(block.tolist())
    assert torch.equal(read(load_tokens(args, tokenizer))[0], train)
    args.probe_seed = 1
    assert not torch.equal(read(load_tokens(args, tokenizer))[0], train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "python-docs", "validation_fraction": -0.1}, "at least 0 and below 1"),
        ({"dataset_name": "python-docs", "validation_fraction": 1.0}, "at least 0 and below 1"),
        ({"dataset_name": "probes"}, "give probe_block_size, the block_size of the training"),
        ({"dataset_name": "python-docs", "probe_block_size": 256}, "with dataset_name probes and only there"),
        ({"dataset_name": "probes", "probe_block_size": 256, "probe_blocks": 0}, "must be at least 1"),
        ({"dataset_name": "probes", "probe_block_size": 256, "probe_tasks": ["a"]}, "one or more of passkey, multikey"),
        ({"train_file": ["a"], "train_weights": [1, 2]}, r"train_weights is \[1, 2\] and train_file names 1"),
        ({"train_file": ["a", "b"], "train_weights": [1, 0]}, "one weight above 0 for each name"),
        ({"train_file": ["a"], "max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"train_file": ["a"], "num_proc": 0}, "num_proc is 0"),
        ({"train_file": ["a"], "streaming": True, "max_tokens": 9}, "streaming is true; it needs the dataset_name"),
        ({"dataset_name": "a", "streaming": True}, "and max_tokens, which say how much"),
        (
            {"dataset_name": "probes", "probe_block_size": 256, "validation_file": ["a.txt"]},
            "leave validation_file out",
        ),
    ],
)
def test_bad_settings(arguments, message):
    with refused(message):
        DataArguments(**arguments)


def test_passkeys_are_no_text(tokenizer):
    args = DataArguments(dataset_name="probes", probe_block_size=256)
    with refused("made of tokens"):
        load_documents(args)
    args.train_file = ["a.txt"]
    with refused("both of dataset_name and train_file"):
        load_tokens(args, tokenizer)


def test_one_token_for_beginning_and_end_makes_no_documents_of_its_own():
    tokenizer = word_tokenizer(with_bos=False)
    tokenizer.bos_token = tokenizer.eos_token
    stream = torch.tensor([2, 5, 6, 2, 2, 7, 2, 2, 8, 9])
    assert document_numbers(stream[1:], tokenizer).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_documents_begin_as_the_tokenizer_begins_texts():
    def stream(*, with_bos, wanted=None):
        return split(word_tokenizer(with_bos=with_bos), "w1 w2", "w3", document_bos=wanted)[0].tolist()

    assert stream(with_bos=True) == [1, 4, 5, 2, 1, 6, 2]
    assert stream(with_bos=False) == [4, 5, 2, 6, 2]
    assert stream(with_bos=True, wanted=False) == [4, 5, 2, 6, 2]
    assert stream(with_bos=False, wanted=True) == [1, 4, 5, 2, 1, 6, 2]


def test_a_beginning_of_sequence_that_the_tokenizer_lacks_is_refused(tokenizer):
    assert bos_token_id(tokenizer) is None
    with refused("document_bos is true, and the tokenizer has no beginning-of-sequence token"):
        bos_token_id(tokenizer, wanted=True)
    with refused("window_bos is true"):
        bos_token_id(tokenizer, wanted=True, field="window_bos")


def test_max_tokens_are_the_first_ones_with_the_held_out_tail_among_them(tokenizer):
    whole, _ = split(tokenizer, "0123456789", "abcdefghij")
    train, held_out = split(tokenizer, "0123456789", "abcdefghij", max_tokens=15, validation_fraction=0.2)
    assert torch.equal(torch.cat([train, held_out]), whole[:15])
    assert len(held_out) == 3


def test_a_mixture_has_one_stream_for_each_name(tokenizer):
    write("a.jsonl", "ab" * 20, "cd")
    write("b.jsonl", "cd", "ef" * 20)
    names = ["a.jsonl", "b.jsonl"]
    args = DataArguments(train_file=names, train_weights=[3, 1], max_tokens=40, validation_fraction=0.1)
    tokens = load_tokens(args, tokenizer)
    assert [tokenizer.decode(stream.read()) for stream in tokens.train] == [("ab" * 20)[:27], ("ef" * 20)[:9]]
    assert tokenizer.decode(tokens.held_out.read()) == "bab" + "f"
    of_all = load_tokens(DataArguments(train_file=names, train_weights=[1, 1]), tokenizer)
    text = "".join(tokenizer.decode(stream.read()) for stream in (*of_all.train, of_all.held_out))
    assert text.count("cd") == 1  # equal documents are dropped across the streams


def test_streaming_reads_what_is_needed_and_gives_what_reading_all_gives(tokenizer, monkeypatch):
    Path("mine").mkdir()
    write("mine/train.jsonl", *(f"document {index} " + "x" * 50 for index in range(400)), "document 0 " + "x" * 50)
    settings = {"dataset_name": str(Path("mine").absolute()), "max_tokens": 1000, "validation_fraction": 0.1}
    whole = read(load_tokens(DataArguments(**settings), tokenizer))
    seen = []
    is_new = data._is_new
    monkeypatch.setattr(data, "_is_new", lambda text, before: seen.append(text) or is_new(text, before))
    streamed = read(load_tokens(DataArguments(**settings, streaming=True), tokenizer))
    assert all(map(torch.equal, streamed, whole))
    assert 0 < len(seen) < 400


def test_streamed_text_is_kept_out_of_the_held_out_text(tokenizer):
    Path("mine").mkdir()
    write("mine/train.jsonl", "ab", "", "cd", "ab")
    held_out = write("b.jsonl", "cd", "ef")
    args = DataArguments(dataset_name="mine", max_tokens=100, streaming=True, validation_file=[held_out])
    for _ in range(2):  # the second time from the cache
        train, other = read(load_tokens(args, tokenizer))
        assert tokenizer.decode(train) == "ab</s>cd</s>"
        assert tokenizer.decode(other) == "ef</s>"


def test_a_column_that_is_streamed_is_checked(tokenizer):
    Path("mine").mkdir()
    Path("mine/train.jsonl").write_text('{"body": "ab", "n": 1}\n')
    with refused("no column 'text'; set text_column to one of body, n"):
        load_tokens(DataArguments(dataset_name="mine", max_tokens=9, streaming=True), tokenizer)
    with refused("column 'n' of the dataset 'mine' holds int64, not text"):
        load_tokens(DataArguments(dataset_name="mine", max_tokens=9, streaming=True, text_column="n"), tokenizer)


def test_processes_that_tokenise_change_nothing(tokenizer):
    texts = [f"document {index}" for index in range(50)]
    assert all(map(torch.equal, split(tokenizer, *texts), split(tokenizer, *texts, num_proc=2)))


def test_tokens_stay_on_the_disk(tokenizer):
    """The buffers are those of the mapped file, not copies of it."""
    args = DataArguments(train_file=[write("a.jsonl", *(str(index) * 20 for index in range(3000)))])
    before = pa.total_allocated_bytes()
    (stream,) = load_tokens(args, tokenizer).train
    assert len(stream) > 100_000
    assert pa.total_allocated_bytes() - before < len(stream)
    assert not any(piece.flags.owndata or piece.flags.writeable for piece in stream._pieces)
