"""What tests of commands share: settings in a file, checkpoints and their damages, refusals, runs of their own."""

import dataclasses
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_alibi.commands.fields import read_yaml
from hf_alibi.errors import InputError
from hf_alibi.training.data import load_tokenizer, load_tokens
from hf_alibi.training.settings import DataArguments
from hf_alibi.training.token_blocks import pack_blocks

ROOT = Path(__file__).parents[2]
BYTES = 259  # tokens of the byte tokenizer


def config_file(values, path="run.yaml"):
    """The arguments of a command: a YAML file of these values, without those that are None."""
    Path(path).write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return [str(path)]


@contextmanager
def refused(message):
    """Something in here must be refused, in one line that matches `message`."""
    with pytest.raises(InputError, match=message) as raised:
        yield
    assert "\n" not in str(raised.value)


def raising(error):
    """A function that raises this, whatever it is given."""

    def fail(*args, **kwargs):
        raise error

    return fail


def run_python(*words, cwd=None):
    """Run Python with these words in a process of its own, which finds the package and no cache."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": "home", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def save(model, folder, tokenizer=None):
    """Save a model with a tokenizer, that of bytes unless another one is given, and return the folder."""
    model.save_pretrained(folder)
    (tokenizer or load_tokenizer("bytes")).save_pretrained(folder)
    return str(folder)


def cut(path):
    """Leave the end of a file out."""
    Path(path).write_bytes(Path(path).read_bytes()[:-100])


def drop_weight(folder, ending):
    """Leave out of a checkpoint the first weight whose name ends so, and return its name."""
    path = Path(folder, "model.safetensors")
    weights = load_file(path)
    dropped = next(name for name in weights if name.endswith(ending))
    del weights[dropped]
    save_file(weights, path, metadata={"format": "pt"})
    return dropped


@torch.no_grad()
def held_out(folder, tokenizer="bytes"):
    """Mean nats per token of the model that a run saved, on the blocks that it held out, and these blocks."""
    saved = read_yaml(Path(folder, "config.yaml"))
    data = DataArguments(**{field.name: saved[field.name] for field in dataclasses.fields(DataArguments)})
    tokens = load_tokens(data, load_tokenizer(tokenizer)).held_out
    packed = pack_blocks([tokens], saved["block_size"]).input_ids
    blocks = torch.stack([packed[index] for index in range(len(packed))])
    logits = AutoModelForCausalLM.from_pretrained(folder)(blocks).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item(), blocks
