"""A tokenizer of transformers as the fields of a GGUF file.

Two kinds of BPE can be said: on bytes, which llama.cpp calls `gpt2`, and SentencePiece's, which it calls `llama`.
"""

from __future__ import annotations

import json
import re
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
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"  # what SentencePiece writes for a space
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Words:
    """What a GGUF file says of a tokenizer."""

    cut: str | None
    """How text is cut into words, by llama.cpp's name for it; None for SentencePiece, which does not cut."""
    begins_with_space: bool
    """Whether SentencePiece puts a space before the text."""
    tokens: list[str]
    """By their ids, one for each row of the embeddings."""
    types: list[int]
    merges: list[tuple[str, str]]
    special: dict[str, int]
    """From bos, eos, unk and pad, as far as there are any, to their ids."""
    begins: bool
    """Whether a text begins with bos."""
    ends: bool
    chat_template: str | None


def read_tokenizer(folder: Path, config: Any) -> Words:
    """Read the tokenizer in `folder`, for a model of this config. Raises InputError if the format cannot say it."""
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
    if model["type"] != "BPE":
        raise InputError(f"{path} is {model['type']}, and only BPE can be written; {_HINT}")
    is_pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(said, config.vocab_size)
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    text = tokenizer("a").input_ids
    return Words(
        cut=None if is_pieces else _cut(said, path),
        begins_with_space=is_pieces and _begins_with_space(said, path),
        tokens=tokens,
        types=types,
        merges=[tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]],
        special={name: number for name, number in ids.items() if number is not None},
        begins=ids["bos"] is not None and text[0] == ids["bos"],
        ends=ids["eos"] is not None and text[-1] == ids["eos"],
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _cut(said: Any, path: Path) -> str:
    """llama.cpp's name for the pre-tokenizer of byte-level BPE."""
    steps = _steps(said.get("pre_tokenizer"), "pretokenizers")
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
    cut = _CUTS.get(tuple(names))
    if cut is None or said.get("normalizer") not in (None, {"type": "NFC"}):
        raise InputError(
            f"the pre-tokenizer of {path} is none of those that can be written: {', '.join(_CUTS.values())}; {_HINT}"
        )
    return cut


def _begins_with_space(said: Any, path: Path) -> bool:
    """Whether SentencePiece puts a space first. Raises InputError if it does more to the text than llama.cpp."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizer, cut = _steps(said.get("normalizer"), "normalizers"), said.get("pre_tokenizer")
    if normalizer in ([spaces], [{"type": "Prepend", "prepend": _SPACE}, spaces]) and cut is None:
        return len(normalizer) == 2
    if not normalizer and cut and cut["type"] == "Metaspace" and not cut.get("split", True):
        return bool(cut["prepend_scheme"] != "never")
    raise InputError(f"{path} changes text before it is cut in a way that cannot be written; {_HINT}")


def _steps(said: Any, name: str) -> list[Any]:
    """The steps of a pre-tokenizer or normalizer, one if it is no sequence."""
    if said is None:
        return []
    return list(said[name]) if said["type"] == "Sequence" else [said]


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
        elif said["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", word):
            types[number] = _BYTE
    if (unknown := said["model"].get("unk_token")) is not None:
        types[tokens.index(unknown)] = _UNKNOWN
    return tokens, types


def add_tokenizer(writer: Any, words: Words) -> None:
    """Write the fields of a tokenizer."""
    writer.add_tokenizer_model("llama" if words.cut is None else "gpt2")
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.cut is None:
        # The pair whose joined token has the highest score is merged first.
        ranks = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(words.merges)))}
        writer.add_token_scores([ranks.get(token, -float(len(words.merges))) for token in words.tokens])
        writer.add_add_space_prefix(words.begins_with_space)
    else:
        writer.add_tokenizer_pre(words.cut)
        writer.add_token_merges([" ".join(pair) for pair in words.merges])
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)
