"""Which parts of the recipe pay: the same training with one part changed a row, over several seeds.

    python scripts/ablation.py configs/ablation/smollm2.yaml --model_name_or_path runs/smollm2 --train_file text.txt
    python scripts/ablation.py --help

The YAML comes first, any `--field value` after it wins. Stopped, the same command goes on with what is left. With the
package installed: `hf-alibi ablation ...`.
"""

import sys

from hf_alibi.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablation", *sys.argv[1:]]))
