"""The model card of a fine-tuned checkpoint, made from its metrics."""

from pathlib import Path
from typing import Any

import yaml

from .settings import PYTHON_DOCS

__all__ = ["CARD_FILE", "model_card"]

CARD_FILE = "README.md"

_ATTENTION = {
    "alibi": "Attention with Linear Biases (ALiBi): no position embeddings, no maximum length but memory",
    "original": "the architecture's own position embeddings, unchanged (a control for ALiBi)",
    "nope": "no position information at all (a control for ALiBi)",
}


def model_card(metrics: dict[str, Any], *, price: str | None = None) -> str:
    """Return the README.md of a checkpoint: the hub's front matter, what it is, and how to load it.

    `metrics` is what `training.train` returns, `price` the sentence of `converting.cost`.
    """
    config = metrics["config"]
    base, is_hub_name = _public_name(config["model_name_or_path"])
    name = Path(config["output_dir"]).name
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [config["attention"]],
    }
    if config["attention"] == "alibi":
        front["tags"] = ["alibi", "long-context"]
    if is_hub_name:
        front["base_model"] = base
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A causal language model with {metrics['parameters']:,} parameters, made with hf-alibi.",
        "",
        f"- Started from: {base or 'random weights'}",
        f"- Attention: {_ATTENTION[config['attention']]}",
        *_recipe(config, metrics["conversion"].get("choices", {})),
        f"- Training data: {_data_name(config)}",
        f"- Training length: {config['block_size']} tokens; "
        f"{metrics['steps']:,} steps, {metrics['tokens_seen']:,} tokens",
        f"- Training loss: mean of the run {_number(metrics['train_loss'])}, last logged "
        f"{_number(metrics['last_train_loss'])} nats per token{_what_training_adds(config)}",
        f"- Held-out loss: {_number(metrics['eval_loss'])} nats per token, "
        f"perplexity {_number(metrics['perplexity'])}, {_number(metrics['bits_per_byte'])} bits per byte "
        f"(non-overlapping blocks of {config['block_size']} tokens, whose tokens see 1 to {config['block_size'] - 1} "
        "before them)",
        *([] if price is None else [f"- Price of the conversion. {price}"]),
        "",
        "```python",
        *([] if config["attention"] == "original" else ["import hf_alibi  # registers the ALiBi classes"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
        "",
        "`config.yaml` holds every setting of the run, `metrics.json` every number.",
    ]
    return "\n".join(lines) + "\n"


def _what_training_adds(config: dict[str, Any]) -> str:
    """What the training loss is besides the loss of the text; the held-out loss has none of it."""
    parts = []
    if config["teacher_name_or_path"]:
        share = config["teacher_share"]
        mixed = "" if share == 1 else f", {share:g} of it, and the loss of the text"
        parts.append(f"the distance to what a teacher predicts{mixed}")
    elif config["label_smoothing_factor"]:
        parts.append(f"label smoothing of {config['label_smoothing_factor']:g} included")
    return f" ({parts[0]})" if parts else ""


def _recipe(config: dict[str, Any], choices: dict[str, Any]) -> list[str]:
    """What was done before training, beside putting ALiBi in; no line if nothing was."""
    parts = []
    choices = {**{name: config[name] for name in ("match_heads", "sink_tokens")}, **choices}
    if choices["match_heads"]:
        parts.append(f"heads matched to slopes on {config['match_tokens']:,} tokens")
    if choices["sink_tokens"]:
        parts.append(f"sink tokens without bias: {choices['sink_tokens']}")
    if config["global_heads"]:
        layers = "all layers" if config["global_every"] == 1 else f"one layer in {config['global_every']}"
        parts.append(f"global heads without bias: {config['global_heads']} in {layers}")
    if config["distill_tokens"]:
        passes = f"{config['distill_tokens']:,} tokens, {config['distill_epochs']} ×"
        parts.append(f"attention fitted to the unconverted layers on {passes}")
    return [f"- Conversion: {'; '.join(parts)}"] if parts and config["attention"] == "alibi" else []


def _public_name(source: str | None) -> tuple[str | None, bool]:
    """Return a model's name without any folder of the author's machine, and whether it is a hub name."""
    if source is None:
        return None, False
    is_hub_name = not Path(source).exists() and source.count("/") <= 1
    return (source if is_hub_name else Path(source).name), is_hub_name


def _data_name(config: dict[str, Any]) -> str:
    if config["train_file"] is not None:
        return ", ".join(Path(path).name for path in config["train_file"])
    if config["dataset_name"] == PYTHON_DOCS:
        return f"{PYTHON_DOCS}, the help topics that ship with CPython"
    return " ".join(part for part in (config["dataset_name"], config["dataset_config_name"]) if part)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
