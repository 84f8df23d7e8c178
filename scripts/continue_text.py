"""Let models continue the same text, side by side: what numbers alone do not show.

    python scripts/continue_text.py runs/demo/alibi runs/demo/alibi/control --tokens 1024
    python scripts/continue_text.py runs/smollm2-alibi runs/smollm2-alibi/control --file text.txt --tokens 12000

The prompt is the end of a text, by default of the Python documentation that ships with CPython, cut to `--tokens`. Each
model samples what follows, with the same seed, at temperature 0.5.
"""

import argparse

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_alibi.model.anatomy import is_alibi
from hf_alibi.training.data import load_tokenizer, load_tokens
from hf_alibi.training.settings import PYTHON_DOCS, DataArguments

SHOWN = 300  # characters of the prompt


def continuation(
    model: PreTrainedModel, prompt: torch.Tensor, tokenizer: PreTrainedTokenizerBase, new_tokens: int
) -> str:
    """What `model` writes after `prompt`, (tokens,)."""
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 0.5, "top_k": 0, "max_new_tokens": new_tokens}
    written = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
    return str(tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True))


def main() -> None:
    """Print the end of the prompt and how each model goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of trained models; the first one's tokenizer is used")
    parser.add_argument("--file", help="a text file; without it the Python documentation")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt")
    parser.add_argument("--new_tokens", type=int, default=160, help="how many tokens each model writes")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(args.models[0])
    text = {"dataset_name": PYTHON_DOCS} if args.file is None else {"train_file": [args.file]}
    tokens = load_tokens(DataArguments(**text, validation_fraction=0.0), tokenizer).train[0]
    prompt = tokens[-args.tokens - args.new_tokens : -args.new_tokens].read()
    print(f"A prompt of {len(prompt)} tokens, which ends:\n\n… {tokenizer.decode(prompt)[-SHOWN:]}")
    for folder in args.models:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        kind = "ALiBi" if is_alibi(model.config) else "original"
        print(f"\n--- {kind} ({folder}) goes on:\n")
        print(continuation(model, prompt, tokenizer, args.new_tokens))


if __name__ == "__main__":
    main()
