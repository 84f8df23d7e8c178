"""A tokenizer of transformers as the fields of a GGUF file: byte-level BPE, which llama.cpp calls `gpt2`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, one_line

__all__ = ["Words", "add_tokenizer", "read_tokenizer"]

_HINT = "export without it by --tokenizer false, and give token ids to the engine"
# How text is cut before pairs are merged: patterns of the pre-tokenizer, and what llama.cpp calls them.
_SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_SPLIT_QWEN2 = _SPLIT_LLAMA3.replace("{1,3}", "")
_CUTS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_SPLIT_LLAMA3,): "llama-bpe",
    (_SPLIT_QWEN2,): "qwen2",
}
# Token types of the format.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Words:
    """What a GGUF file says of a tokenizer."""

    cut: str
    """How text is cut into words, by llama.cpp's name for it."""
    tokens: list[str]
    """By their ids, one for each row of the embeddings."""
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    """From bos, eos, unk and pad, as far as there are any, to their ids."""
    begins: bool
    """Whether a text begins with bos."""
    ends: bool
    chat_template: str | None


def read_tokenizer(folder: Path, config: Any) -> Words:
    """Read the tokenizer in `folder`, for a model of this config. Raises InputError if the format has no such."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json, the one kind of tokenizer that can be written; {_HINT}")
    from transformers import AutoTokenizer

    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a broken file makes them raise
        raise InputError(f"cannot read the tokenizer in {folder}: {one_line(error)}") from error
    model = said["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or said.get("normalizer") not in (None, {"type": "NFC"}):
        raise InputError(f"no byte-level BPE, the one kind of tokenizer that can be written, in {path}; {_HINT}")
    tokens, types = _tokens(said, config.vocab_size)
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    text = tokenizer("a").input_ids
    return Words(
        cut=_cut(said.get("pre_tokenizer"), path),
        tokens=tokens,
        types=types,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        special={name: number for name, number in ids.items() if number is not None},
        begins=ids["bos"] is not None and text[0] == ids["bos"],
        ends=ids["eos"] is not None and text[-1] == ids["eos"],
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _cut(said: Any, path: Path) -> str:
    """llama.cpp's name for a pre-tokenizer."""
    steps = said["pretokenizers"] if said and said["type"] == "Sequence" else [said or {"type": "none"}]
    names = []
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            names.append(step["pattern"].get("Regex"))
        elif step["type"] == "ByteLevel" and not step.get("use_regex", True):
            continue  # bytes are only renamed
        elif (step["type"] == "ByteLevel" and not step["add_prefix_space"]) or (
            step["type"] == "Digits" and step["individual_digits"]
        ):
            names.append(step["type"])
        else:
            names.append(None)
    if (cut := _CUTS.get(tuple(names))) is None:
        raise InputError(
            f"the pre-tokenizer of {path} is none of those that can be written: {', '.join(_CUTS.values())}; {_HINT}"
        )
    return cut


def _tokens(said: Any, size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, by id; rows of the embeddings without a token are unused."""
    tokens, types = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    added = {token["id"]: token for token in said["added_tokens"]}
    words = [*said["model"]["vocab"].items(), *((token["content"], number) for number, token in added.items())]
    if (last := max(number for _, number in words)) >= size:
        raise InputError(f"the tokenizer has a token {last}, but the model has {size} rows of embeddings")
    for word, number in words:
        tokens[number], types[number] = word, _NORMAL
        if number in added:
            types[number] = _CONTROL if added[number]["special"] else _USER_DEFINED
    return tokens, types


def add_tokenizer(writer: Any, words: Words) -> None:
    """Write the fields of a tokenizer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.cut)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)
