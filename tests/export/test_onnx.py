"""ONNX exports: the names, sizes and files that ONNX Runtime and optimum look for; what it computes: tests/engines."""

import json
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer

from helpers.exports import converted
from helpers.models import stock_model
from helpers.runs import cut, refused
from hf_alibi.export import onnx as export
from hf_alibi.export.onnx import export_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_folder_is_what_optimum_loads(family, tmp_path):
    converted(tmp_path / "model", family)
    out = export_onnx(tmp_path / "model", tmp_path / "out")
    graph = onnx.load(out / "model.onnx").graph

    def sizes(value):
        return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]

    key_heads = 6 if family == "gpt2" else 2
    inputs = {value.name: sizes(value) for value in graph.input}
    cache = ["batch_size", key_heads, "past_sequence_length", 8]
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{layer}.{part}": cache for layer in range(2) for part in ("key", "value")},
    }
    outputs = {value.name: sizes(value) for value in graph.output}
    assert outputs["logits"] == ["batch_size", "sequence_length", 320]
    names = {f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")}
    assert outputs.keys() == {"logits", *names}
    assert all(outputs[name][:2] == cache[:2] and outputs[name][3] == 8 for name in names)
    assert AutoConfig.from_pretrained(out).model_type == family  # loads where hf_alibi is not
    assert "alibi_slopes" not in json.loads((out / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(out)("12 heads").input_ids


def test_bad_input_leaves_nothing_behind(tmp_path, monkeypatch):
    model, out = tmp_path / "model", tmp_path / "out"
    with refused("there is no such folder"):
        export_onnx(model, out)
    stock_model("llama").save_pretrained(tmp_path / "plain")
    with refused("a plain 'llama' model; convert it first"):
        export_onnx(tmp_path / "plain", out)
    converted(model)
    out.mkdir()
    with refused("exists; give another name"):
        export_onnx(model, out)
    out.rmdir()
    with monkeypatch.context() as patch:
        patch.setattr("hf_alibi.export.source.shutil.disk_usage", lambda _: SimpleNamespace(free=1))
        with refused("MiB, and the disk has 0 MiB left"):
            export_onnx(model, tmp_path / "new" / "out")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with refused(r"onnxscript cannot be imported .*; pip install 'hf-alibi\[onnx\]'"):
            export_onnx(model, out)
    with monkeypatch.context() as patch:
        patch.setattr(export, "_write_graph", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError, match="no space left"):
            export_onnx(model, out)
    weights = model / "model.safetensors"
    cut(weights)
    with refused("give a complete checkpoint"):
        export_onnx(model, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plain"]
