"""ONNX Runtime computes what transformers does, in every family, with padding and a cache; other slopes show."""

import resource

import numpy as np
import pytest

from helpers.exports import converted, wide_config
from hf_alibi.errors import VerificationError
from hf_alibi.export.engines.onnx_runtime import open_engine
from hf_alibi.export.onnx import export_onnx
from hf_alibi.export.parity import verify_export
from hf_alibi.export.targets import TARGETS

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("family", TARGETS["onnx"].families)
def test_logits_and_text_agree(family, tmp_path):
    converted(tmp_path / "model", family, config=wide_config(family), cut=None)
    out = export_onnx(tmp_path / "model", tmp_path / "out")
    found = verify_export("onnx", tmp_path / "model", out, lengths=[5, 40, 600], new_tokens=20)
    assert len(found["rows"]) == 3


CONVERSIONS = {"sinks": {"sink_tokens": 2}, "global heads": {"global_heads": 2, "global_every": 2}}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_whatever_a_checkpoint_says_is_in_the_graph(conversion, family, tmp_path):
    converted(tmp_path / "model", family, conversion=CONVERSIONS[conversion])
    out = export_onnx(tmp_path / "model", tmp_path / "out")
    assert verify_export("onnx", tmp_path / "model", out, lengths=[5, 40, 600])["rows"]


def test_the_temperature_of_yarn_is_in_the_graph(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0}
    converted(tmp_path / "model", config=wide_config("llama", rope_parameters=scaling))
    out = export_onnx(tmp_path / "model", tmp_path / "out")
    assert verify_export("onnx", tmp_path / "model", out, lengths=[5, 40])["rows"]


@pytest.mark.parametrize("scaling", ['{"type":"linear","factor":2}', '{"type":"dynamic"}'])
def test_other_slopes_show(scaling, tmp_path):
    converted(tmp_path / "model")
    out = export_onnx(tmp_path / "model", tmp_path / "out")
    config = tmp_path / "model" / "config.json"
    said = config.read_text().replace('"alibi_train_length": null', '"alibi_train_length": 8')
    config.write_text(said.replace('"alibi_scaling": null', f'"alibi_scaling": {scaling}'))
    with pytest.raises(VerificationError, match="differs from transformers"):
        verify_export("onnx", tmp_path / "model", out, lengths=[64])
    scaled = export_onnx(tmp_path / "model", tmp_path / "scaled")
    assert verify_export("onnx", tmp_path / "model", scaled, lengths=[64])["rows"]


def test_decoding_makes_no_matrix_of_length_squared(tmp_path):
    """Of 30,000² entries, even of one byte, there would be 900 MB."""
    converted(tmp_path / "model")
    engine = open_engine(tmp_path, export_onnx(tmp_path / "model", tmp_path / "out"), 0, 1)
    past = {name: np.zeros((1, heads, 30_000, width), np.float32) for name, (heads, _, width) in engine._empty.items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine._run(np.full((1, 1), 5), np.ones((1, 30_001), np.int64), past)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
