"""Checkpoints that cannot be loaded say why in one line, whatever transformers raises."""

import json

import pytest

from helpers.models import stock_model
from hf_alibi.errors import InputError
from hf_alibi.evaluation.checked_model import check_model
from hf_alibi.model.loading import load_complete


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_attention_heads", "four", "does not suit its model type .* expected int, got str"),
        ("rope_parameters", 3, "does not suit its model type .*'rope_parameters' with value 3"),
        ("model_type", ["llama"], "does not suit its model type .*unhashable"),
        ("hidden_act", "nope", "does not suit its model type .*nope"),
    ],
)
def test_a_config_with_wrong_types_is_one_line(tmp_path, field, value, words):
    stock_model("llama").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    for load in (
        lambda: load_complete(tmp_path, dtype="float32", attn_implementation=None, name="the model"),
        lambda: check_model("model", str(tmp_path), dtype="float32", attn_implementation=None),
    ):
        with pytest.raises(InputError, match=words) as error:
            load()
        assert "\n" not in str(error.value)
