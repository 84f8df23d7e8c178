"""llama.cpp, through llama-cpp-python, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .engine import COMPARED, Continuation

__all__ = ["LlamaCpp", "open_engine"]

_CHUNK = 512
_F32 = 0  # of ggml's types; a cache in f16, the default, would add its own rounding


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, longest: int) -> None:
        """Load `file` with room for `longest` tokens."""
        import llama_cpp

        self.version = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self._package = llama_cpp
        self._llama: Any = llama_cpp.Llama(
            str(file), n_ctx=longest, n_batch=_CHUNK, type_k=_F32, type_v=_F32, flash_attn=False, verbose=False
        )
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._llama.model))
        kind = llama_cpp.llama_vocab_type(llama_cpp.llama_model_get_vocab(self._llama.model))
        self._has_tokenizer = kind != llama_cpp.LLAMA_VOCAB_TYPE_NONE

    def _row(self) -> Any:
        """Logits after the last token that was read."""
        found = self._package.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(found, shape=(self._words,)).copy()

    def continued(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """As the protocol says, one prompt after another: the file is for single sequences."""
        return [self._continued(prompt, tokens) for prompt in prompts]

    def _continued(self, prompt: Sequence[int], tokens: int) -> Continuation:
        self._llama.reset()
        self._llama.eval(list(prompt))
        rows, ids = [self._row()], []
        for step in range(tokens):
            ids.append(int(rows[-1].argmax()))
            if step + 1 < tokens:
                self._llama.eval(ids[-1:])
                rows.append(self._row())
        return Continuation(ids, np.stack(rows[:COMPARED]))

    def prompt_logits(self, prompt: Sequence[int]) -> Any:
        """Logits after each token of a prompt, float32 numpy array (tokens, vocabulary), read a token at a time."""
        self._llama.reset()
        rows = []
        for token in prompt:
            self._llama.eval([token])
            rows.append(self._row())
        return np.stack(rows)

    def tokenized(self, text: str) -> list[int] | None:
        """As the protocol says."""
        if not self._has_tokenizer:
            return None
        found: list[int] = self._llama.tokenize(text.encode("utf-8"), add_bos=True, special=True)
        return found

    def close(self) -> None:
        """Free the model."""
        self._llama.close()


def open_engine(folder: Path, file: Path, longest: int, tensor_parallel: int) -> LlamaCpp:
    """Load the GGUF file `file`."""
    return LlamaCpp(file, longest)
