"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..onnx import MODEL_FILE
from .engine import COMPARED, Continuation

__all__ = ["OnnxRuntime", "open_engine"]

_CHUNK = 512


class OnnxRuntime:
    """A session of ONNX Runtime for the graph in a folder."""

    def __init__(self, file: Path) -> None:
        """Load the graph `file`."""
        import onnxruntime

        self.version = f"ONNX Runtime {onnxruntime.__version__}"
        self._session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        shapes = {node.name: node.shape for node in self._session.get_inputs()}
        self._empty = {name: (shape[1], 0, shape[3]) for name, shape in shapes.items() if name.startswith("past")}

    def _run(self, ids: Any, mask: Any, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": np.zeros_like(ids), **past}
        logits, *present = self._session.run(None, given)
        return logits, dict(zip(past, present, strict=True))

    def _read(self, ids: Any, mask: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Logits of one chunk after another, and the cache after it."""
        past = {name: np.zeros((len(ids), *shape), np.float32) for name, shape in self._empty.items()}
        for first in range(0, ids.shape[1], _CHUNK):
            logits, past = self._run(ids[:, first : first + _CHUNK], mask[:, : first + _CHUNK], past)
            yield logits, past

    def continued(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Continuation]:
        """As the protocol says; shorter prompts of the batch are padded on the left."""
        longest = max(map(len, prompts))
        ids = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], np.int64)
        mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
        for chunk in self._read(ids, mask):
            logits, past = chunk
        rows, chosen = [logits[:, -1]], []
        for step in range(tokens):
            chosen.append(rows[-1].argmax(axis=-1)[:, None])
            if step + 1 < tokens:
                mask = np.concatenate([mask, np.ones_like(chosen[-1])], axis=1)
                logits, past = self._run(chosen[-1], mask, past)
                rows.append(logits[:, -1])
        ids, logits = np.concatenate(chosen, axis=1), np.stack(rows[:COMPARED], axis=1)
        return [Continuation(of_one.tolist(), its) for of_one, its in zip(ids, logits, strict=True)]

    def tokenized(self, text: str) -> list[int] | None:
        """None: it has no tokenizer."""
        return None

    def close(self) -> None:
        """Free the session."""
        del self._session


def open_engine(folder: Path, file: Path, longest: int, tensor_parallel: int) -> OnnxRuntime:
    """Load the graph in the folder `file`."""
    return OnnxRuntime(file / MODEL_FILE if file.is_dir() else file)
