"""Convert a model to ALiBi and fine-tune it.

    python scripts/finetune.py configs/finetune/gpt2.yaml --output_dir runs/gpt2-alibi
    python scripts/finetune.py configs/finetune/gpt2.yaml --attention original --output_dir runs/gpt2-original
    python scripts/finetune.py configs/finetune/gpt2.yaml --output_dir runs/gpt2-alibi --resume_from_checkpoint true
    accelerate launch scripts/finetune.py configs/finetune/llama.yaml --output_dir runs/llama-alibi
    python scripts/finetune.py --help

The YAML comes first, any `--field value` after it wins. With the package installed: `hf-alibi finetune ...`.
"""

import sys

from hf_alibi.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
