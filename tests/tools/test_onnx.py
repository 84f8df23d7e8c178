"""ONNX Runtime on exported models agrees with PyTorch, also for padding and other shapes than those exported."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_alibi
from helpers.models import FAMILIES, stock_config

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def inputs(batch, length, padding, masked):
    ids = torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"ids": ids, "mask": mask} if masked else {"ids": ids}


def exported(wrapped, example, file, dynamo):
    """A session of ONNX Runtime for a module, with any batch and length."""
    names = list(example)
    if dynamo:
        batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
        options = {"dynamic_shapes": {name: {0: batch, 1: length} for name in names}}
    else:
        options = {"dynamic_axes": {name: {0: "batch", 1: "length"} for name in names}, "opset_version": 17}
    torch.onnx.export(wrapped, tuple(example.values()), str(file), dynamo=dynamo, input_names=names, **options)
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def error(session, wrapped, given):
    """Largest difference to PyTorch at tokens that are not padding."""
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    seen = given.get("mask", torch.ones_like(given["ids"])).bool()
    return (torch.from_numpy(found) - wrapped(**given))[seen].abs().max().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "no mask"])
@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_runtime_agrees(family, dynamo, backend, sink_tokens, masked, tmp_path):
    if not dynamo and not masked:
        pytest.skip("transformers' masks without a padding mask have no legacy form, converted or not")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(stock_config(family), attn_implementation=backend).eval()
    example = inputs(2, 9, 4, masked)
    with torch.no_grad():
        plain = None if dynamo else exported(Logits(model), example, tmp_path / "plain.onnx", False)
        if plain is not None and error(plain, Logits(model), example) > 1e-4:
            pytest.skip(f"the legacy exporter writes a plain {family} wrongly, too")
        wrapped = Logits(hf_alibi.apply_alibi(model, sink_tokens=sink_tokens))
        session = exported(wrapped, example, tmp_path / "model.onnx", dynamo)
        for given in (example, inputs(3, 14, 3, masked), inputs(1, 70, 5, masked)):
            assert error(session, wrapped, given) < 1e-4
