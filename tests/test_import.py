"""What `import hf_alibi` does: names in the Auto tables, whenever these are made, and nothing that takes time."""

import copy
import pickle
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_alibi
from helpers.models import stock_model


def run(code):
    """Standard output of Python code in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_imports_neither_torch_nor_models():
    code = """
import hf_alibi, sys
print([name for name in sys.modules if name in ("torch", "transformers.modeling_utils") or "modeling_" in name])
"""
    assert run(code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_alibi, transformers",
        "import transformers, hf_alibi",
        "from transformers import AutoConfig; import hf_alibi, transformers",
        "from transformers import AutoModelForCausalLM; import hf_alibi, transformers",
        "import hf_alibi; from transformers import AutoConfig; import transformers",
        "import hf_alibi.configuration, transformers",
        "import hf_alibi.cli, transformers",
    ],
)
def test_registers_in_any_order_of_imports(imports, tmp_path):
    hf_alibi.apply_alibi(stock_model("llama")).save_pretrained(tmp_path)
    code = f"""
{imports}
config = transformers.AutoConfig.from_pretrained({str(tmp_path)!r})
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
hf_alibi.verify_alibi(model)
print(type(config).__name__, type(model).__name__)
"""
    assert run(code) == "AlibiLlamaConfig AlibiLlamaForCausalLM"


def test_classes_are_made_once_and_found_by_name():
    assert hf_alibi.AlibiQwen3Config is hf_alibi.configuration.AlibiQwen3Config
    assert hf_alibi.AlibiQwen3ForCausalLM is hf_alibi.model.modeling.AlibiQwen3ForCausalLM
    config = hf_alibi.AlibiQwen3Config()
    assert AutoConfig.for_model("alibi_qwen3").__class__ is type(config)
    assert AutoModelForCausalLM._model_mapping[type(config)] is hf_alibi.AlibiQwen3ForCausalLM
    assert AutoModel._model_mapping[type(config)] is hf_alibi.AlibiQwen3Model


@pytest.mark.parametrize("name", ["AlibiQwen3Config", "AlibiGemma3TextConfig", "AlibiMistralForCausalLM"])
def test_classes_pickle_and_copy(name):
    made = getattr(hf_alibi, name)
    assert pickle.loads(pickle.dumps(made)) is made
    assert copy.deepcopy(made) is made
    # In a process that has never heard of it.
    assert run(f"import pickle; print(pickle.loads({pickle.dumps(made)!r}).__name__)") == name


def test_threads_that_ask_at_once_get_one_class():
    code = """
import sys, threading
import hf_alibi.model.modeling
sys.setswitchinterval(1e-6)
barrier, made = threading.Barrier(8), []
def ask():
    barrier.wait()
    made.append(hf_alibi.AlibiLlamaForCausalLM)
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(set(made)))
"""
    assert run(code) == "1"


@pytest.mark.parametrize("module", ["configuration_auto", "modeling_auto"])
def test_asking_where_a_module_is_and_loading_it_again_loses_nothing(module):
    """And while another thread walks through the finders, none goes from their list."""
    code = f"""
import importlib, importlib.util, sys
import hf_alibi
importlib.util.find_spec("transformers.models.auto.{module}")
finders = list(sys.meta_path)
import transformers
from transformers.models.auto import {module}
importlib.reload({module})
assert transformers.AutoConfig.for_model("alibi_llama").model_type == "alibi_llama"
assert {module}.__name__ == "transformers.models.auto.{module}"
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names
assert names["alibi_llama"] == "AlibiLlamaForCausalLM"
assert [finder for finder in finders if finder not in sys.meta_path] == []
print("done")
"""
    assert run(code) == "done"


def test_configs_pickle_and_copy():
    config = hf_alibi.AlibiGemma3TextConfig(num_attention_heads=4, alibi_slopes=[0.5, 0.1, 0.02, 0.0])
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert type(twin) is type(config)
        assert twin.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", ["nope", "AlibiNope", "AlibiNopeConfig", "AlibiDynamicCache", "Alibi"])
def test_unknown_names_are_attribute_errors(name):
    with pytest.raises(AttributeError, match=name):
        getattr(hf_alibi, name)


def test_public_names():
    assert set(hf_alibi.__all__) <= set(dir(hf_alibi))
    for name in hf_alibi.__all__:
        assert getattr(hf_alibi, name) is not None
