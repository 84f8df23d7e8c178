"""Fine-tuning with transformers' Trainer: ALiBi, the unconverted control, and no positions at all."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from rich.console import Console
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..configuration import num_heads, text_config
from ..conversion.recipe import convert_model
from ..conversion.settings import ConversionArguments
from ..errors import InputError, one_line
from ..model.anatomy import is_alibi
from ..model.patching import apply_alibi
from ..model.verification import verify_alibi
from ..reporting.plots import loss_curve
from ..reporting.results import check_output_dir, environment
from ..training.checkpoints import STATE_FILE, is_complete, last_complete_checkpoint
from ..training.data import TokenSplit, count_bytes, load_tokens, probe_blocks, run_tokenizer
from ..training.model_card import CARD_FILE, model_card
from ..training.settings import DataArguments, FinetuneArguments
from ..training.starting_model import check_length, check_sources, check_vocabulary, load_model, load_teacher
from ..training.token_blocks import TokenBlocks, interleave, pack_blocks
from ..training.trainer import RateScales, check_reporters, check_weights, make_trainer
from ..utils import METRICS_FILE, replacing
from .settings import load_settings, resolve_settings, save_settings

__all__ = ["command", "conclude", "finetune", "train"]

_CONFIG_FILE = "config.yaml"
_MAX_NATS = 709.0  # exp of more overflows a float


def command(argv: Sequence[str]) -> None:
    """`finetune`, with the loss curve drawn and how it ended printed."""
    conclude(finetune(argv))


def conclude(metrics: Mapping[str, Any]) -> None:
    """Draw the loss curve of a run and print how it ended; the main process does."""
    if not PartialState().is_main_process:
        return
    console = Console(markup=False, highlight=False, soft_wrap=True)
    output_dir = Path(metrics["config"]["output_dir"])
    try:
        loss_curve(metrics, output_dir / "loss.png")
    except InputError as error:  # no matplotlib: the run itself is complete
        console.print(f"no loss.png: {error}")
    if metrics["eval_loss"] is not None:
        console.print(f"held-out loss {metrics['eval_loss']:.4f} nats per token after {metrics['steps']} steps")
    console.print(f"saved to {output_dir}")


def finetune(argv: Sequence[str]) -> dict[str, Any]:
    """Run `train` with the settings of `CONFIG.yaml --field value ...`."""
    return train(*load_settings((FinetuneArguments, ConversionArguments, DataArguments, TrainingArguments), argv))


def train(
    args: FinetuneArguments, recipe: ConversionArguments, data: DataArguments, training: TrainingArguments
) -> dict[str, Any]:
    """Convert and train a model; write checkpoint, tokenizer, settings, metrics and model card to `output_dir`.

    Everything that can be wrong with the input is checked before the first step, and nothing is written until then.
    With `resume_from_checkpoint` "true" the run resumes from its last complete checkpoint.

    Returns what `metrics.json` holds; its "seconds" are those of this call. Raises InputError if something given cannot
    be used, or the loss is no longer finite.
    """
    started = time.monotonic()
    console = Console(quiet=training.process_index != 0, markup=False, highlight=False, soft_wrap=True)
    output_dir = Path(training.output_dir)
    if training.process_index == 0:
        _check_output_dir(output_dir, resume=_wants_resume(training))
    check_reporters(training)
    check_sources(args)
    checkpoint = _resume_checkpoint(training, console)
    tokenizer, tokens, train_blocks, eval_blocks = _load_blocks(args, data, training)
    max_steps = _max_steps(args, training)
    set_seed(training.seed)
    model = load_model(args, recipe, tokenizer, checkpoint=checkpoint)
    check_vocabulary(model, tokens)
    teacher = load_teacher(args, model)
    continued = _was_converted(args)
    conversion = _convert(model, args, recipe, train_blocks, training, console)
    check_length(model, args)

    config = resolve_settings((args, recipe, data, training))
    if training.process_index == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        with replacing(output_dir / _CONFIG_FILE) as path:
            save_settings(path, (args, recipe, data, training))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = f"{len(train_blocks):,} blocks of {args.block_size} tokens, {len(eval_blocks or ()):,} held out"
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else args.dtype
    console.print(
        f"{type(model).__name__}, {parameters:,} parameters, attention {args.attention}, {precision}; {blocks}"
    )
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
        covered = tokens.held_out[: len(eval_blocks) * args.block_size].read()
        metrics["bits_per_byte"] = eval_loss / math.log(2) * covered.numel() / count_bytes(covered, tokenizer)
    metrics["seconds"] = round(time.monotonic() - started, 1)
    metrics |= {"parameters": parameters, "conversion": conversion, "continued": continued, "config": config}
    metrics |= {"environment": environment(seed=training.seed)}
    if trainer.is_world_process_zero():
        _write(metrics, output_dir)
    return metrics


def _load_blocks(
    args: FinetuneArguments, data: DataArguments, training: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, TokenSplit, TokenBlocks, TokenBlocks | None]:
    """Tokenizer, tokens, and the blocks that are trained on and held out, None if no text is."""
    if data.probe_block_size not in (None, args.block_size):
        raise InputError(
            f"probe_block_size is {data.probe_block_size} and block_size {args.block_size}, so blocks would cut "
            "prompts; give both the same length"
        )
    tokenizer = run_tokenizer(data, args.model_name_or_path)
    with training.main_process_first(desc="loading data"):
        tokens = load_tokens(data, tokenizer)
    train_blocks = pack_blocks(tokens.train, args.block_size, weights=data.train_weights, name="the training text")
    if data.probe_share:
        count = round(len(train_blocks) * data.probe_share / (1 - data.probe_share))
        hidden = probe_blocks(data, tokenizer, args.block_size, max(count, 1), around=train_blocks.input_ids)
        train_blocks = TokenBlocks(interleave([train_blocks.input_ids, hidden]))
    if not len(tokens.held_out) and training.eval_strategy == "no":
        return tokenizer, tokens, train_blocks, None
    return tokenizer, tokens, train_blocks, pack_blocks([tokens.held_out], args.block_size, name="the held-out text")


def _write(metrics: dict[str, Any], output_dir: Path) -> None:
    """Write metrics and model card beside the model."""
    # Trainer's pickle of its arguments names this machine's folders; config.yaml says the same without.
    (output_dir / "training_args.bin").unlink(missing_ok=True)
    with replacing(output_dir / METRICS_FILE) as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    with replacing(output_dir / CARD_FILE) as path:
        path.write_text(model_card(metrics), encoding="utf-8")


def _convert(
    model: PreTrainedModel,
    args: FinetuneArguments,
    recipe: ConversionArguments,
    blocks: TokenBlocks,
    training: TrainingArguments,
    console: Console,
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
    for reason in done.get("choices", {}).get("reasons", ()):
        console.print(reason)
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
                f"{checkpoint} is not a complete checkpoint; give another one, or true for the last complete one"
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
            f"output_dir {output_dir} holds an earlier run; choose another folder, or resume that run with "
            "`--resume_from_checkpoint true`"
        )


def _max_steps(args: FinetuneArguments, training: TrainingArguments) -> int | None:
    """Optimizer steps that `budget_tokens` are enough for; None if no budget is given."""
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
