"""Ratios are computed right, variants do what they say, and a run leaves every row; no speed is tested."""

import json
from contextlib import nullcontext
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache

from helpers.models import stock_model
from helpers.runs import BYTES, config_file, drop_weight, raising, refused, save
from hf_alibi import cli
from hf_alibi.attention.backends import BACKENDS
from hf_alibi.benchmark import attention_cases as workloads
from hf_alibi.benchmark import error_cases
from hf_alibi.benchmark import model_cases as model_workloads
from hf_alibi.benchmark.attention_cases import causal_attention
from hf_alibi.benchmark.settings import BenchmarkArguments
from hf_alibi.benchmark.timing import OK, Stopwatch, allocated_peak
from hf_alibi.commands import benchmark as run_module
from hf_alibi.commands.benchmark import benchmark, growth_rows
from hf_alibi.reporting import plots
from hf_alibi.reporting.plots import cost_by_length

CPU = torch.device("cpu")
FLEX = "flex_attention"
VARIANTS = ["causal", "sdpa", "dense_bias", "eager", FLEX]
TINY = {
    "lengths": [16, 64],
    "error_lengths": [40],
    "heads": 4,
    "head_dim": 8,
    "model_lengths": [16],
    "model_layers": 1,
    "model_key_value_heads": 2,
    "vocab_size": 50,
    "contexts": [16],
    "sequence_lengths": [16, 64],
    "repeats": 2,
    "seconds": 0.0,
    "memory_limit": 0.25,
}


class Machine:
    """Fake variants on a fake clock: a variant takes as long as it says, times what the machine does meanwhile."""

    def __init__(self, load=lambda call: 1.0):
        self.now = 0.0
        self.calls = []
        self.load = load

    def variant(self, name, seconds):
        def run():
            times = self.calls.count(name)
            self.now += seconds[times % len(seconds)] * self.load(len(self.calls))
            self.calls.append(name)

        return run

    def compare(self, repeats, *, seconds=0.0, **variants):
        """The rows of variants that take these times in turn, or cannot run for the reason given."""
        watch = Stopwatch(repeats, seconds, clock=lambda: self.now)
        runs = {name: each if isinstance(each, str) else self.variant(name, each) for name, each in variants.items()}
        return watch.compare(runs, baseline="a")


def test_a_side_twice_as_slow_is_twice_as_slow():
    machine = Machine()
    a, b = machine.compare(3, a=[0.5], b=[1.0])
    assert machine.calls == ["a", "b"] * 4
    assert (a["variant"], a["seconds"], a["ratio"]) == ("a", 0.5, 1.0)
    assert (b["variant"], b["seconds"], b["ratio"], b["ratio_low"], b["ratio_high"]) == ("b", 1.0, 2.0, 2.0, 2.0)
    assert (b["status"], b["repeats"], b["times"]) == (OK, 3, [1.0] * 3)


def test_a_machine_that_becomes_slower_changes_no_ratio():
    machine = Machine(load=lambda call: 1.0 + call // 2)  # a round more, a unit slower
    _, b = machine.compare(5, a=[1.0], b=[2.0])
    assert b["times"] == [4.0, 6.0, 8.0, 10.0, 12.0]
    assert (b["seconds"], b["ratio"], b["ratio_low"], b["ratio_high"]) == (8.0, 2.0, 2.0, 2.0)


def test_the_ratio_is_the_median_of_those_of_the_rounds():
    _, b = Machine().compare(3, a=[99.0, 1.0, 2.0, 10.0], b=[99.0, 4.0, 2.0, 5.0])
    assert b["times"] == [4.0, 2.0, 5.0]  # the first round does not count
    assert b["seconds"] == 4.0
    # Of 4, 1 and 0.5; the ratio of the medians would be 2.
    assert (b["ratio_low"], b["ratio"], b["ratio_high"]) == (0.75, 1.0, 2.5)


def test_one_round_is_its_own_spread():
    rows = Machine().compare(1, a=[1.0], b=[3.0])
    assert [(row["ratio_low"], row["ratio"], row["ratio_high"]) for row in rows] == [(1.0,) * 3, (3.0,) * 3]


def test_short_calls_are_repeated_until_the_time_is_up():
    assert {row["repeats"] for row in Machine().compare(2, seconds=2.0, a=[0.25], b=[0.25])} == {4}


def test_a_side_that_cannot_run_says_why():
    rows = Machine().compare(1, a="too big", b=[1.0])
    assert [row["status"] for row in rows] == ["too big", OK]
    assert (rows[0]["seconds"], rows[0]["times"], rows[1]["seconds"]) == (None, [], 1.0)
    assert rows[1]["ratio"] is None
    assert [row["status"] for row in Machine().compare(1, seconds=1.0, a="no")] == ["no"]


def test_an_unexpected_error_is_raised():
    with pytest.raises(ZeroDivisionError):
        Stopwatch(1).compare({"a": raising(ZeroDivisionError)}, baseline="a")


def test_the_peak_counts_what_was_freed_again_and_buffers_inside_kernels():
    mebibyte = 2**20

    def run():
        freed = torch.empty(3 * mebibyte, dtype=torch.uint8)
        del freed
        kept = torch.empty(mebibyte, dtype=torch.uint8)
        passing = torch.empty(mebibyte, dtype=torch.uint8)
        del passing
        return kept

    assert allocated_peak(run, CPU) == 3 * mebibyte
    query = torch.randn(1, 2, 256, 16)
    peaks = [allocated_peak(lambda: workloads.causal_attention(query, query, query), CPU) for _ in range(2)]
    assert peaks[0] == peaks[1] > query.nbytes  # the output, and the kernel's own


@pytest.fixture(autouse=True)
def _no_flex(monkeypatch):
    """Compiling takes longer than all tests here."""
    backends = {name: attention for name, attention in BACKENDS.items() if name != FLEX}
    monkeypatch.setattr(workloads, "BACKENDS", backends)


def arguments(**changes):
    return BenchmarkArguments(**{"output_dir": "out", **TINY, "heads": 6, "key_value_heads": 2, **changes})


@pytest.mark.parametrize("backward", [False, True])
def test_all_sides_with_the_bias_compute_the_same(backward):
    variants = workloads._Attention(arguments(), 64, CPU, backward).variants
    assert list(variants) == VARIANTS

    def output(name):
        result = variants[name]()
        return torch.cat([part.flatten() for part in (result if backward else [result])])

    assert torch.allclose(output("sdpa"), output("eager"), atol=1e-4)
    assert torch.allclose(output("dense_bias"), output("eager"), atol=1e-4)
    assert not torch.allclose(output("causal"), output("eager"), atol=1e-2)


def test_the_same_seed_gives_the_same_inputs():
    one, same, other = (workloads._Attention(arguments(seed=seed), 64, CPU).inputs for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
def test_what_a_quadratic_side_is_said_to_need_is_what_it_needs_at_most(monkeypatch, dtype, backward):
    asked = []
    monkeypatch.setattr(BenchmarkArguments, "why_not", lambda self, needed: asked.append(needed))
    attention = workloads._Attention(arguments(dtype=dtype, head_dim=64), 256, CPU, backward)
    inputs = sum(tensor.nbytes for tensor in attention.inputs)
    for (name, run), needed in zip(attention.variants.items(), asked, strict=True):
        if name in workloads._SQUARES:
            assert inputs + attention.held[name] + allocated_peak(run, CPU) <= needed


def test_flex_attention_runs_where_it_can_and_says_why_where_not(monkeypatch):
    def reason(backward=False):
        variant = workloads._Attention(arguments(), 64, CPU, backward).variants[FLEX]
        return variant if isinstance(variant, str) else OK

    assert reason() == "no ALiBi backend flex_attention"
    monkeypatch.setitem(workloads.BACKENDS, FLEX, BACKENDS["sdpa"])
    assert reason() == OK
    assert reason(backward=True) == "flex_attention has no backward on CPU"

    monkeypatch.setitem(workloads.BACKENDS, FLEX, raising(RuntimeError("no compiler")))
    assert reason() == "failed: no compiler"


@pytest.mark.parametrize("shape", model_workloads._SHAPES)
@pytest.mark.parametrize("kind", model_workloads._CACHES)
def test_every_decode_step_has_the_same_context(monkeypatch, shape, kind):
    cases = model_workloads.decode_cases(arguments(model_layers=2), CPU)
    (case,) = [case for case in cases if (case.subject, case.what) == (shape, f"{kind} cache")]
    caches, logits = [], {}
    forget = model_workloads._forget_last

    def looked_at(cache):
        forget(cache)
        caches.append((isinstance(cache, StaticCache), [int(layer.get_seq_length()) for layer in cache.layers]))

    def compare(self, variants, **kwargs):
        caches.clear()
        logits.update({name: [step() for _ in range(3)] for name, step in variants.items()})
        return []

    monkeypatch.setattr(model_workloads, "_forget_last", looked_at)
    monkeypatch.setattr(Stopwatch, "compare", compare)
    case.measure(Stopwatch(1))
    assert caches == [(kind == "static", [16, 16])] * 6 + [(False, [16, 16])] * 3
    for steps in logits.values():
        assert all(torch.equal(steps[0], step) for step in steps)
    # The same weights, cache and token: only the bias is new.
    assert not torch.equal(logits["unconverted"][0], logits["converted"][0])
    assert torch.allclose(logits["converted, AlibiCache"][0], logits["converted"][0], atol=1e-5)


KINDS = ("output", "query gradient", "key gradient", "value gradient")
TYPES = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}


def test_errors_are_those_to_float64(command, monkeypatch):
    results = command(parts=["errors"], error_lengths=[40, 300])
    plain = {(r["what"], r["length"]): r["error"] for r in results["rows"] if r["variant"] == "causal"}
    for row in results["rows"]:
        dtype = row["what"].split(", ")[1]
        assert row["ratio"] == row["error"] / plain[row["what"], row["length"]]
        assert TYPES[dtype] / 1000 < row["error"] < TYPES[dtype]
    # Without the bias the error is as large as the truth.
    monkeypatch.setitem(BACKENDS, "sdpa", lambda module, *states: (causal_attention(*states[:3]), None))
    (case, *_) = error_cases.error_cases(BenchmarkArguments(**{**TINY, "output_dir": "x"}), torch.device("cpu"))
    rows = case.measure(Stopwatch(1))
    assert all(row["error"] > 0.05 for row in rows if row["variant"] == "sdpa")


def test_on_a_gpu_short_calls_are_repeated_within_a_round():
    now, called = [0.0], []

    def run(name, seconds):
        called.append(name)
        now[0] += seconds

    watch = Stopwatch(2, clock=lambda: now[0], sample=1.0)
    rows = watch.compare({"a": partial(run, "a", 0.25), "b": partial(run, "b", 2.0)}, baseline="a")
    assert [row["seconds"] for row in rows] == [0.25, 2.0]
    # Two calls to find out, then two rounds of four and of one.
    assert (called.count("a"), called.count("b")) == (2 + 2 * 4, 2 + 2 * 1)


def test_growth_is_that_of_the_cost_per_token():
    def row(variant, length, cost):
        named = {"part": "attention", "what": "forward", "variant": variant, "length": length}
        return {**named, "microseconds_per_token": cost}

    rows = [row("a", 16, 2.0), row("a", 64, 5.0), row("b", 16, 1.0), row("b", 64, None), row("c", 64, 1.0)]
    grown = {each["variant"]: each for each in growth_rows([*rows, row("a", 32, 9.0)])}
    assert (grown["a"]["growth"], grown["a"]["growth_from"], grown["a"]["length"]) == (2.5, 16, 64)
    assert grown["b"]["status"] == "not timed at 64 tokens"
    assert grown["c"]["status"] == "not timed at 16 tokens"


@pytest.fixture
def command(tmp_path):
    """Run with these settings in a tiny shape."""
    output_dir, config = str(tmp_path / "out"), tmp_path / "config.yaml"
    return lambda **changes: benchmark(config_file({"output_dir": output_dir, **TINY, **changes}, config))


def test_a_run_leaves_a_row_for_every_side(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a busy machine makes long numbers, and a narrow table wraps its words
    results = command()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"benchmark.json", "benchmark.csv", "benchmark.png"}
    assert json.loads((out / "benchmark.json").read_text()) == {"schema": 4, **json.loads(json.dumps(results))}
    assert str(tmp_path) not in (out / "benchmark.json").read_text()
    rows = {(r["part"], r["subject"], r["what"], r["length"], r["variant"]): r for r in results["rows"]}
    assert len(rows) == len(results["rows"])
    ways, models, both = ("forward", "forward_backward"), ("gpt2", "llama"), ("unconverted", "converted")
    cached = (*both, "converted, AlibiCache")
    assert set(rows) == {
        *(("attention", "attention", way, n, side) for way in ways for n in (16, 64) for side in VARIANTS),
        *(("growth", "attention", way, 64, side) for way in ways for side in VARIANTS),
        *(("memory", "attention", "forward", n, side) for n in (16, 64) for side in VARIANTS),
        *(("model", m, what, 16, side) for m in models for what in ("forward", "training_step") for side in both),
        *(("decode", m, f"{kind} cache", 16, s) for m in models for kind in ("dynamic", "static") for s in cached),
        *(("errors", "attention", f"{what}, {d}", 40, s) for what in KINDS for d in TYPES for s in ("causal", "sdpa")),
        *(("sequence", "small model", "perplexity", 64, f"{n} tokens") for n in (16, 64)),
    }
    assert {key[-1] for key, row in rows.items() if row["status"] != OK} == {FLEX}
    timed = [r for r in rows.values() if r["status"] == OK and r["part"] not in ("growth", "memory", "errors")]
    assert all(len(r["times"]) == r["repeats"] == 2 and r["seconds"] > 0 and r["ratio"] > 0 for r in timed)
    short, long = (rows["sequence", "small model", "perplexity", 64, f"{n} tokens"] for n in (16, 64))
    assert short["ratio"] == 1
    assert long["microseconds_per_token"] == pytest.approx(long["seconds"] / 64 * 1e6)
    step = rows["decode", "llama", "static cache", 16, "converted"]
    assert step["microseconds_per_token"] == pytest.approx(step["seconds"] * 1e6)
    forward = rows["attention", "attention", "forward", 64, "sdpa"]
    assert forward["microseconds_per_token"] == pytest.approx(forward["seconds"] * 1e6 / 64)
    peak = rows["memory", "attention", "forward", 64, "eager"]
    assert peak["peak_over_inputs"] == pytest.approx(peak["peak_bytes"] / (4 * 4 * 64 * 8 * 4))
    assert peak["ratio"] > 1
    assert results["environment"]["threads"] == torch.get_num_threads()
    assert results["machine"]["cpus"] > 0
    printed = capsys.readouterr().out
    assert "no ALiBi backend" in printed
    assert "gpt2 training step" in printed


def test_a_side_without_memory_is_a_row_with_the_reason(command):
    rows = command(model_layers=8, memory_limit=4e-4)["rows"]
    status = {(row["part"], row["length"], row["variant"]): row["status"] for row in rows}
    assert status["attention", 16, "eager"] == status["attention", 64, "sdpa"] == OK
    for part in ("attention", "memory"):
        assert status[part, 64, "eager"].startswith("needs about")
    for part in ("model", "decode"):
        assert status[part, 16, "converted"] == status[part, 16, "unconverted"]
        assert "memory_limit is 0.0004" in status[part, 16, "converted"]


def test_parts_are_written_as_they_are_done(command, tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "allocated_peak", raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command()
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"attention", "growth"}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """An unconverted model with a tokenizer, and an attention whose reads are known."""
    reads = SimpleNamespace(layer=None, pairs=(10, 5, 5, 4), causal_pairs=10, windows=(8, 4, 4, 2))
    monkeypatch.setattr(model_workloads, "record_reads", lambda: nullcontext([reads]))
    folder = save(stock_model("llama", vocab_size=BYTES), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("A plain text, again and again. " * 4, encoding="utf-8")
    return {"model_name_or_path": folder, "text": str(text), "parts": ["activations"]}


def test_activations_are_those_of_each_layer(command, checkpoint, tmp_path):
    results = command(**checkpoint, activation_lengths=[32, 64])
    assert results["settings"]["model_name_or_path"] == "model"
    assert str(tmp_path) not in json.dumps(results)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"benchmark.json", "benchmark.csv"}
    rows = {(row["length"], row["subject"], row["variant"]): row for row in results["rows"]}
    layers = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert list(rows) == list(product((32, 64), (*layers, "all layers"), ("causal", "sdpa")))
    assert {row["what"] for row in rows.values()} == {"converted here, untrained"}
    one = rows[64, layers[0], "sdpa"]
    assert (one["pairs_kept"], one["pairs"], one["causal_pairs"]) == (0.6, [10, 5, 5, 4], 10)
    total = rows[64, "all layers", "sdpa"]
    assert total["seconds"] == pytest.approx(sum(rows[64, layer, "sdpa"]["seconds"] for layer in layers))
    assert total["ratio"] == pytest.approx(total["seconds"] / rows[64, "all layers", "causal"]["seconds"])
    assert total["pairs_kept"] == 0.6
    assert [total["ratio_low"], total["ratio_high"]] == sorted(rows[64, layer, "sdpa"]["ratio"] for layer in layers)


def test_a_call_without_windows_reads_everything():
    assert model_workloads._reads(lambda: None) == {"pairs_kept": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ["attention", "speed"]}, "parts names speed; the parts are attention, memory"),
        ({"parts": ["activations"]}, "set model_name_or_path"),
        ({"lengths": [1, 64]}, "lengths is .1, 64.; each must be at least 2"),
        ({"variants": ["sdpa"]}, "give causal and others of causal, sdpa"),
        ({"variants": ["causal", "fast"]}, "give causal and others of causal, sdpa"),
        ({"repeats": 0}, "repeats is 0"),
        ({"key_value_heads": 3}, "key_value_heads is 3; it must divide the 4 heads"),
        ({"model_key_value_heads": 0}, "model_key_value_heads is 0"),
        ({"memory_limit": 1e9}, "lower memory_limit"),
        ({"model_name_or_path": "/nowhere"}, "cannot load the model_name_or_path /nowhere"),
        ({"length": [64]}, "did you mean lengths"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_timed(command, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(Stopwatch, "compare", None)
    with refused(message):
        command(**changes)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_missing_are_not_timed_as_random_ones(command, checkpoint):
    missing = drop_weight(checkpoint["model_name_or_path"], "mlp.down_proj.weight")
    with refused(f"lacks 1 of its weights .{missing}"):
        command(**checkpoint)


def test_a_text_that_is_too_short_is_refused(command, checkpoint):
    with refused("has 125 tokens, and activation_lengths asks for 512"):
        command(**checkpoint, activation_lengths=[512])


def test_a_folder_with_results_is_refused(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "benchmark.json").write_text("{}")
    with refused("is not empty"):
        command()


def test_the_picture_has_a_line_a_side_and_its_ratio(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    rows = [
        {
            "variant": variant,
            "what": what,
            "length": length,
            "microseconds_per_token": slow * length,
            **dict.fromkeys(("ratio", "ratio_low", "ratio_high"), slow),
            "status": OK if variant != "big" or length < 64 else "needs more",
        }
        for what in ("forward", "forward_backward")
        for variant, slow in (("causal", 1.0), ("sdpa", 0.5), ("big", 4.0))
        for length in (16, 32, 64)
    ]
    cost_by_length(rows, tmp_path / "b.png")
    cost, ratio = figures[0].axes
    lines = {line.get_label(): line for line in cost.get_lines()}
    assert set(lines) == {
        f"{variant}{with_}" for variant in ("causal", "sdpa", "big") for with_ in ("", ", with backward")
    }
    assert list(lines["sdpa"].get_ydata()) == [8, 16, 32]
    assert list(lines["big"].get_xdata()) == [16, 32]
    assert lines["sdpa, with backward"].get_linestyle() == "--"
    assert [list(line.get_ydata()) for line in ratio.get_lines()][2] == [0.5] * 3
    assert {panel.get_xscale() for panel in (cost, ratio)} == {panel.get_yscale() for panel in (cost, ratio)} == {"log"}


def test_the_command_is_known(monkeypatch):
    given = []
    monkeypatch.setattr(run_module, "benchmark", given.append)
    assert cli.main(["benchmark", "--repeats", "3"]) == 0
    assert given == [["--repeats", "3"]]
