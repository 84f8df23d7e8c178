"""vLLM with this package's plugin, on whatever device it is built for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from ...configuration import head_width, num_key_heads
from .engine import COMPARED, Continuation

__all__ = ["Vllm", "open_engine"]

# Tokens that are read at a time: prompts that are longer are cut, which is part of what is compared.
_CHUNK = 512


class Vllm:
    """A folder that vLLM serves in float32."""

    def __init__(self, folder: Path, longest: int, tensor_parallel: int) -> None:
        """Load `folder` with room for `longest` tokens, on that many ranks."""
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_gibibytes(folder, longest)))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        self.version = f"vLLM {vllm.__version__}"
        self._params = vllm.SamplingParams
        self._llm: Any = vllm.LLM(
            str(folder),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=4,
            max_num_batched_tokens=_CHUNK,
            max_logprobs=-1,
            logprobs_mode="raw_logits",
            tensor_parallel_size=tensor_parallel,
        )

    def continued(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """As the protocol says, in one continuous batch."""
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        greedy = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        texts = self._llm.generate(given, self._params(**greedy, max_tokens=tokens), use_tqdm=False)
        params = self._params(**greedy, max_tokens=min(tokens, COMPARED), logprobs=-1, flat_logprobs=True)
        rows = self._llm.generate(given, params, use_tqdm=False)
        return [
            Continuation(list(text.outputs[0].token_ids), _logits(first.outputs[0].logprobs))
            for text, first in zip(texts, rows, strict=True)
        ]

    def tokenized(self, text: str) -> list[int] | None:
        """None: it uses the tokenizer of the folder."""
        return None

    def close(self) -> None:
        """End the engine's process."""
        self._llm.llm_engine.engine_core.shutdown()


def _logits(flat: Any) -> Any:
    """float32 (tokens, vocabulary), from vLLM's list of numbers and values in the order of their size."""
    rows = []
    for first, last in zip(flat.start_indices, flat.end_indices, strict=True):
        numbers = np.array(flat.token_ids[first:last])
        row = np.full(numbers.max() + 1, np.nan, np.float32)
        row[numbers] = flat.logprobs[first:last]
        rows.append(row)
    return np.stack(rows)


def _gibibytes(folder: Path, tokens: int) -> int:
    """What the cache of a CPU needs for two sequences of that many tokens, in float32."""
    config: Any = AutoConfig.from_pretrained(folder)
    needed: float = 2 * tokens * config.num_hidden_layers * 2 * num_key_heads(config) * head_width(config) * 4 / 2**30
    return math.ceil(needed) + 1


def open_engine(folder: Path, file: Path, longest: int, tensor_parallel: int) -> Vllm:
    """Serve `folder`, which is also `file`."""
    return Vllm(folder, longest, tensor_parallel)
