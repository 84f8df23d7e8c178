"""Tensor parallelism: two processes that share each layer's heads compute what one process computes.

All cases run in one pair of processes, which write what they got; the tests compare.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from transformers import AutoModelForCausalLM

import hf_alibi
from helpers.models import stock_model
from helpers.tiny_models import stock_tiny
from hf_alibi.attention import layer_slopes as head_slopes_module
from hf_alibi.attention.layer_slopes import own_heads

RANKS = 2
# Of the largest logit.
EXACT = 1e-5


@dataclass(frozen=True)
class Case:
    """A model, and how it is run."""

    family: str
    backend: str
    slopes: str = "paper"
    scaling: str | None = None
    changes: dict = field(default_factory=dict)
    how: str = "loaded"
    """`loaded` from a converted checkpoint, `converted` after loading, or with `wrong` slopes on purpose."""


CUSTOM = [0.7, 0.05, 0.3, 0.011]
GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 2}
CASES = {
    **{
        f"{family}-{backend}": Case(family, backend)
        for family in ("llama", "qwen3", "gemma3_text", "mistral", "gpt_neox", "phi3")
        for backend in ("eager", "sdpa")
    },
    "gpt_oss-eager": Case("gpt_oss", "eager", changes=GPT_OSS),
    "llama-flex_attention": Case("llama", "flex_attention"),
    **{
        f"llama-{backend}-{slopes}-{scaling}": Case("llama", backend, slopes, scaling)
        for backend, slopes, scaling in [
            ("eager", "custom", None),
            ("sdpa", "custom", None),
            ("eager", "paper", "ntk"),
            ("sdpa", "paper", "ntk"),
            ("sdpa", "custom", "ntk"),
            ("sdpa", "paper", "dynamic"),
        ]
    },
    "llama-6-heads": Case("llama", "sdpa", changes={"heads": 6}),
    "llama-converted": Case("llama", "sdpa", how="converted"),
    "llama-converted-custom": Case("llama", "eager", "custom", how="converted"),
    "llama-wrong": Case("llama", "eager", how="wrong"),
    "qwen3-wrong": Case("qwen3", "sdpa", how="wrong"),
}

# transformers has no plan for it: releases raise, or load all of it in each process.
UNPLANNED = {"gpt2": Case("gpt2", "sdpa")}
# What cannot be shared by two: loading or running raises.
REFUSED = {
    "odd-heads": Case("llama", "sdpa", changes={"heads": 3}),
    "one-key-head": Case("llama", "sdpa", changes={"num_key_value_heads": 1}),
}
ALL = CASES | UNPLANNED | REFUSED


def largest(x):
    return x.abs().max()


def build(case):
    """The unconverted model of a case, in one process."""
    # flex_attention on the CPU needs no compiler in float64, and rounding says nothing there.
    dtype = torch.float64 if case.backend == "flex_attention" else torch.float32
    if case.family in ("llama", "gpt2"):
        return stock_model(case.family, attn_implementation=case.backend, dtype=dtype, **case.changes)
    # transformers 5.20 divides the vocabulary evenly.
    return stock_tiny(case.family, attn_implementation=case.backend, vocab_size=100, **case.changes)


def convert(model, case):
    hf_alibi.apply_alibi(model, slopes=CUSTOM if case.slopes == "custom" else None)
    if case.scaling is not None:
        model.config.alibi_train_length = 8
        model.config.alibi_scaling = {"type": case.scaling, "factor": 4.0}
    return model


@torch.no_grad()
def outputs(model, caches=(None,)):
    """Logits of a left-padded batch as a whole, then with each cache in three steps, of what is no padding."""
    input_ids = torch.randint(32, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[1, :7] = 0
    found = [model(input_ids, attention_mask=mask, use_cache=False).logits[mask.bool()]]
    for cache in caches:
        steps = []
        for begin, end in ((0, 30), (30, 39), (39, 40)):
            output = model(input_ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        found.append(torch.cat(steps, dim=1)[mask.bool()])
    return torch.stack(found)


def caches(case):
    return (None, hf_alibi.AlibiCache()) if case.backend == "sdpa" else (None,)


def work(rank, folder):
    """One of the two processes: run every case, write what came of it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=timedelta(minutes=3))
    results = {"direct": {name: attempt(check) for name, check in DIRECT.items()}}
    for name, case in ALL.items():
        results[name] = attempt(lambda name=name, case=case: run(folder, name, case))
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def attempt(call):
    """What the call returns, or its error as text."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", **kwargs).eval()


def run(folder, name, case):
    """The logits of a case and, by layer, the slopes that `verify_alibi` measures on this rank."""
    model = load(folder / name, attn_implementation=case.backend)
    if case.how == "converted":
        convert(model, case)
    with pytest.MonkeyPatch.context() as patch:
        if case.how == "wrong":
            patch.setattr(head_slopes_module, "own_heads", lambda module, heads, width: (heads, 0))
            return outputs(model), None
        logits = outputs(model, caches(case))
    slopes = [report.slopes for report in hf_alibi.verify_alibi(model)]
    if name == "llama-sdpa":
        model.save_pretrained(folder / "saved-again")
    return logits, slopes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By name of the case: what one process computes, and what each of two computes."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    single = {}
    for name, case in ALL.items():
        model = build(case)
        if case.how == "converted":
            model.save_pretrained(folder / name)
        convert(model, case)
        if case.how != "converted":
            model.save_pretrained(folder / name)
        if name not in REFUSED:
            single[name] = outputs(model, caches(case) if case.how != "wrong" else (None,))
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    ranks = [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]
    return SimpleNamespace(folder=folder, single=single, ranks=ranks)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.how != "wrong"])
def test_two_processes_compute_what_one_does(results, name):
    for rank in results.ranks:
        assert not isinstance(rank[name], str), rank[name]
        assert largest(rank[name][0] - results.single[name]) < EXACT * largest(results.single[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.how == "wrong"])
def test_the_first_slopes_on_every_rank_would_be_noticed(results, name):
    for rank in results.ranks[1:]:
        assert largest(rank[name][0] - results.single[name]) > 0.1 * largest(results.single[name])


@pytest.mark.parametrize("name", ["llama-sdpa", "llama-eager-custom-None", "llama-converted-custom", "llama-6-heads"])
def test_each_rank_verifies_the_slopes_of_its_own_heads(results, name):
    if CASES[name].slopes == "custom":
        slopes = CUSTOM
    else:
        slopes = hf_alibi.alibi_slopes(CASES[name].changes.get("heads", 4)).tolist()
    half = len(slopes) // RANKS
    for rank, expected in zip(results.ranks, (slopes[:half], slopes[half:]), strict=True):
        assert rank[name][1] == [pytest.approx(expected)] * 2


def test_a_plan_that_gathers_all_heads_gives_each_rank_all_slopes(results):
    for rank in results.ranks:
        assert rank["phi3-sdpa"][1] == [pytest.approx(hf_alibi.alibi_slopes(4).tolist())] * 2


def test_a_shared_model_saves_the_checkpoint_that_it_was_loaded_from(results):
    first, second = (
        AutoModelForCausalLM.from_pretrained(results.folder / name) for name in ("llama-sdpa", "saved-again")
    )
    assert type(second).__name__ == "AlibiLlamaForCausalLM"
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_without_a_plan_nothing_is_shared(results):
    for rank in results.ranks:
        found = rank["gpt2"]
        if isinstance(found, str):
            assert "has no `tp_plan`" in found
        else:
            assert largest(found[0] - results.single["gpt2"]) < EXACT * largest(results.single["gpt2"])


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_two_cannot_share_raise(results, name):
    for rank in results.ranks:
        # PyTorch's words, or those of a release of transformers.
        assert isinstance(rank[name], str)
        assert "invalid for input of size" in rank[name] or "divisible" in rank[name]


# Layers made by hand, which run in the two processes


def toy(heads, **weights):
    """A layer whose config says `heads`, with these weights (outputs, inputs) whole or sharded."""
    module = nn.Module()
    config = SimpleNamespace(num_attention_heads=heads)
    config.to_dict = lambda: {**vars(config), **module.counts}
    module.config, module.counts = config, {}
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight))
    return module


def sharded(outputs, inputs, *placements):
    from torch.distributed.tensor import distribute_tensor

    mesh = dist.init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    return distribute_tensor(torch.zeros(outputs, inputs), mesh, placements)


def by_outputs(outputs, inputs):
    from torch.distributed.tensor import Shard

    return sharded(outputs, inputs, Shard(0))


def by_inputs(outputs, inputs):
    from torch.distributed.tensor import Shard

    return sharded(outputs, inputs, Shard(1))


def some_layers_have_fewer(module, count):
    module.counts["num_attention_heads_per_layer"] = [8, count]
    return module


DIRECT = {
    # Parts as torch.chunk makes them: two heads and one.
    "uneven": lambda: own_heads(toy(3, q=by_outputs(3, 5), o=by_inputs(5, 3)), 2 - dist.get_rank(), 1),
    "more heads than the config says": lambda: own_heads(toy(4, o=by_inputs(5, 64)), 4, 8),
    "gated queries": lambda: own_heads(toy(4, q=by_outputs(64, 32), o=by_inputs(32, 32)), 2, 8),
    "gathered": lambda: own_heads(toy(4, q=by_outputs(32, 5), o=by_inputs(5, 32)), 4, 8),
    "output projection whole": lambda: own_heads(toy(4, q=by_outputs(32, 5), o=torch.zeros(5, 32)), 4, 8),
    "weights sharded for storage": lambda: own_heads(toy(4, q=by_outputs(32, 32), o=by_outputs(32, 32)), 4, 8),
    "nothing sharded": lambda: own_heads(toy(4, q=torch.zeros(32, 5), o=torch.zeros(5, 32)), 4, 8),
    "fewer heads in this layer": lambda: own_heads(
        some_layers_have_fewer(toy(8, q=torch.zeros(32, 5), o=torch.zeros(5, 32)), 4), 4, 8
    ),
    "a part of a layer with fewer heads": lambda: own_heads(
        some_layers_have_fewer(toy(8, q=by_outputs(32, 5), o=by_inputs(5, 32)), 4), 2, 8
    ),
    # Refused.
    "cut without a trace": lambda: own_heads(toy(4, q=torch.zeros(16, 5), o=torch.zeros(5, 16)), 2, 8),
    "output projection elsewhere": lambda: own_heads(toy(4, q=by_outputs(32, 32)), 2, 8),
    "two answers": lambda: own_heads(toy(4, o=by_inputs(5, 32), other=by_inputs(5, 16)), 2, 8),
    "values padded to the width of all": lambda: own_heads(toy(4, o=by_inputs(5, 32)), 2, 16),
    "parts of heads": lambda: own_heads(toy(3, o=by_inputs(5, 24)), 1, 8),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uneven", [(3, 0), (3, 2)]),
        ("more heads than the config says", [(8, 0), (8, 4)]),
        ("gated queries", [(4, 0), (4, 2)]),
        ("gathered", [(4, 0), (4, 0)]),
        ("output projection whole", [(4, 0), (4, 0)]),
        ("weights sharded for storage", [(4, 0), (4, 0)]),
        ("nothing sharded", [(4, 0), (4, 0)]),
        ("fewer heads in this layer", [(4, 0), (4, 0)]),
        ("a part of a layer with fewer heads", [(4, 0), (4, 2)]),
    ],
)
def test_heads_are_found_by_the_layout_of_the_weights(results, name, expected):
    assert [rank["direct"][name] for rank in results.ranks] == expected


@pytest.mark.parametrize(
    "name",
    [
        "cut without a trace",
        "output projection elsewhere",
        "two answers",
        "values padded to the width of all",
        "parts of heads",
    ],
)
def test_heads_that_cannot_be_told_are_refused(results, name):
    for rank in results.ranks:
        assert "ALiBi slopes are unknown" in str(rank["direct"][name])
