"""Compare models and baselines at lengths beyond training: perplexity, loss by position, passkeys.

    python scripts/extrapolate.py configs/extrapolate/gpt2.yaml
    python scripts/extrapolate.py configs/extrapolate/gpt2.yaml --lengths 512 16384 --output_dir runs/long
    python scripts/extrapolate.py configs/extrapolate/gpt2.yaml --baselines rope_yarn sliding_window --probe_cases 20
    python scripts/extrapolate.py configs/extrapolate/gpt2.yaml --models '{"alibi": "runs/gpt2-alibi"}'
    python scripts/extrapolate.py --help

The YAML comes first, any `--field value` after it wins. Installed, the same is `hf-alibi extrapolate ...`.
"""

import sys

from hf_alibi.cli import main

if __name__ == "__main__":
    sys.exit(main(["extrapolate", *sys.argv[1:]]))
