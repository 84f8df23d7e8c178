"""The kernels for GPUs where there is none: by Triton's interpreter, on tensors of the CPU."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from hf_alibi.attention.sdpa import dispatch

HAS_TRITON = find_spec("triton") is not None
# Without a GPU, conftest.py turns the interpreter on.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@cache
def mend_interpreter():
    """The interpreter keeps bfloat16 as integers: it takes products of these, and cuts digits where a GPU rounds."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounded(self, x, type_):
        if x.dtype.scalar == tl.float32 and type_.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, x, type_)

    def wide(self, x):
        return cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    builder.cast_impl = rounded
    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(self, a), wide(self, b), *rest)


@contextmanager
def kernels_run(sizes=None):
    """Inside, `sdpa` takes the kernels on DEVICE; with tiles of these `Sizes`, if given."""
    if DEVICE == "cpu":
        mend_interpreter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_KERNEL_DEVICES", {DEVICE})
        if sizes is not None:
            from hf_alibi.attention.sdpa.gpu import launches, path

            for module in (launches, path):
                patch.setattr(module, "sizes_of", lambda *_: sizes)
        yield
