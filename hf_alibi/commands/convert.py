"""A whole conversion in one call: match, convert, distil, fine-tune, save, and compare with what the model was."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from transformers import TrainingArguments

from ..conversion.settings import ConversionArguments
from ..errors import InputError
from ..evaluation.protocol import SLIDING
from ..evaluation.settings import ControlArguments, ExtrapolateArguments
from ..reporting.curves import Comparison
from ..reporting.findings import price
from ..reporting.plots import require_matplotlib
from ..training.data import load_tokens, run_tokenizer
from ..training.model_card import CARD_FILE, model_card
from ..training.settings import DataArguments, FinetuneArguments
from ..training.starting_model import check_sources
from ..utils import replacing
from .extrapolate import compare
from .fields import read_yaml
from .finetune import conclude, train
from .settings import load_settings, make_settings

__all__ = ["command", "convert", "cost", "run"]

_CONTROL = "control"
_EVALUATION = "evaluation"


_CLASSES = (ControlArguments, FinetuneArguments, ConversionArguments, DataArguments, TrainingArguments)


def convert(config: str | Path | Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Convert a pretrained model: match, convert, distil, fine-tune, save, and compare with what it was.

    Args:
        config: a YAML file such as configs/convert/smollm2.yaml, or its fields.
        fields: more of them, which win; `hf-alibi convert --help` lists all.

    The converted model is in `output_dir`, which transformers' Auto classes load; the comparison, with report and
    pictures, is in its folder "evaluation". Returns the metrics of the training ("training"), those of the control or
    None ("control"), and the results of the comparison ("evaluation"). Raises InputError, before work begins if that
    can be known, for what cannot be used.
    """
    values = dict(config) if isinstance(config, Mapping) else {} if config is None else read_yaml(config)
    return _convert(*make_settings(_CLASSES, {**values, **fields}))


def command(argv: Sequence[str]) -> None:
    """`run`, with loss curves drawn and what the conversion costs printed."""
    result = run(argv)
    for name in ("training", "control"):
        if result[name] is not None:
            conclude(result[name])
    if PartialState().is_main_process:
        Console(markup=False, highlight=False, soft_wrap=True).print(cost(result))


def run(argv: Sequence[str]) -> dict[str, Any]:
    """`convert` with the settings of `CONFIG.yaml --field value ...`."""
    return _convert(*load_settings(_CLASSES, argv))


def _convert(
    comparison: ControlArguments,
    args: FinetuneArguments,
    recipe: ConversionArguments,
    data: DataArguments,
    training: TrainingArguments,
) -> dict[str, Any]:
    source, output_dir = args.model_name_or_path, Path(training.output_dir)
    if source is None or args.attention != "alibi":
        raise InputError("convert takes a pretrained model: give model_name_or_path, and leave attention as alibi")
    evaluation = ExtrapolateArguments.of(
        comparison,
        models={"alibi": str(output_dir), "original": str(output_dir / _CONTROL) if comparison.control else source},
        train_length=args.block_size,
        output_dir=str(output_dir / _EVALUATION),
        probe_if_known=True,
    )
    require_matplotlib()
    check_sources(args)
    tokenizer = run_tokenizer(data, source)
    evaluation.protocol().check(len(load_tokens(data, tokenizer).held_out))
    # Training settles some of its arguments; the control starts from the same ones.
    of_control = copy.copy(training)
    of_control.output_dir = str(output_dir / _CONTROL)
    of_control.learning_rate = comparison.control_learning_rate or training.learning_rate
    result: dict[str, Any] = {"training": train(args, recipe, data, training), "control": None}
    if comparison.control:
        unconverted = dataclasses.replace(args, attention="original", mlp_rate_scale=1.0, embedding_rate_scale=1.0)
        result["control"] = train(unconverted, recipe, data, of_control)
    result["evaluation"] = compare(evaluation, data)
    if training.process_index == 0:
        with replacing(output_dir / CARD_FILE) as path:
            path.write_text(model_card(result["training"], price=cost(result)), encoding="utf-8")
    return result


def cost(result: Mapping[str, Any]) -> str:
    """What the conversion costs at the training length, in a sentence made from the results of `convert`.

    It is the number of the report's first table and names its protocol.
    """
    evaluation = Comparison(result["evaluation"])
    how = "as it was given" if result["control"] is None else "trained on the same tokens"
    scored = f"{evaluation['settings']['scored_tokens']:,} held-out tokens"
    where = f"{evaluation.protocol_title(SLIDING)}, {scored}, original {how}"
    sentence = price(evaluation, "alibi", "original", SLIDING) or "The original does not run at the training length."
    return f"{where}: {sentence.replace('**', '')}"
