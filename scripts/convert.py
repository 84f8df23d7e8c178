"""Convert a pretrained model to ALiBi by the whole recipe: match, convert, distil, fine-tune, save, compare.

    python scripts/convert.py configs/convert/smollm2.yaml --train_file text.txt --output_dir runs/smollm2-alibi
    python scripts/convert.py configs/convert/gpt2-small.yaml --output_dir runs/gpt2-small-alibi
    python scripts/convert.py --help

The YAML comes first, any `--field value` after it wins. With the package installed: `hf-alibi convert ...`; in
Python: `hf_alibi.convert("configs/convert/smollm2.yaml", train_file=["text.txt"])`.
"""

import sys

from hf_alibi.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
