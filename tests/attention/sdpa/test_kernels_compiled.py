"""What a GPU would run: the kernels compiled for several, and their graph under torch.compile; none is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import compile_kernels as script
from helpers.triton_kernels import needs_triton

pytestmark = needs_triton


def run(*command, tmp_path):
    """The lines that a new process prints, in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(script.__file__).parents[1])}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("architecture", "itemsize", "widths"),
    [
        ("90", 2, [64]),
        *(
            pytest.param(architecture, itemsize, [64, 80, 256], marks=pytest.mark.slow)
            for architecture in script.SHARED
            for itemsize in (2, 4)
        ),
    ],
)
def test_kernels_compile_and_fit(architecture, itemsize, widths, tmp_path):
    lines = run(script.__file__, architecture, str(itemsize), *map(str, widths), tmp_path=tmp_path)
    kernels = [json.loads(line) for line in lines]
    assert len(kernels) == 14 * len(widths)
    assert all(shared <= script.SHARED[architecture] for _, shared in kernels), kernels


ONE_GRAPH = """
import torch
import triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from helpers.attention import layer
from hf_alibi.attention.sdpa import dispatch

dispatch._KERNEL_DEVICES = {"cpu"}


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


triton.runtime.driver.set_active(Driver())


def count(graph, _):
    kernels = [node for node in graph.graph.nodes if "triton_kernel" in str(node.target)]
    print("graph", len(kernels))
    return make_boxed_func(graph.forward)


def attend(query, key, value, sinks):
    return dispatch.sdpa_alibi_attention(module, query, key, value, None, s_aux=sinks, softcap=30.0)[0]


def attend_one(query, key, value, mask):
    return dispatch.sdpa_alibi_attention(module, query, key, value, mask)[0]


module = layer(4)
partition = min_cut_rematerialization_partition
backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition)
with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    for length in (300, 5000):
        states = [torch.empty(2, length, heads, 64).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
        sinks = torch.empty(4, requires_grad=True)
        output = compiled(*states, sinks)
        assert output.shape == (2, length, 4, 64)
        output.sum().backward()
        assert all(x.grad.shape == x.shape for x in (*states, sinks))
"""


ONE_TOKEN = """
    one = torch.compile(attend_one, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for keys in (600, 5000):
            states = [torch.empty(2, heads, tokens, 64) for heads, tokens in ((4, 1), (2, keys), (2, keys))]
            assert one(*states, torch.ones(2, 1, 1, keys, dtype=torch.bool)).shape == (2, 1, 4, 64)
"""


def test_one_graph_for_all_lengths(tmp_path):
    """Forward and backward are one graph each, of two kernels, whatever the length; one new token is another."""
    lines = run("-c", ONE_GRAPH + ONE_TOKEN, tmp_path=tmp_path)
    assert lines == ["graph 2", "graph 2", "graph 2"]
