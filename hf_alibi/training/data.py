"""Text to tokens to blocks: where documents come from, and what is held out."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..errors import InputError, one_line
from ..evaluation.passkey_prompts import passkey_training_tokens
from .files import TEXT, load_files, loading, only_text
from .settings import BYTES, PASSKEY, PYTHON_DOCS, DataArguments

__all__ = [
    "TokenBlocks",
    "TokenSplit",
    "bos_token_id",
    "count_bytes",
    "document_numbers",
    "load_documents",
    "load_tokenizer",
    "load_tokens",
    "pack_blocks",
]


class TokenSplit(NamedTuple):
    """Two 1-D int64 tensors of token ids that share no document position."""

    train: Tensor
    held_out: Tensor


class TokenBlocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Non-overlapping blocks of one token stream, as `input_ids` and `labels`; the remainder is left out."""

    def __init__(self, tokens: Tensor, block_size: int) -> None:
        count = tokens.numel() // block_size
        self.input_ids = tokens[: count * block_size].view(count, block_size)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.input_ids[index].clone()
        # Nothing predicts a block's first token. Models skip it, but Trainer would count it in its mean.
        labels[0] = -100
        return {"input_ids": self.input_ids[index], "labels": labels}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by path or hub name; `bytes` is one token a UTF-8 byte and needs no file.

    Raises InputError for no such tokenizer, or one that has no end-of-sequence token to join documents with.
    """
    if name == BYTES:
        return ByT5Tokenizer(extra_ids=0)
    try:
        # For some families AutoTokenizer reads nothing but tokenizer.json, which this one does not have.
        is_bytes = Path(name).is_dir() and get_tokenizer_config(name).get("tokenizer_class") == "ByT5Tokenizer"
        tokenizer = (ByT5Tokenizer if is_bytes else AutoTokenizer).from_pretrained(name)
    except Exception as error:  # each tokenizer class has its own exceptions for a broken file
        raise InputError(
            f"cannot load the tokenizer {name!r}: {one_line(error)}; give a folder, a hub name or {BYTES!r}"
        ) from error
    if not tokenizer.encode("a", add_special_tokens=False):
        # What some families give for a folder without the files of a tokenizer.
        raise InputError(
            f"cannot load the tokenizer {name!r}: it has no vocabulary; give a folder that holds one, a hub name or "
            f"{BYTES!r}"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer {name!r} has no end-of-sequence token to join documents with; set its eos_token"
        )
    return tokenizer


def bos_token_id(
    tokenizer: PreTrainedTokenizerBase, wanted: bool | None = None, *, field: str = "document_bos"
) -> int | None:
    """The beginning-of-sequence token that texts begin with, None if they begin without one.

    By default (`wanted` None) the tokenizer decides: it begins texts with the token if models were trained that way
    (LLaMA, Gemma). `field` is the setting that errors name. Raises InputError if the token is wanted and the tokenizer
    has none.
    """
    token: int | None = tokenizer.bos_token_id
    if wanted is None:
        return token if token is not None and tokenizer.encode("a")[:1] == [token] else None
    if wanted and token is None:
        raise InputError(f"{field} is true, and the tokenizer has no beginning-of-sequence token; leave it out")
    return token if wanted else None


def load_documents(args: DataArguments) -> datasets.Dataset:
    """Load the documents of a run in order, as one string column `text`; a .txt file is one document.

    Raises InputError for no or two sources, a missing or unreadable file, and an unknown extension, dataset
    or column.
    """
    if (args.dataset_name is None) == (args.train_file is None):
        given = "neither" if args.dataset_name is None else "both"
        raise InputError(f"{given} of dataset_name and train_file given; give exactly one of them")
    if args.dataset_name == PASSKEY:
        raise InputError(f"the dataset {PASSKEY} is made of tokens, not of text; use load_tokens")
    if args.train_file is not None:
        return load_files(args.train_file, args.text_column)
    if args.dataset_name == PYTHON_DOCS:
        return _load_python_docs()
    with loading(f"the dataset {args.dataset_name!r}"):
        dataset = datasets.load_dataset(args.dataset_name, args.dataset_config_name, split=args.dataset_split)
    return only_text(dataset, args.text_column, source=f"the dataset {args.dataset_name!r}")


def load_tokens(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TokenSplit:
    """Load, deduplicate and tokenise the documents of a run, each followed by the end-of-sequence token.

    Documents begin with the beginning-of-sequence token if `args.document_bos` says so; see `bos_token_id`.
    Without `validation_file` the last `validation_fraction` of the stream is held out. Of equal documents,
    also across the two parts, the first is kept. The passkey dataset is held out in whole blocks.

    Raises InputError for what `load_documents` refuses, and if no text is left.
    """
    if args.dataset_name == PASSKEY and args.train_file is None:
        return _load_passkeys(args, tokenizer)
    seen: set[bytes] = set()
    bos = bos_token_id(tokenizer, args.document_bos)
    train = _tokenize(_drop_duplicates(load_documents(args), seen), tokenizer, bos)
    if not train.numel():
        raise InputError("the training data is empty: it has no document with text; give files that hold text")
    if args.validation_file is not None:
        documents = load_files(args.validation_file, args.text_column)
        held_out = _tokenize(_drop_duplicates(documents, seen), tokenizer, bos)
        if not held_out.numel():
            raise InputError("validation_file holds no text that is not in the training data; give other text")
        return TokenSplit(train, held_out)
    boundary = train.numel() - int(train.numel() * args.validation_fraction)
    return TokenSplit(train[:boundary], train[boundary:])


def pack_blocks(tokens: Tensor, block_size: int, *, name: str = "the text") -> TokenBlocks:
    """Cut a 1-D stream of tokens into blocks of `block_size`; `name` says in errors which stream it is.

    Raises InputError if not even one block can be filled.
    """
    if tokens.numel() < block_size:
        raise InputError(
            f"{name} has {tokens.numel()} tokens, too few for one block of block_size {block_size}; "
            f"give more text or a block_size of at most {tokens.numel()}"
        )
    return TokenBlocks(tokens, block_size)


def count_bytes(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the UTF-8 bytes of the text behind `tokens` (1-D); special tokens stand for none."""
    return len(tokenizer.decode(tokens.tolist(), skip_special_tokens=True).encode("utf-8"))


def document_numbers(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Number the documents of a stream (1-D) from 0, by the end-of-sequence token that each of them ends with.

    Returns int64 of the same shape. The first and the last document may be cut. If the tokenizer has one token for
    beginning and end, the second of two neighbours begins the next document, since no document is empty.
    """
    ends = torch.eq(tokens, tokenizer.eos_token_id).tolist()
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        for index in range(1, len(ends)):
            ends[index] = ends[index] and not ends[index - 1]
    ended = torch.tensor(ends, dtype=torch.int64)
    return ended.cumsum(0) - ended


def _load_passkeys(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TokenSplit:
    block_size = args.passkey_block_size or 0
    tokens = passkey_training_tokens(
        tokenizer,
        bos_token_id=bos_token_id(tokenizer, args.document_bos),
        block_size=block_size,
        blocks=args.passkey_blocks,
        seed=args.passkey_seed,
    )
    boundary = block_size * (args.passkey_blocks - int(args.passkey_blocks * args.validation_fraction))
    return TokenSplit(tokens[:boundary], tokens[boundary:])


def _load_python_docs() -> datasets.Dataset:
    """Load the help topics of the running CPython (about 465 kB, a little different with each version)."""
    from pydoc_data.topics import topics

    return datasets.Dataset.from_dict({TEXT: [topics[name] for name in sorted(topics)]})


def _drop_duplicates(documents: datasets.Dataset, seen: set[bytes]) -> datasets.Dataset:
    """Keep the first of equal documents, and none that is empty; `seen` collects the digests of the kept."""
    kept = []
    for index, text in enumerate(documents[TEXT]):
        digest = hashlib.blake2b((text or "").encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if text and not text.isspace() and digest not in seen:
            seen.add(digest)
            kept.append(index)
    return documents.select(kept)


def _tokenize(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, bos: int | None) -> Tensor:
    first = [] if bos is None else [bos]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch[TEXT], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [[*first, *ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}

    if not len(documents):
        return torch.empty(0, dtype=torch.int64)
    encoded = documents.map(encode, batched=True, remove_columns=[TEXT], desc="Tokenising")
    # Arrow's flat buffers: a Python list of every token would need ten times the memory.
    chunks = encoded.with_format("arrow")[:]["input_ids"].chunks
    return torch.cat([torch.tensor(chunk.flatten().to_numpy(), dtype=torch.int64) for chunk in chunks])
