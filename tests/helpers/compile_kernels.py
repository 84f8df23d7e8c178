"""Compile the kernels for GPUs, of which none is needed for that.

python compile_kernels.py ARCHITECTURE ITEMSIZE WIDTH [WIDTH ...]
prints a JSON line a kernel: its name, and the bytes that a block of its threads shares.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_alibi.attention.sdpa.gpu.kernels import backward, decoding, forward, key_blocks, mask_runs
from hf_alibi.attention.sdpa.gpu.launches import columns, sizes_for

# Bytes that a block of threads may share.
SHARED = {"80": 163 * 2**10, "86": 99 * 2**10, "90": 227 * 2**10, "gfx942": 64 * 2**10}
_FLOATS = {"scaling", "cap", "tolerance"}
_TYPES = {
    **dict.fromkeys(["LSE", "DELTA", "RADIUS", "SLOPE", "TOTAL", "LARGEST", "WEIGHT"], "fp32"),
    **dict.fromkeys(["WINDOW", "FIRST", "LAST", "AFTER", "RUN"], "i32"),
    "SEEN": "i1",
    "ALLOWED": "i1",
}


def kernels(width, itemsize, shared, **flags):
    """Each with its compile-time values and options."""
    sizes = sizes_for(width, width, itemsize, shared)
    flags = {"SINK_TOKENS": 0, "RUNS": False, "CAP": False, **flags}
    widths = {"WIDTH": width, "VALUE_WIDTH": width, "COLUMNS": columns(width), "VALUE_COLUMNS": columns(width)}
    tile = {**widths, **flags, "BLOCK": sizes.block}
    own = {"ROWS": sizes.rows, "KEYS": sizes.keys}
    first = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    second = {"num_warps": sizes.backward_warps, "num_stages": sizes.backward_stages}
    extra = {"CHUNK": sizes.chunk, "SKIP": True, "LEARNED_SINK": flags["RUNS"]}
    keys = {"ROWS": sizes.query_tile, "KEYS": sizes.key_tile, "WINDOW_ROWS": sizes.rows}
    yield forward.attend, {**tile, **own, **extra}, first
    yield backward.attend_backward_queries, {**tile, **own}, second
    yield backward.attend_backward_keys, {**tile, **keys}, second
    block = {"BLOCK": sizes.block, "WIDTH": width, "COLUMNS": columns(width)}
    yield key_blocks.summarize_keys, block, {}
    one = {**widths, "HEADS": 16, "SPAN": 512, "KEYS": 64 if width * itemsize <= 256 else 16, "MASK": flags["RUNS"]}
    one |= {"SINK_TOKENS": flags["SINK_TOKENS"], "CAP": flags["CAP"]}
    yield decoding.decode, one, {"num_stages": 2}
    joined = {"VALUE_WIDTH": width, "VALUE_COLUMNS": columns(width), "PARTS": 64, "LEARNED_SINK": flags["RUNS"]}
    yield decoding.join_parts, joined, {}
    yield mask_runs.runs_of_mask, {"CHUNK": 1024}, {}


def signature(kernel, dtype):
    types, divisible = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            types[name] = "constexpr"
        elif name.isupper():
            types[name] = "*" + _TYPES.get(name, dtype)
        else:
            types[name] = "fp32" if name in _FLOATS else "i32"
        if types[name][0] == "*" or name.endswith(("_row", "_head", "_batch")):
            divisible[(index,)] = [["tt.divisibility", 16]]
    return types, divisible


def main(architecture, itemsize, *widths):
    is_cuda = architecture.isdigit()
    target = GPUTarget("cuda", int(architecture), 32) if is_cuda else GPUTarget("hip", architecture, 64)
    shared = SHARED[architecture] if is_cuda else 2**20
    for width in map(int, widths):
        for flags in ({}, {"SINK_TOKENS": 2, "RUNS": True, "CAP": True}):
            for kernel, constants, options in kernels(width, int(itemsize), shared, **flags):
                types, divisible = signature(kernel, {2: "bf16", 4: "fp32"}[int(itemsize)])
                source = ASTSource(kernel, types, constants, divisible)
                made = triton.compile(source, target=target, options=options)
                sys.stdout.write(json.dumps([kernel.fn.__name__, made.metadata.shared]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
