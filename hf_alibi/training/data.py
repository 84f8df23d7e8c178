"""Text to tokens to blocks: where documents come from, and what is held out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..errors import InputError, one_line
from ..evaluation.probe_prompts import ProbeBlocks, ProbeText
from ..utils import Blocks
from .encoding import INPUT_IDS, encode_documents
from .files import TEXT, load_files, loading, only_text
from .settings import BYTES, PROBES, PYTHON_DOCS, DataArguments
from .token_blocks import TokenStream

__all__ = [
    "TokenSplit",
    "bos_token_id",
    "count_bytes",
    "document_numbers",
    "load_documents",
    "load_tokenizer",
    "load_tokens",
    "probe_blocks",
    "run_tokenizer",
]

_DIGEST = "digest"
_STREAMED_BATCH = 100  # documents that are tokenised together


class TokenSplit(NamedTuple):
    """Tokens that share no document position."""

    train: list[TokenStream]
    """One stream, or one for each of the setting `train_weights`."""
    held_out: TokenStream


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


def run_tokenizer(args: DataArguments, model: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run: the one that its settings name, or that of its `model`, a folder or hub name.

    Raises InputError if there is neither, and for what `load_tokenizer` refuses.
    """
    name = args.tokenizer_name or model
    if name is None:
        raise InputError("a fresh model has no tokenizer of its own; set tokenizer_name (bytes needs no download)")
    return load_tokenizer(name)


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


def load_documents(args: DataArguments) -> datasets.Dataset | datasets.IterableDataset:
    """Load the documents of a run in order, as one string column `text`; a .txt file is one document.

    With `args.streaming` they are read while they are iterated over.

    Raises InputError for no or two sources, a missing or unreadable file, and an unknown extension, dataset
    or column.
    """
    if (args.dataset_name is None) == (args.train_file is None):
        given = "neither" if args.dataset_name is None else "both"
        raise InputError(f"{given} of dataset_name and train_file given; give exactly one of them")
    if args.dataset_name == PROBES:
        raise InputError(f"the dataset {PROBES} is made of tokens, not of text; use load_tokens")
    if args.train_file is not None:
        return load_files(args.train_file, args.text_column)
    if args.dataset_name == PYTHON_DOCS:
        return _load_python_docs()
    with loading(f"the dataset {args.dataset_name!r}"):
        dataset = datasets.load_dataset(
            args.dataset_name, args.dataset_config_name, split=args.dataset_split, streaming=args.streaming
        )
    return only_text(dataset, args.text_column, source=f"the dataset {args.dataset_name!r}")


def load_tokens(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TokenSplit:
    """Load, deduplicate and tokenise the documents of a run, each followed by the end-of-sequence token.

    Documents begin with the beginning-of-sequence token if `args.document_bos` says so; see `bos_token_id`.
    Without `validation_file` the last `validation_fraction` of each stream is held out. Of equal documents,
    also across all streams, the first is kept. The passkey dataset is held out in whole blocks.

    The tokens stay on the disk, in the cache of `datasets`. Raises InputError for what `load_documents` refuses, and if
    no text is left.
    """
    if args.dataset_name == PROBES and args.train_file is None:
        return _load_probes(args, tokenizer)
    encoder = _Encoder(tokenizer, args)
    train = [encoder.stream(load_documents(part), part.max_tokens) for part in _parts(args)]
    if not all(map(len, train)):
        raise InputError("the training data is empty: it has no document with text; give files that hold text")
    if args.validation_file is not None:
        held_out = encoder.stream(load_files(args.validation_file, args.text_column))
        if not len(held_out):
            raise InputError("validation_file holds no text that is not in the training data; give other text")
        return TokenSplit(train, held_out)
    cuts = [len(stream) - int(len(stream) * args.validation_fraction) for stream in train]
    tails = [stream[cut:] for stream, cut in zip(train, cuts, strict=True)]
    return TokenSplit([stream[:cut] for stream, cut in zip(train, cuts, strict=True)], TokenStream.joined(tails))


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


def _load_probes(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TokenSplit:
    block_size = args.probe_block_size or 0
    blocks = probe_blocks(args, tokenizer, block_size, args.probe_blocks)
    stream = TokenStream([blocks[index].numpy() for index in range(len(blocks))])
    boundary = block_size * (args.probe_blocks - int(args.probe_blocks * args.validation_fraction))
    return TokenSplit([stream[:boundary]], stream[boundary:])


def probe_blocks(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    blocks: int,
    around: Blocks | None = None,
) -> ProbeBlocks:
    """Blocks that teach the tasks of the probes, with their own filler or, with `around`, in the blocks of a text."""
    return ProbeBlocks(
        ProbeText(tokenizer, bos_token_id(tokenizer, args.document_bos)),
        eos_token_id=tokenizer.eos_token_id,
        block_size=block_size,
        blocks=blocks,
        seed=args.probe_seed,
        tasks=args.probe_tasks,
        around=around,
    )


def _load_python_docs() -> datasets.Dataset:
    """Load the help topics of the running CPython (about 465 kB, a little different with each version)."""
    from pydoc_data.topics import topics

    return datasets.Dataset.from_dict({TEXT: [topics[name] for name in sorted(topics)]})


def _parts(args: DataArguments) -> Iterator[DataArguments]:
    """What each stream of the training text is read from."""
    if args.train_weights is None:
        yield args
        return
    for name, weight in zip(args.train_file or (), args.train_weights, strict=True):
        most = None if args.max_tokens is None else round(args.max_tokens * weight / sum(args.train_weights))
        yield replace(args, train_file=[name], train_weights=None, max_tokens=most)


class _Encoder:
    """Turns documents into streams of tokens on the disk; of equal ones, in all its streams, it keeps the first."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> None:
        self._encode = partial(encode_documents, tokenizer=tokenizer, bos=bos_token_id(tokenizer, args.document_bos))
        self._num_proc = args.num_proc
        self._seen: set[bytes] = set()

    def stream(self, documents: datasets.Dataset | datasets.IterableDataset, most: int | None = None) -> TokenStream:
        """The first `most` tokens of documents that are not empty."""
        if isinstance(documents, datasets.Dataset):
            kept = [index for index, text in enumerate(documents[TEXT]) if _is_new(text, self._seen)]
            rows = documents.select(kept)
            if kept:
                rows = rows.map(
                    self._encode, batched=True, remove_columns=[TEXT], num_proc=self._num_proc, desc="Tokenising"
                )
        else:
            with loading("the text while it is streamed"):
                rows = datasets.Dataset.from_generator(
                    _encode_streamed, gen_kwargs={"documents": documents, "encode": self._encode, "most": most}
                )
            self._seen.update(rows[_DIGEST])
        if not len(rows):
            return TokenStream([])
        # Arrow's flat buffers are those of the file.
        chunks = rows.with_format("arrow")[:][INPUT_IDS].chunks
        return TokenStream([chunk.flatten().to_numpy() for chunk in chunks])[:most]


def _encode_streamed(
    documents: datasets.IterableDataset,
    encode: Callable[[dict[str, list[str]]], dict[str, list[NDArray[np.int32]]]],
    most: int,
) -> Iterator[dict[str, Any]]:
    """Rows with the tokens of new documents, until there are `most` tokens."""
    seen: set[bytes] = set()
    for batch in documents.iter(_STREAMED_BATCH):
        texts = [text for text in batch[TEXT] if _is_new(text, seen)]
        for text, ids in zip(texts, encode({TEXT: texts})[INPUT_IDS] if texts else (), strict=True):
            yield {INPUT_IDS: ids, _DIGEST: _digest(text)}
            most -= len(ids)
            if most <= 0:
                return


def _is_new(text: str | None, seen: set[bytes]) -> bool:
    """Whether a document is neither empty nor among those `seen`, to which it is added."""
    if not text or text.isspace():
        return False
    before = len(seen)
    seen.add(_digest(text))
    return len(seen) > before


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
