"""transformers' Trainer as this package runs it: it stops where a number is not finite, and prints one line a log."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from .data import TokenBlocks
from .errors import InputError

__all__ = ["check_weights", "make_trainer"]


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: TrainingArguments,
    train_blocks: TokenBlocks,
    eval_blocks: TokenBlocks | None,
) -> Trainer:
    """Trainer over blocks that stops at the first loss or weight that is not finite."""
    training.logging_nan_inf_filter = False  # it would hide what FiniteLossTrainer looks for
    training.include_num_input_tokens_seen = "all"
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # memory is pinned for a GPU; without one torch warns
    trainer = FiniteLossTrainer(
        model=model,
        args=training,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[_CheckpointGuard()],
    )
    if not training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress())
    return trainer


class FiniteLossTrainer(Trainer):
    """Trainer that stops at the first loss that is not finite, before the weights take the step."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise _non_finite(f"the training loss is {loss.item()} at step {self.state.global_step + 1}")
        return loss


class _CheckpointGuard(TrainerCallback):
    """Before each checkpoint: refuse weights that are not finite, and log.

    Each logged mean ends where a checkpoint is written, so a resumed run logs what an uninterrupted one does.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            check_weights(kwargs["model"])
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["metrics"]["eval_loss"]
        if not math.isfinite(loss):
            raise _non_finite(f"the held-out loss is {loss} after step {state.global_step}")


class _Progress(ProgressCallback):
    """Trainer's progress bar, with one short line where Trainer prints a dictionary."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        names = {"loss": "loss", "eval_loss": "held-out loss", "learning_rate": "learning rate"}
        shown = [f"{text} {logs[key]:.4g}" for key, text in names.items() if logs and key in logs]
        if self.training_bar is not None and shown:
            self.training_bar.write(f"step {state.global_step}: {', '.join(shown)}")


def check_weights(model: torch.nn.Module) -> None:
    """Raise InputError where a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise _non_finite(f"the weight {name} is not finite")


def _non_finite(found: str) -> InputError:
    return InputError(
        f"{found}: training stopped and no final model is saved; lower learning_rate, add warmup_steps, "
        "set max_grad_norm, or train in float32 instead of fp16, then start again in another output_dir"
    )
