"""Fine-tuning with transformers' Trainer: ALiBi, the unconverted control, and no positions at all."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..configuration import num_heads, text_config
from ..conversion.recipe import ConversionArguments, convert_model
from ..errors import InputError, one_line
from ..model.anatomy import has_no_positions, is_alibi, position_limit
from ..model.loading import load_complete
from ..model.patching import apply_alibi
from ..model.verification import verify_alibi
from ..reporting.results import METRICS_FILE, check_output_dir, environment, replacing
from ..training.checkpoints import STATE_FILE, is_complete, last_complete_checkpoint
from ..training.data import (
    DataArguments,
    TokenBlocks,
    TokenSplit,
    count_bytes,
    load_tokenizer,
    load_tokens,
    pack_blocks,
)
from ..training.model_card import CARD_FILE, model_card
from ..training.trainer import RateScales, check_weights, make_trainer
from .settings import load_settings, resolve_settings, save_settings

__all__ = ["FinetuneArguments", "finetune", "load_model", "train"]

_CONFIG_FILE = "config.yaml"
_MAX_NATS = 709.0  # exp of more overflows a float


@dataclass
class FinetuneArguments:
    """Which model is trained, with which positions, on blocks of which length."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from: a folder or a hub name."}
    )
    model_config: dict | str | None = field(  # type: ignore[type-arg]  # HfArgumentParser takes the bare type
        default=None,
        metadata={"help": "Instead: a fresh model, e.g. {model_type: gpt2, n_layer: 4, n_head: 4, n_embd: 256}."},
    )
    attention: Literal["alibi", "original", "nope"] = field(
        default="alibi",
        metadata={"help": "alibi converts the model, original leaves it alone, nope removes all positions."},
    )
    block_size: int = field(default=512, metadata={"help": "Training length in tokens."})
    budget_tokens: int | None = field(
        default=None, metadata={"help": "Training tokens in all, instead of max_steps or num_train_epochs."}
    )
    mlp_rate_scale: float = field(
        default=1.0,
        metadata={
            "help": "Share of learning_rate for all but self-attention and embeddings: MLPs, norms. 0 freezes them."
        },
    )
    embedding_rate_scale: float = field(
        default=1.0, metadata={"help": "Share of learning_rate for input and output embeddings. 0 freezes them."}
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of the same vocabulary whose predictions are learned, not the text's tokens. For a "
            "conversion: the model that is converted, once it was fine-tuned on the text."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention backend, such as eager or sdpa. Default: the library's choice."},
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Type of the weights. Keep float32 and set bf16 or fp16 for mixed precision."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.model_config, str):
            self.model_config = _parse_mapping(self.model_config)
        if (self.model_name_or_path is None) == (self.model_config is None):
            given = "neither" if self.model_config is None else "both"
            raise InputError(f"{given} of model_name_or_path and model_config given; give exactly one of them")
        if self.block_size < 2:
            raise InputError(f"block_size is {self.block_size}; it must be at least 2, one token to predict the next")
        if self.budget_tokens is not None and self.budget_tokens < self.block_size:
            raise InputError(f"budget_tokens is {self.budget_tokens}, less than one block of {self.block_size} tokens")
        for name in ("mlp_rate_scale", "embedding_rate_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0, which freezes these weights")


def finetune(argv: Sequence[str]) -> dict[str, Any]:
    """Run `train` with the settings of `CONFIG.yaml --field value ...`."""
    return train(*load_settings((FinetuneArguments, ConversionArguments, DataArguments, TrainingArguments), argv))


def train(
    args: FinetuneArguments, recipe: ConversionArguments, data: DataArguments, training: TrainingArguments
) -> dict[str, Any]:
    """Convert and train a model; write checkpoint, tokenizer, settings, metrics and model card to `output_dir`.

    Everything that can be wrong with the input is looked at before the first step, and nothing is written
    until then. With `resume_from_checkpoint` "true" the run goes on from its last complete checkpoint.

    Returns what `metrics.json` holds; its "seconds" are those of this call. Raises InputError where something
    given cannot be used, or the loss is no longer finite.
    """
    started = time.monotonic()
    if data.passkey_block_size not in (None, args.block_size):
        raise InputError(
            f"passkey_block_size is {data.passkey_block_size} and block_size {args.block_size}, so blocks would cut "
            "prompts; give both the same length"
        )
    console = Console(quiet=training.process_index != 0, markup=False, highlight=False, soft_wrap=True)
    output_dir = Path(training.output_dir)
    if training.process_index == 0:
        _check_output_dir(output_dir, resume=_wants_resume(training))
    checkpoint = _resume_checkpoint(training, console)
    tokenizer = load_tokenizer(_tokenizer_name(args, data))
    with training.main_process_first(desc="loading data"):
        tokens = load_tokens(data, tokenizer)
    train_blocks, eval_blocks = _pack(tokens, args.block_size, needs_eval=training.eval_strategy != "no")
    max_steps = _max_steps(args, training)
    set_seed(training.seed)
    model = load_model(args, recipe, tokenizer, checkpoint=checkpoint)
    _check_vocabulary(model, tokens)
    teacher = _load_teacher(args, model)
    continued = _was_converted(args)
    conversion = _convert(model, args, recipe, train_blocks, training)
    _check_length(model, args)

    if training.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        with replacing(output_dir / _CONFIG_FILE) as path:
            save_settings(path, (args, recipe, data, training))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = f"{len(train_blocks):,} blocks of {args.block_size} tokens, {len(eval_blocks or ()):,} held out"
    console.print(f"{type(model).__name__}, {parameters:,} parameters, attention {args.attention}; {blocks}")
    config = resolve_settings((args, recipe, data, training))
    if max_steps is not None:
        training.max_steps = max_steps
    rate_scales = RateScales(mlp=args.mlp_rate_scale, embeddings=args.embedding_rate_scale)
    trainer = make_trainer(model, tokenizer, training, train_blocks, eval_blocks, rate_scales, teacher)
    _run(trainer, checkpoint)
    eval_loss = _final_eval_loss(trainer) if eval_blocks is not None else None
    check_weights(model)
    model.config.use_cache = True  # Trainer turned it off for training; generate needs it
    trainer.save_model()
    metrics = _metrics(trainer.state, eval_loss)
    metrics["bits_per_byte"] = None
    if eval_blocks is not None and eval_loss is not None:
        covered = tokens.held_out[: len(eval_blocks) * args.block_size]
        metrics["bits_per_byte"] = eval_loss / math.log(2) * covered.numel() / count_bytes(covered, tokenizer)
    metrics["seconds"] = round(time.monotonic() - started, 1)
    metrics |= {"parameters": parameters, "conversion": conversion, "continued": continued, "config": config}
    metrics |= {"environment": environment(seed=training.seed)}
    if trainer.is_world_process_zero():
        # Trainer's pickle of its arguments names this machine's folders; config.yaml says the same without.
        (output_dir / "training_args.bin").unlink(missing_ok=True)
        with replacing(output_dir / METRICS_FILE) as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        with replacing(output_dir / CARD_FILE) as path:
            path.write_text(model_card(metrics), encoding="utf-8")
    return metrics


def load_model(
    args: FinetuneArguments,
    recipe: ConversionArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    checkpoint: Path | None = None,
) -> PreTrainedModel:
    """Load or build the model of a run, as it is before `args.attention` is given to it.

    A fresh model takes vocabulary size and special tokens from `tokenizer`; `checkpoint` is one of this run, to be
    taken instead of the model it started from. Raises InputError where the model cannot be loaded or built, or
    contradicts `args.attention` or the recipe.
    """
    if checkpoint is not None or args.model_name_or_path is not None:
        model = _load_pretrained(str(checkpoint or args.model_name_or_path), args)
    else:
        model = _build_fresh(args, tokenizer)
    if is_alibi(model.config):
        attention = "nope" if has_no_positions(model.config) else "alibi"
        source = checkpoint or args.model_name_or_path or "model_config"
        if args.attention != attention:
            raise InputError(
                f"attention is {args.attention}, but {source} is already converted; "
                f"set attention: {attention}, or give the model as it was before"
            )
        if checkpoint is None and recipe.steps():
            raise InputError(
                f"{', '.join(recipe.steps())} given, but {source} is already converted; "
                "leave them out, or give the model as it was before"
            )
    return model


def _convert(
    model: PreTrainedModel,
    args: FinetuneArguments,
    recipe: ConversionArguments,
    blocks: TokenBlocks,
    training: TrainingArguments,
) -> dict[str, Any]:
    """Give a loaded model the attention asked for, verified; what was done to it, for the metrics.

    `args.block_size` becomes the training length in the config of an ALiBi model.
    """
    done: dict[str, Any] = {}
    if args.attention == "original":
        return done
    try:
        if not is_alibi(model.config) and args.attention == "nope":
            apply_alibi(model, slopes=[0.0] * num_heads(text_config(model.config)))
        elif not is_alibi(model.config):
            model.to(training.device)
            done = convert_model(
                model,
                blocks.input_ids,
                recipe,
                bf16=training.bf16,
                seed=training.seed,
                progress=not training.disable_tqdm and training.process_index == 0,
            )
    except ValueError as error:
        raise InputError(f"cannot convert the model to ALiBi: {one_line(error)}") from error
    model.config.alibi_train_length = args.block_size
    verify_alibi(model)
    return done


def _was_converted(args: FinetuneArguments) -> bool:
    """Whether the run began with a model that was converted before."""
    return args.model_name_or_path is not None and is_alibi(AutoConfig.from_pretrained(args.model_name_or_path))


def _wants_resume(training: TrainingArguments) -> bool:
    return (training.resume_from_checkpoint or "false").lower() != "false"


def _resume_checkpoint(training: TrainingArguments, console: Console) -> Path | None:
    if not _wants_resume(training):
        return None
    if training.resume_from_checkpoint.lower() != "true":
        checkpoint = Path(training.resume_from_checkpoint)
        if not is_complete(checkpoint):
            raise InputError(
                f"{checkpoint} is no complete checkpoint; give another one, or true for the last complete one"
            )
        return checkpoint
    last = last_complete_checkpoint(Path(training.output_dir))
    if last is None:
        console.print(f"no complete checkpoint in {training.output_dir}: starting from the beginning")
    else:
        console.print(f"resuming from {last}")
    return last


def _check_output_dir(output_dir: Path, *, resume: bool) -> None:
    """Refuse a folder that cannot be written or that holds something else; creates nothing."""
    is_run = (output_dir / _CONFIG_FILE).is_file() or any(output_dir.glob("checkpoint-*"))
    if not is_run:
        check_output_dir(output_dir)
    elif not resume:
        raise InputError(
            f"output_dir {output_dir} holds an earlier run; choose another folder, or go on with that run by "
            "`--resume_from_checkpoint true`"
        )


def _tokenizer_name(args: FinetuneArguments, data: DataArguments) -> str:
    name = data.tokenizer_name or args.model_name_or_path
    if name is None:
        raise InputError("a fresh model has no tokenizer of its own; set tokenizer_name (bytes needs no download)")
    return name


def _pack(tokens: TokenSplit, block_size: int, *, needs_eval: bool) -> tuple[TokenBlocks, TokenBlocks | None]:
    train_blocks = pack_blocks(tokens.train, block_size, name="the training text")
    if not tokens.held_out.numel() and not needs_eval:
        return train_blocks, None
    return train_blocks, pack_blocks(tokens.held_out, block_size, name="the held-out text")


def _load_pretrained(source: str, args: FinetuneArguments) -> PreTrainedModel:
    return load_complete(
        source, dtype=args.dtype, attn_implementation=args.attn_implementation, name=f"the model {source!r}"
    )


def _load_teacher(args: FinetuneArguments, model: PreTrainedModel) -> PreTrainedModel | None:
    """Load the model whose predictions `model` learns; raises InputError where it has other tokens or is too short."""
    source = args.teacher_name_or_path
    if source is None:
        return None
    teacher = _load_pretrained(source, args)
    predicted, learned = (text_config(of.config).vocab_size for of in (teacher, model))
    if predicted != learned:
        raise InputError(
            f"the teacher {source!r} predicts {predicted} tokens and the model {learned}; give a teacher with the "
            "model's own vocabulary"
        )
    limit = position_limit(teacher)
    if limit is not None and args.block_size > limit:
        raise InputError(
            f"block_size {args.block_size} is beyond the {limit} learned positions of the teacher {source!r}; "
            f"set block_size to at most {limit}, or give another teacher"
        )
    return teacher


def _build_fresh(args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    given = dict(args.model_config) if isinstance(args.model_config, dict) else {}
    model_type = given.pop("model_type", None)
    # The config's own defaults are those of somebody else's vocabulary.
    from_tokenizer = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        _check_config_fields(AutoConfig.for_model(model_type), given)
        config = AutoConfig.for_model(model_type, **{**from_tokenizer, **given})
        dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attn_implementation)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"cannot build a model from model_config {args.model_config}: {one_line(error)}") from error


def _check_config_fields(defaults: PretrainedConfig, given: dict[str, Any]) -> None:
    """Refuse fields that a config class would keep without ever reading them."""
    unknown = [name for name in given if not hasattr(defaults, name)]
    if unknown:
        raise InputError(
            f"model_config has the unknown field {unknown[0]!r}; "
            f"{defaults.model_type} takes {', '.join(sorted(defaults.to_dict()))}"
        )


def _check_vocabulary(model: PreTrainedModel, tokens: TokenSplit) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(int(part.max()) for part in tokens if part.numel())
    if largest >= vocabulary:
        raise InputError(
            f"the tokenizer gives the token id {largest}, but the model embeds only {vocabulary} tokens; "
            "set tokenizer_name to the model's own tokenizer, or vocab_size in model_config"
        )


def _check_length(model: PreTrainedModel, args: FinetuneArguments) -> None:
    limit = position_limit(model)
    if limit is not None and args.block_size > limit:
        raise InputError(
            f"block_size {args.block_size} is beyond the model's {limit} learned positions; "
            f"set block_size to at most {limit}, or attention: alibi, which has no limit"
        )


def _max_steps(args: FinetuneArguments, training: TrainingArguments) -> int | None:
    """Optimizer steps that `budget_tokens` are enough for; None where no budget is given."""
    if args.budget_tokens is None:
        return None
    if training.max_steps > 0:
        raise InputError("both budget_tokens and max_steps given; give one of them")
    blocks = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps: int = args.budget_tokens // (blocks * args.block_size)
    if steps < 1:
        raise InputError(
            f"budget_tokens {args.budget_tokens:,} are less than one step of {blocks * args.block_size:,} tokens; "
            "set a larger budget, or per_device_train_batch_size and gradient_accumulation_steps smaller"
        )
    return steps


def _run(trainer: Trainer, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        *_, last_step = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
        if state.global_step >= last_step:
            # Nothing is left to train, and the model already holds these weights; Trainer would add a step.
            trainer.state = state
            return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()  # so that an error's message has a line of its own


def _final_eval_loss(trainer: Trainer) -> float:
    """Return the held-out loss of the trained model in the type of its weights.

    Where training is not mixed, Trainer may have measured it after the last step.
    """
    if trainer.args.bf16 or trainer.args.fp16:
        # What makes a model compute in half precision stays on it after training.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return float(trainer.evaluate()["eval_loss"])
    for entry in reversed(trainer.state.log_history):
        if entry["step"] == trainer.state.global_step and "eval_loss" in entry:
            return float(entry["eval_loss"])
    return float(trainer.evaluate()["eval_loss"])


def _metrics(state: TrainerState, eval_loss: float | None) -> dict[str, Any]:
    history = [
        {"step": entry["step"], key: entry[key]}
        for entry in state.log_history
        for key in ("loss", "eval_loss")
        if key in entry
    ]
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    # Each logged loss is the mean of the steps since the one before.
    steps = [step - before for (before, _), (step, _) in pairwise([(0, 0.0), *logged])]
    total = math.fsum(count * loss for count, (_, loss) in zip(steps, logged, strict=True))
    return {
        "train_loss": total / sum(steps) if logged else None,
        "last_train_loss": logged[-1][1] if logged else None,
        "eval_loss": eval_loss,
        "perplexity": math.exp(eval_loss) if eval_loss is not None and eval_loss < _MAX_NATS else None,
        "steps": state.global_step,
        "tokens_seen": state.num_input_tokens_seen,
        "history": history,
    }


def _parse_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"model_config {text!r} is not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"model_config must be a mapping with model_type, got {text!r}")
    return value
