"""Calls of attention functions, as a self-attention layer makes them, and what they should give."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import reference
from helpers.triton_kernels import DEVICE, kernels_run, needs_triton
from hf_alibi.attention.backends import BACKENDS
from hf_alibi.attention.sdpa import dispatch as sdpa_backend

# flash-attn needs a GPU, flex_attention a compiler; they have tests of their own.
ANYWHERE = [*(name for name in BACKENDS if name not in ("flash_attention_2", "flex_attention")), "unwindowed"]
# The same and the kernels of GPUs, which take minutes where there is none.
EVERYWHERE = [*ANYWHERE, pytest.param("kernels", marks=[needs_triton, pytest.mark.slow])]

fused = pytest.mark.skipif(
    not any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), reason="needs a C++ compiler"
)


def layer(heads, slopes=None, scaling=None, train_length=None, tolerance=None, sink_tokens=0):
    """What a backend sees of a self-attention layer."""
    module = nn.Module()
    module.is_causal = True
    module.config = SimpleNamespace(
        num_attention_heads=heads,
        alibi_slopes=slopes,
        alibi_scaling=scaling,
        alibi_train_length=train_length,
        alibi_tolerance=tolerance,
        alibi_sink_tokens=sink_tokens,
    )
    return module.eval()


def qkv(batch, heads, key_heads, queries, keys, width=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(batch, heads, queries, width),
        draw(batch, key_heads, keys, width),
        draw(batch, key_heads, keys, width),
    )


def run(backend, query, key, value, mask=None, module=None, **kwargs):
    """`unwindowed` is sdpa as it runs where no key can be left out: compiled, with dropout; `kernels`, on a GPU."""
    module = layer(query.shape[1]) if module is None else module
    if backend == "kernels":
        there = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (query, key, value, mask)]
        with kernels_run():
            return run("sdpa", *there, module, **kwargs).cpu()
    with pytest.MonkeyPatch.context() as patch:
        if backend == "unwindowed":
            backend = "sdpa"
            patch.setattr(sdpa_backend, "_can_skip", lambda *_: False)
        return BACKENDS[backend](module, query, key, value, mask, **kwargs)[0].transpose(1, 2)


def expected(query, key, value, seen=None, position=None, head_slopes=None):
    """Reference; without a mask, the queries are the last of the keys."""
    batch, keys, queries = query.shape[0], key.shape[2], query.shape[2]
    if seen is None:
        seen = torch.ones(keys, keys, dtype=torch.bool).tril()[-queries:].expand(batch, -1, -1)
    position = torch.arange(keys).expand(batch, -1) if position is None else position
    head_slopes = reference.slopes(query.shape[1]) if head_slopes is None else head_slopes
    return reference.attention(query, key, value, seen, position, head_slopes, query.shape[-1] ** -0.5)


def largest(a, b):
    return (a.double() - b.double()).abs().max().item()


def additive(seen, dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class LargestTensor(TorchDispatchMode):
    """Records the largest floating-point tensor, in entries, that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.entries = max(self.entries, tensor.numel())
        return output


def with_gradients(attention, inputs, upstream):
    """Output and the gradients of queries, keys and values."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))


def upstream_of(query, seed=9):
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(seed))


def root_mean_square(a, b):
    return (a.double() - b.double()).square().mean().sqrt().item()


def block_mask(seen):
    """BlockMask of bool (batch, queries, keys)."""

    def mask_mod(b, h, q, k):
        return seen[b, q, k]

    return create_block_mask(mask_mod, seen.shape[0], None, *seen.shape[1:], device=seen.device)
