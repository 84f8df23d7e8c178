"""transformers' Trainer as this package runs it: it stops if a number is not finite, and prints one line a log."""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
from transformers.integrations import get_reporting_integration_callbacks
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..errors import InputError, one_line
from ..model.anatomy import is_alibi, text_decoder
from .starting_model import Teacher
from .token_blocks import TokenBlocks

__all__ = ["RateScales", "check_reporters", "check_weights", "divergence", "make_trainer", "next_token_loss"]


class RateScales(NamedTuple):
    """Learning rates as shares of that of self-attention; 0 freezes.

    A converted model has new attention and old everything else: what it knows is forgotten at a rate at which
    attention learns.
    """

    mlp: float = 1.0  # and norms: whatever is neither self-attention nor embedding
    embeddings: float = 1.0  # input and output


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: TrainingArguments,
    train_blocks: TokenBlocks,
    eval_blocks: TokenBlocks | None,
    rate_scales: RateScales,
    teacher: Teacher | None = None,
) -> Trainer:
    """Trainer over blocks that stops at the first loss or weight that is not finite.

    Weights whose rate scale is 0 are frozen. With a `teacher` (in evaluation mode) the model learns its predictions
    (`divergence`) instead of the text's next tokens, or both; held-out losses stay those of the text.
    """
    for parameter, scale in _scale_by_weight(model, rate_scales).items():
        if scale == 0:
            parameter.requires_grad_(False)
    if is_alibi(model.config):
        tokenizer.model_max_length = VERY_LARGE_INTEGER  # it is saved beside the model, and tools cut texts there
    training.logging_nan_inf_filter = False  # it would hide what AlibiTrainer looks for
    training.include_num_input_tokens_seen = "all"
    if training.world_size > 1:
        # Processes fill their last batches up with blocks that were there before; single ones are taken out again.
        training.per_device_eval_batch_size = 1
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # memory is pinned for a GPU; without one torch warns
    trainer = AlibiTrainer(
        rate_scales,
        teacher,
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


def check_reporters(training: TrainingArguments) -> None:
    """Raise InputError if a package that `report_to` needs is missing."""
    for callback in get_reporting_integration_callbacks(training.report_to):
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise InputError(f"{one_line(error)} Or leave it out of report_to") from error


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of the Kullback-Leibler divergence from what a teacher predicts, in nats.

    Both are logits (batch, tokens, vocabulary), `wanted` those of the teacher. Source: Hinton, Vinyals and Dean 2015,
    arXiv 1503.02531, at temperature 1 and without the text's own tokens.
    """
    predicted, target = (x.float().log_softmax(dim=-1).flatten(0, 1) for x in (logits, wanted))
    return nn.functional.kl_div(predicted, target, reduction="batchmean", log_target=True)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each label that is not -100, given the logits of the position before it.

    `logits` (batch, tokens, vocabulary), `labels` (batch, tokens), int64. It is the loss of the text alone: whatever
    training adds (label smoothing, the auxiliary losses of mixtures of experts, a teacher) is not in it.
    """
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class AlibiTrainer(Trainer):
    """Trainer with rate scales and a teacher. Held-out losses are `next_token_loss`, whatever training adds to its own.

    It stops at the first loss that is not finite, before the weights take the step.
    """

    def __init__(self, rate_scales: RateScales, teacher: Teacher | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rate_scales = rate_scales
        self._teacher = teacher
        if teacher is not None:
            teacher.model.to(self.args.device)
            self.loss_is_scaled_for_ga = False  # `divergence` is a mean over one batch

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        if self._teacher is None and model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[no-any-return]
        text = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**text)
        if not model.training:
            loss = next_token_loss(outputs.logits, inputs["labels"])
        else:
            teacher, share = self._teacher  # type: ignore[misc]
            with torch.no_grad(), self.accelerator.autocast():
                wanted = teacher(**text, use_cache=False).logits
            loss = share * divergence(outputs.logits, wanted)
            if share < 1:
                loss = loss + (1 - share) * next_token_loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        scales = _scale_by_weight(self.model, self._rate_scales)
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for group in groups:
            by_scale = defaultdict(list)
            for parameter in group["params"]:
                by_scale[scales[parameter]].append(parameter)
            # Trainer logs the rate of the first group: the one of self-attention.
            for scale, parameters in sorted(by_scale.items(), key=lambda item: item[0] != 1.0):
                optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * scale})
        return optimizer

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Weights that are tied to others are in no checkpoint.
        tied = self.model.all_tied_weights_keys
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise _non_finite(f"the training loss is {loss.item()} at step {self.state.global_step + 1}")
        return loss


def _scale_by_weight(model: PreTrainedModel, rate_scales: RateScales) -> dict[nn.Parameter, float]:
    """The rate scale of each weight."""
    scales = dict.fromkeys(model.parameters(), rate_scales.mlp)
    for _, layer in text_decoder(model).self_attentions:
        scales |= dict.fromkeys(layer.parameters(), 1.0)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embeddings is not None:
            scales |= dict.fromkeys(embeddings.parameters(), rate_scales.embeddings)
    return scales


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
    """Trainer's progress bar, with one short line instead of a dictionary."""

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


def check_weights(model: nn.Module) -> None:
    """Raise InputError if a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise _non_finite(f"the weight {name} is not finite")


def _non_finite(found: str) -> InputError:
    return InputError(
        f"{found}: training stopped and no final model is saved; lower learning_rate, add warmup_steps, "
        "set max_grad_norm, or train in float32 instead of fp16, then start again in another output_dir"
    )
