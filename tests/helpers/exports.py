"""Converted checkpoints to export, with a byte-level BPE tokenizer, as GPT-2's, SmolLM's, Llama 3's or Qwen2's."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_alibi
from helpers.models import stock_config

TEXT = "The 1st of 12 heads reads what is near; the 12th doesn't, it reads 345 tokens back.\n\n  Über naïve “quotes”… "
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _split(pattern):
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": _split(LLAMA3),
    "qwen2": _split(LLAMA3.replace("{1,3}", "")),
}
"""By llama.cpp's names."""


def pieces(scheme="first"):
    """A tokenizer as SentencePiece's, with bytes for what it has no token for."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=598, special_tokens=special, show_progress=False)
    made.train_from_iterator([TEXT * 2, Path(__file__).read_text(encoding="utf-8")], trainer)
    said = json.loads(made.to_str())
    said["added_tokens"] = said["added_tokens"][:3]  # bytes are plain tokens
    made = Tokenizer.from_str(json.dumps(said))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizer(cut="gpt-2"):
    """A tokenizer of some 300 tokens, three of them added."""
    if cut == "pieces":
        return pieces()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = CUTS[cut], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.add_tokens(["<think>"])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


_SIZES = {
    "vocab_size": 320,
    "hidden_size": 192,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_OF_FAMILIES = {
    "gpt2": {"n_embd": 192, "n_head": 6, "n_layer": 3, "n_positions": 64},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 192, "init_std": 0.1},
    "mistral": {"sliding_window": None},
    **{family: {"head_dim": 32} for family in ("qwen3", "gemma", "helium", "seed_oss")},
}


def wide_config(family, **changes):
    """A small config with heads 32 wide, which is the least that vLLM's attention on the CPU has."""
    sizes = {name: value for name, value in _SIZES.items() if family != "gpt2" or "num" not in name}
    for name in ("hidden_size", "intermediate_size", "max_position_embeddings") * (family == "gpt2"):
        del sizes[name]
    if family in ("gpt_neox", "opt"):
        del sizes["num_key_value_heads"]  # vLLM would read it, and these models do not
    return CONFIG_MAPPING[family](**{**sizes, **_OF_FAMILIES.get(family, {}), **changes})


def converted(folder, family="llama", *, config=None, cut="gpt-2", conversion=None, **changes):
    """Save a small converted model whose every weight is random, with a tokenizer, and return the model."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 600 if cut == "pieces" else 320, "initializer_range": 0.1, "max_position_embeddings": 64}
    if family == "gpt2":
        sizes["n_positions"] = sizes.pop("max_position_embeddings")
    model = AutoModelForCausalLM.from_config(config or stock_config(family, 6, **{**sizes, **changes})).eval()
    for name, values in model.named_parameters():
        if values.ndim == 1:
            torch.nn.init.normal_(values, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    hf_alibi.apply_alibi(model, **(conversion or {}))
    model.save_pretrained(folder)
    if cut is not None:
        tokenizer(cut).save_pretrained(folder)
    return model
