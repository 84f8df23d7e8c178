import json
from pathlib import Path

import datasets
import pytest
import torch

from helpers.made_up import word_tokenizer
from helpers.runs import BYTES, refused
from hf_alibi.training.data import (
    bos_token_id,
    count_bytes,
    document_numbers,
    load_documents,
    load_tokenizer,
    load_tokens,
    pack_blocks,
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
    return load_tokens(settings, tokenizer)


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
    tokens = split(tokenizer, "ab", "cd", validation_file=[write("b.jsonl", "cd", "ef")])
    assert tokenizer.decode(tokens.train.tolist()) == "ab</s>cd</s>"
    assert tokenizer.decode(tokens.held_out.tolist()) == "ef</s>"


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


def test_blocks_do_not_overlap():
    blocks = pack_blocks(torch.arange(11), 4)
    assert [block["input_ids"].tolist() for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert blocks[1]["labels"].tolist() == [-100, 5, 6, 7]  # nothing predicts the first token
    assert len(blocks) == 2
    assert len(pack_blocks(torch.arange(4), 4)) == 1


def test_text_shorter_than_a_block():
    with refused(r"the held-out text has 7 tokens.*block_size of at most 7"):
        pack_blocks(torch.arange(7), 8, name="the held-out text")


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
    args = DataArguments(dataset_name="passkey", passkey_block_size=256, passkey_blocks=10, validation_fraction=0.25)
    train, held_out = load_tokens(args, tokenizer)
    assert (len(train), len(held_out)) == (8 * 256, 2 * 256)
    for block in pack_blocks(torch.cat([train, held_out]), 256):
        assert block["input_ids"][-1] == EOS
        assert "pass key" in tokenizer.decode(block["input_ids"].tolist())
    assert torch.equal(load_tokens(args, tokenizer).train, train)
    args.passkey_seed = 1
    assert not torch.equal(load_tokens(args, tokenizer).train, train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "python-docs", "validation_fraction": -0.1}, "at least 0 and below 1"),
        ({"dataset_name": "python-docs", "validation_fraction": 1.0}, "at least 0 and below 1"),
        ({"dataset_name": "passkey"}, "give passkey_block_size, the block_size of the training"),
        ({"dataset_name": "python-docs", "passkey_block_size": 256}, "with dataset_name passkey and only there"),
        ({"dataset_name": "passkey", "passkey_block_size": 256, "passkey_blocks": 0}, "must be at least 1"),
        (
            {"dataset_name": "passkey", "passkey_block_size": 256, "validation_file": ["a.txt"]},
            "leave validation_file out",
        ),
    ],
)
def test_bad_settings(arguments, message):
    with refused(message):
        DataArguments(**arguments)


def test_passkeys_are_no_text(tokenizer):
    args = DataArguments(dataset_name="passkey", passkey_block_size=256)
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
        return split(word_tokenizer(with_bos=with_bos), "w1 w2", "w3", document_bos=wanted).train.tolist()

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
