"""The model families that ALiBi converts, and why others are refused: data.

How a family is converted is read off the model itself (`anatomy.py`), so a row is only the promise that it was tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill, indent
from typing import Any

__all__ = [
    "FamilyTable",
    "counts_other_layers",
    "is_listed",
    "refusal",
    "scales_by_position",
    "stock_type",
    "supported_families",
]

# By what `apply_alibi` takes out of the self-attention of the model type.
_POSITIONS = {
    "rotary positions": """
        afmoe apertus arcee aria_text axk1 bailing_hybrid bamba beam bitnet codegen cohere cohere2 cohere2_moe
        cohere_compass_text cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 emu3 ernie4_5 ernie4_5_moe exaone4
        exaone_moe falcon falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4
        gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite got_ocr2 gpt_neox
        gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text
        hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4
        llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral mixtral
        mllama modernbert-decoder moshi moss_transcribe_diarize nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe
        persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
        qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu zaya
    """,
    "a table of positions": """
        bart bert bert-generation biogpt blenderbot blenderbot-small camembert data2vec-text electra ernie gpt2
        gpt_bigcode gpt_neo marian mbart musicgen musicgen_melody opt pegasus plbart roberta roberta-prelayernorm
        roc_bert whisper xlm-roberta xlm-roberta-xl xmod
    """,
    "nothing: order comes from recurrent layers beside it": """
        granitemoehybrid jamba kimi_linear nemotron_h zamba zamba2
    """,
}

# Decoders inside the models above that have a model type of their own.
_DECODERS = "emu3_text_model mllama_text_model musicgen_decoder musicgen_melody_decoder"

_OWN_BIAS = "its attention has a bias by distance already"
_SPARSE = "sparse index attention: which keys a query sees is chosen by a score that no bias reaches"
_OWN_CODE = "its attention is code of its own, which takes no attention function"
_REFUSED = {
    model_type: reason
    for reason, model_types in {
        _OWN_BIAS: "bloom inkling2_text inkling_text mpt",
        _SPARSE: """
            axk2 deepseek_v32 deepseek_v4 doge dots3_note dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text qwen4_exp
            qwen4_exp_text
        """,
        "no attention: it is a recurrence": "falcon_mamba mamba mamba2 rwkv xlstm",
        "its recurrence starts anew by position ids, which order its text beside any bias": "recurrent_gemma",
        _OWN_CODE: """
            big_bird cpmant git megatron-bert mvp openai-gpt prophetnet reformer rembert roformer trocr xglm xlm xlnet
        """,
        "its layers do not tell self-attention from cross-attention": "bigbird_pegasus",
        "it makes its sinusoids in its own forward": "ctrl",
        "it reads bytes in patches, with positions in several models": "blt",
        "it drafts from the keys and values of another model": "gemma4_assistant gemma4_unified_assistant",
        "its vision tower needs a package that no test has run with": "gemma3n",
    }.items()
    for model_type in model_types.split()
}


def stock_type(config: Any) -> str:
    """The model type of an unconverted config, or the one that a converted config had."""
    return str(config.model_type).removeprefix("alibi_")


def refusal(config: Any) -> str | None:
    """Why a model of this config, or its ALiBi form, is not converted; None if nothing speaks against it."""
    model_type = stock_type(config)
    if model_type == "falcon" and config.alibi:
        return _OWN_BIAS
    return _REFUSED.get(model_type)


@dataclass(frozen=True, repr=False)
class FamilyTable:
    """Which model types `apply_alibi` converts, which it refuses, and why. Iterates over those that it converts."""

    supported: dict[str, str]
    """From model type to what ALiBi takes the place of."""
    refused: dict[str, str]
    """From model type to the reason."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.supported)

    def __len__(self) -> int:
        return len(self.supported)

    def __contains__(self, model_type: object) -> bool:
        return model_type in self.supported

    def __repr__(self) -> str:
        lines = [f"{len(self)} model types are converted; ALiBi takes the place of"]
        lines += _grouped(self.supported)
        lines += [f"{len(self.refused)} are refused:", *_grouped(self.refused)]
        lines += ["Any other is converted if verify_alibi accepts it."]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table of docs/families.md."""
        rows = [
            f"| {prefix}{what} | {_names(table, what, quote='`')} |"
            for prefix, table in (("", self.supported), ("refused: ", self.refused))
            for what in dict.fromkeys(table.values())
        ]
        return "\n".join(["| ALiBi takes the place of | model types |", "| --- | --- |", *rows])


def supported_families() -> FamilyTable:
    """The table of model types; print it to read it.

    >>> "qwen3" in supported_families()
    True
    >>> supported_families().refused["mamba"]
    'no attention: it is a recurrence'
    """
    kinds = [(name, what) for what, names in _POSITIONS.items() for name in names.split()]
    return FamilyTable(dict(sorted(kinds)), dict(sorted(_REFUSED.items())))


def is_listed(model_type: str) -> bool:
    """Whether a model type was tested, so that an instance need not be."""
    return any(model_type in names.split() for names in (*_POSITIONS.values(), _DECODERS))


def scales_by_position(config: Any) -> bool:
    """Whether the family scales queries by their position: a temperature for long contexts, which stays."""
    return stock_type(config) == "beam"


def counts_other_layers(config: Any) -> bool:
    """Whether the config of the family counts layers without attention, or each run of a layer, among its layers."""
    return stock_type(config) in ("bamba", "hrm_text", "jamba", "kimi_linear", "nemotron_h", "zamba", "zamba2")


def _names(rows: dict[str, str], what: str, quote: str = "") -> str:
    return ", ".join(f"{quote}{name}{quote}" for name, value in rows.items() if value == what)


def _grouped(rows: dict[str, str]) -> list[str]:
    lines = []
    for what in dict.fromkeys(rows.values()):
        lines += [f"  {what}:", indent(fill(_names(rows, what), width=106, break_on_hyphens=False), "    ")]
    return lines
