"""Time and memory of ALiBi, side by side with what a model used before.

    python scripts/benchmark.py configs/benchmark/all.yaml
    python scripts/benchmark.py configs/benchmark/all.yaml --parts attention --lengths 512 2048 --output_dir runs/short
    python scripts/benchmark.py configs/benchmark/all.yaml --model_name_or_path runs/smollm2 --parts activations
    python scripts/benchmark.py --help

The YAML comes first, any `--field value` after it wins. Installed, the same is `hf-alibi benchmark ...`.
"""

import sys

from hf_alibi.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
