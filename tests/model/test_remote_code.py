"""Checkpoints that bring along their code load without the package, and change nothing where it is imported."""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import hf_alibi
from helpers.models import stock_model
from helpers.tiny_models import FIRST_TOKEN, VOCABULARY, stock_tiny
from hf_alibi.model import code_export

ENTRY = "hf_alibi_model_remote_code"
# The last two are composites: of one family, and of any that the config of its text part names.
TYPES = ("gpt2", "llama", "qwen3", "gemma3_text", "gpt_oss", "falcon", "gemma3", "llava")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

# Runs pieces of code, each in a process of its own, where the package cannot be imported.
WITHOUT_PACKAGE = """
import sys
sys.modules["hf_alibi"] = None
import copy, json, os, traceback
from pathlib import Path
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification
import transformers.modeling_utils

torch.set_num_threads(1)

def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.load("tokens.pt")).logits

def same(model, name):
    return torch.equal(logits(model), torch.load(f"{name}.pt"))

def load(path, auto_class=AutoModelForCausalLM):
    model, info = auto_class.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    # A base model leaves the head where it is.
    assert not any(info.values()) or auto_class is AutoModel, info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model

def refused(path, expected, **options):
    try:
        AutoModelForCausalLM.from_pretrained(path, **options)
    except ValueError as error:
        assert expected in str(error), error
    else:
        raise AssertionError("was loaded")

for name, code in json.load(sys.stdin).items():
    process = os.fork()
    if not process:
        outcome = "ok"
        sys.stdin = open(os.devnull)
        try:
            exec(code)
        except BaseException:
            outcome = traceback.format_exc()
        Path(f"{name}.outcome").write_text(outcome)
        os._exit(0)
    os.waitpid(process, 0)
"""

# What a reader without the package does with a checkpoint.
READ = """
model = load(name, AutoModelForImageTextToText if name == "llava" else AutoModelForCausalLM)
assert same(model, name)
assert same(copy.deepcopy(model), name)
model.save_pretrained(f"again/{name}")
model.save_pretrained(f"flag/{name}", export_remote_code=True)
before, again = (json.loads(Path(folder, "config.json").read_text()) for folder in (name, f"again/{name}"))
for key in ("architectures", "auto_map", "model_type"):
    assert again[key] == before[key], again[key]
own = {path.name: path.read_bytes() for path in Path(name).glob("*.py")}
for folder in ("again", "flag"):
    assert {path.name: path.read_bytes() for path in Path(folder, name).glob("*.py")} == own
"""

CASES = {
    **dict.fromkeys(TYPES, READ),
    **{
        f"{folder}_{name}": f'assert same(load("{folder}/{name}"), "{name}")'
        for folder in ("again", "flag")
        for name in ("gpt2", "gemma3")
    },
    "refusals": """
        refused("llama", "trust_remote_code=True")
        refused("llama", "trust_remote_code=True", trust_remote_code=False)
        refused("plain", "alibi_llama")
        refused("plain", "alibi_llama", trust_remote_code=True)
    """,
    "base": """
        model = load("llama", AutoModel)
        assert type(model).__name__ == "AlibiLlamaModel"
        model.save_pretrained("base_again")
        found = json.loads(Path("base_again/config.json").read_text())["auto_map"]
        assert "AutoModelForCausalLM" not in found, found
        load("base_again", AutoModel)
    """,
    "config": """
        config = AutoConfig.from_pretrained("llava", trust_remote_code=True)
        assert type(config.text_config).__name__ == "AlibiLlamaConfig"
        assert type(AutoModelForCausalLM.from_config(config.text_config)).__name__ == "AlibiLlamaForCausalLM"
        config.save_pretrained("config_again")
        again = AutoConfig.from_pretrained("config_again", trust_remote_code=True)
        assert type(again).__name__ == "AlibiLlavaConfig"
    """,
    "generation": """
        model = load("gpt2")
        model.set_attn_implementation("eager")
        assert torch.allclose(logits(model), torch.load("gpt2.pt"), atol=1e-4)
        tokens = torch.load("tokens.pt")
        with_cache, without = (
            model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
        )
        assert torch.equal(with_cache, without)
    """,
    # As the hub's cache lays it out: transformers follows the imports of each file by itself.
    "hub": 'assert same(load("someone/some-model"), "gemma3")',
    "hub_classifier": """
        load_one = AutoModelForSequenceClassification.from_pretrained
        model = load_one("someone/some-model", trust_remote_code=True)
        assert "transformers_modules.someone." in type(model).__module__, type(model)
    """,
    "package_comes_later": """
        remote = load("llama")
        del sys.modules["hf_alibi"]
        sys.path.insert(0, os.environ["PACKAGE"])
        import hf_alibi
        for trust in (None, False, True):
            local = AutoModelForCausalLM.from_pretrained("llama", trust_remote_code=trust)
            assert type(local) is hf_alibi.AlibiLlamaForCausalLM, type(local)
            assert same(local, "llama") and same(remote, "llama")
        hf_alibi.verify_alibi(local)
        local.save_pretrained("local_after_remote")
        assert "auto_map" not in json.loads(Path("local_after_remote/config.json").read_text())
        remote.save_pretrained("remote_after_local")
        assert sorted(Path("remote_after_local").glob("*.py"))
        assert same(AutoModelForCausalLM.from_pretrained("remote_after_local"), "llama")
        assert type(AutoModel.from_pretrained("llama")) is hf_alibi.AlibiLlamaModel
        tokens = torch.load("tokens.pt")
        options = {"max_new_tokens": 4, "do_sample": False}
        cached = local.generate(tokens, past_key_values=hf_alibi.AlibiCache(), **options)
        assert torch.equal(cached, remote.generate(tokens, **options))
    """,
    "package_comes_first": """
        del sys.modules["hf_alibi"]
        sys.path.insert(0, os.environ["PACKAGE"])
        import hf_alibi
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        remote = get_class_from_dynamic_module("hf_alibi_model_remote_code.AlibiLlamaForCausalLM", "llama")
        assert same(remote.from_pretrained("llama"), "llama")
        local = AutoModelForCausalLM.from_pretrained("llama")
        assert type(local) is hf_alibi.AlibiLlamaForCausalLM, type(local)
        assert same(local, "llama")
    """,
}


def alibi_model(name):
    if name == "llava":
        vision = CLIPVisionConfig(**SMALL, image_size=16, patch_size=8)
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**SMALL, vocab_size=VOCABULARY), image_token_index=3
        )
        return hf_alibi.apply_alibi(AutoModelForImageTextToText.from_config(config).eval())
    return hf_alibi.apply_alibi(stock_tiny(name))


def as_in_the_hubs_cache(folder, cache):
    """Lay `folder` out as the snapshot of a repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--someone--some-model"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_checkpoints_are_read_without_the_package(tmp_path):
    """One test for all cases: they share the time it takes to import transformers."""
    tokens = torch.randint(FIRST_TOKEN, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens.pt")
    for name in TYPES:
        model = alibi_model(name)
        model.save_pretrained(tmp_path / name, export_remote_code=True)
        with torch.no_grad():
            torch.save(model(input_ids=tokens).logits, tmp_path / f"{name}.pt")
    hf_alibi.apply_alibi(stock_tiny("llama")).save_pretrained(tmp_path / "plain")
    as_in_the_hubs_cache(tmp_path / "gemma3", tmp_path / "hub")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PACKAGE": str(Path(hf_alibi.__file__).parents[1]),
    }
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE],
        input=json.dumps({name: textwrap.dedent(code) for name, code in CASES.items()}),
        cwd=tmp_path,
        env=environment,
        text=True,
        check=True,
        capture_output=True,
    )
    outcomes = {case: (tmp_path / f"{case}.outcome").read_text() for case in CASES}
    failed = {case: outcome for case, outcome in outcomes.items() if outcome != "ok"}
    assert not failed, "\n".join(f"{case}: {outcome}" for case, outcome in failed.items())


@pytest.fixture
def exported(tmp_path):
    """A causal model, and the folder in which it is with its code."""
    model = hf_alibi.apply_alibi(stock_model("llama"))
    model.save_pretrained(tmp_path / "exported", export_remote_code=True)
    return model, tmp_path / "exported"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_the_auto_map_names_the_class_and_the_base_model(exported):
    found = config_of(exported[1])["auto_map"]
    assert found["AutoConfig"] == f"{ENTRY}.AlibiLlamaConfig"
    assert found["AutoModel"] == f"{ENTRY}.AlibiLlamaModel"
    assert found["AutoModelForCausalLM"] == f"{ENTRY}.AlibiLlamaForCausalLM"
    assert "AutoModelForSequenceClassification" not in found
    assert all(issubclass(getattr(transformers, name), object) for name in found)


def test_every_file_is_python_that_imports_only_the_others_and_installed_packages(exported):
    files = {path.stem: path for path in exported[1].glob("*.py")}
    allowed = {"torch", "transformers", "huggingface_hub", "packaging"} | sys.stdlib_module_names
    licence = f"of hf-alibi {hf_alibi.__version__}. Licence: Apache-2.0."
    for name, path in files.items():
        text = path.read_text()
        compile(text, str(path), "exec")
        assert text.splitlines()[0].endswith(licence)
        assert set(get_imports(path)) <= allowed, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                wanted = [node.module] if node.module else [alias.name for alias in node.names]
                assert node.level == 1
                assert set(wanted) <= set(files), (name, wanted)
                assert node.module or set(wanted) <= set(get_relative_imports(path)), (name, wanted)
    # transformers copies these, and nothing else.
    followed = {Path(path).stem for path in get_relative_import_files(files[ENTRY])}
    assert followed | {ENTRY} == set(files)
    assert not {name for name in files if "training" in name or "data" in name}


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_package_wins_where_it_is_imported(trust, exported, monkeypatch):
    def prompt(*args):
        raise AssertionError("asked for trust")

    monkeypatch.setattr("builtins.input", prompt)
    model, folder = exported
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is hf_alibi.AlibiLlamaConfig
    assert type(AutoModel.from_config(loaded.config, trust_remote_code=trust)) is hf_alibi.AlibiLlamaModel
    assert not [name for name in sys.modules if name.endswith(ENTRY)]


def test_without_the_flag_no_code_is_written_or_named(exported, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(exported[1])
    assert loaded.config.auto_map
    # The first time the config still knows the code it was read with; the second time nothing.
    for model in (loaded, exported[0]):
        model.save_pretrained(tmp_path / "plain")
        assert "auto_map" not in config_of(tmp_path / "plain")
        assert not list((tmp_path / "plain").glob("*.py"))
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")) is type(model)
    assert loaded.config.auto_map
    assert not exported[0].config.auto_map


def test_saving_again_in_place_without_the_flag_names_no_code(exported):
    exported[0].save_pretrained(exported[1])
    assert "auto_map" not in config_of(exported[1])


def test_saving_with_the_flag_again_writes_the_same(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported[1]).save_pretrained(tmp_path / "again", export_remote_code=True)
    for path in exported[1].iterdir():
        if path.suffix in (".py", ".json"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_shards_and_other_arguments_go_on_working(exported, tmp_path):
    model = exported[0]
    model.save_pretrained(str(tmp_path / "shards"), True, model.state_dict(), False, "20KB", export_remote_code=True)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert (tmp_path / "shards" / f"{ENTRY}.py").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_process_that_is_not_the_main_one_writes_no_code(exported, tmp_path):
    exported[0].save_pretrained(tmp_path / "side", is_main_process=False, export_remote_code=True)
    assert not list((tmp_path / "side").glob("*.py"))


def test_the_config_is_as_before_where_saving_fails(exported, tmp_path):
    config = exported[0].config
    config.auto_map = {"AutoConfig": "elsewhere.Config"}
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        exported[0].save_pretrained(tmp_path / "file", export_remote_code=True)
    assert config.auto_map == {"AutoConfig": "elsewhere.Config"}


@pytest.mark.parametrize("there_before", [False, True])
def test_pushing_uploads_the_code(there_before, exported, tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(
        transformers.modeling_utils, "create_and_tag_model_card", lambda *args, **options: ModelCard("")
    )
    monkeypatch.setattr(HfApi, "create_commit", lambda self, operations, **options: uploaded.extend(operations))
    model, folder = exported
    if not there_before:
        folder = tmp_path / "new"
    model.save_pretrained(folder, push_to_hub=True, repo_id="someone/some-model", export_remote_code=True)
    assert {each.path_in_repo for each in uploaded} == {path.name for path in folder.iterdir()} >= {f"{ENTRY}.py"}
    assert "_get_files_timestamps" not in vars(model)


def test_imports_of_every_form_are_turned_to_flat_names(tmp_path, monkeypatch):
    package = tmp_path / "package"
    files = {
        "__init__.py": "everything = 1\n",
        "model/remote_code.py": (
            '"""from .none import nothing"""\n'
            "from typing import TYPE_CHECKING\n\n"
            "from .. import deep, plain as other\n"
            "from ..deep import (\n    # a comment\n    one,\n    two as zwei,\n)\n\n"
            "if TYPE_CHECKING:\n    from ..hints import Hint\n\n"
            'SIGN = "é"; from ..plain import *\n\n\n'
            "def late():\n    from ..deep import inner, one\n\n    return inner, one\n"
        ),
        "plain.py": "x = 1\n",
        "hints.py": "class Hint: ...\n",
        "unused.py": "",
        "deep/__init__.py": "one, two = 1, 2\n",
        "deep/inner.py": "from .. import plain\nfrom ..plain import x\n",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(code_export, "_HERE", package / "model/code_export.py")
    made = code_export.code_files()
    names = ("model_remote_code", "plain", "hints", "deep", "deep_inner")
    assert set(made) == {f"hf_alibi_{name}.py" for name in names}
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, text in made.items():
        (flat / name).write_text(text, encoding="utf-8")
    assert {Path(name).name for name in get_relative_import_files(flat / f"{ENTRY}.py")} == set(made) - {f"{ENTRY}.py"}
    check = (
        f"import {ENTRY} as entry\n"
        "assert (entry.one, entry.zwei, entry.x, entry.other.x, entry.deep.two) == (1, 2, 1, 1, 2)\n"
        "inner, one = entry.late()\n"
        "assert (inner.plain.x, inner.x, one) == (1, 1, 1)\n"
    ).replace(f"import {ENTRY} as entry", f"import flat.{ENTRY} as entry")
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)


def test_importing_from_the_package_as_a_whole_is_refused(tmp_path, monkeypatch):
    entry = tmp_path / "model/remote_code.py"
    entry.parent.mkdir()
    (tmp_path / "__init__.py").write_text("everything = 1\n")
    entry.write_text("from .. import everything\n")
    monkeypatch.setattr(code_export, "_HERE", entry.with_name("code_export.py"))
    with pytest.raises(ValueError, match="cannot import from"):
        code_export.code_files()
    entry.write_text("from .missing import everything\n")
    with pytest.raises(ValueError, match="line 1: no module"):
        code_export.code_files()
