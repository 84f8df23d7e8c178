"""Perplexity of one model at several lengths, on the same scored tokens at every length."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import InputError
from ..model.anatomy import text_decoder
from ..utils import evaluation_mode, input_device, progress_bar
from . import memory
from .memory import check_memory
from .protocol import CANNOT_RUN, CROPPED, FULL, NON_OVERLAPPING, OK, PROTOCOLS, Protocol, Window

__all__ = [
    "Extrapolation",
    "ExtrapolationRow",
    "PositionBin",
    "PositionLoss",
    "evaluate_extrapolation",
    "window_losses",
]


# exp overflows a float64 just above this.
_MAX_NATS = 709.0


@dataclass(frozen=True)
class ExtrapolationRow:
    """One number of the comparison: a model at one length under one protocol.

    `context` is "full" (all of the window) or "cropped" (never more than the training length). Each of the `tokens`
    scored tokens sees `fewest_seen` to `most_seen` tokens before it. `status` is "ok", or "cannot run" for the `reason`
    given; then there are no numbers. `bits_per_byte` is also None if the number of bytes is unknown.
    """

    model: str
    protocol: str
    length: int
    context: str
    fewest_seen: int
    most_seen: int
    nats_per_token: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int
    status: str
    reason: str | None = None


@dataclass(frozen=True)
class PositionBin:
    """Mean loss over positions `first` to `last` of a window, both included, counted from 1."""

    first: int
    last: int
    nats_per_token: float
    tokens: int


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss at each position of the non-overlapping windows of one length.

    `nats[p - 1]` is the mean over `windows` windows of the loss of the target that sees exactly p tokens.
    """

    length: int
    windows: int
    nats: list[float]

    def bins(self, per_octave: int = 2) -> list[PositionBin]:
        """Averages over log-spaced bins of positions, `per_octave` to each doubling."""
        edges = [1]
        while edges[-1] <= self.length:
            edges.append(max(edges[-1] + 1, round(edges[-1] * 2 ** (1 / per_octave))))
        edges[-1] = self.length + 1
        bins = []
        for first, end in pairwise(edges):
            nats = self.nats[first - 1 : end - 1]
            bins.append(PositionBin(first, end - 1, math.fsum(nats) / len(nats), len(nats) * self.windows))
        return bins


@dataclass(frozen=True)
class Extrapolation:
    """What `evaluate_extrapolation` returns; `position_loss` is None for a model that runs at no length.

    `losses` has, for each row with numbers, the nats of each scored token, float32 (scored tokens,): by the row's
    context, protocol and length.
    """

    rows: list[ExtrapolationRow]
    position_loss: PositionLoss | None
    losses: dict[tuple[str, str, int], Tensor] = field(repr=False, compare=False)


def evaluate_extrapolation(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    lengths: Sequence[int],
    train_length: int,
    scored_tokens: int,
    stride: int | None = None,
    bos_token_id: int | None = None,
    num_bytes: int | None = None,
    name: str = "model",
    cropped: bool = False,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Extrapolation:
    """Perplexity of a causal language model at each length under both protocols, and its loss by position.

    Runs on the model's device, in evaluation mode, without gradients; the mode is restored.

    Args:
        model: with a language modeling head. One with a table of N learned positions gets rows without numbers
            beyond N.
        tokens: int64 (num_tokens,), of which the last `scored_tokens` are scored.
        lengths, train_length, scored_tokens, stride: see `Protocol`, which describes the two ways of scoring.
        bos_token_id: every window begins with this token, in place of its oldest one; it counts as a token seen. Models
            that were trained with a beginning-of-sequence token rest much attention on it.
        num_bytes: UTF-8 bytes of the scored tokens; None: no bits per byte.
        name: of the model, in rows and messages.
        cropped: add rows of context "cropped": the same model, never shown more than the last `train_length` tokens.
        batch_tokens: tokens in one forward pass; by default the longest length.
        progress: show a bar.

    Raises `InputError` if lengths and tokens do not fit together, if the longest length will not fit in memory (before
    any work), and if a loss is not finite.
    """
    protocol = Protocol(sorted(lengths), train_length, scored_tokens, stride)
    _check_model_and_tokens(model, tokens, name)
    protocol.check(len(tokens))
    limit = text_decoder(model).limit
    plan = {
        (kind, length): windows
        for length in protocol.lengths
        if limit is None or length <= limit
        for kind in PROTOCOLS
        if (windows := protocol.windows(kind, length, len(tokens)))
    }
    losses = _plan_losses(
        model, tokens, plan, bos_token_id=bos_token_id, name=name, batch_tokens=batch_tokens, progress=progress
    )
    rows, by_row = [], {}
    for row in _empty_rows(protocol, name, cropped, f"learned position table has {limit} rows"):
        scored = losses.get((row.protocol, row.most_seen))
        if scored is not None:
            by_row[row.context, row.protocol, row.length] = scored
            row = _filled(row, scored, num_bytes)
        rows.append(row)
    return Extrapolation(rows, _position_loss(losses), by_row)


def _empty_rows(protocol: Protocol, name: str, cropped: bool, reason: str) -> Iterator[ExtrapolationRow]:
    """All rows of a model in order, without numbers for `reason`."""
    for context in (FULL, CROPPED) if cropped else (FULL,):
        for kind in PROTOCOLS:
            for length in protocol.lengths:
                if kind == NON_OVERLAPPING and length > protocol.scored_tokens:
                    continue
                read = min(length, protocol.train_length) if context == CROPPED else length
                fewest, most = protocol.context_seen(kind, read)
                yield ExtrapolationRow(
                    model=name,
                    protocol=kind,
                    length=length,
                    context=context,
                    fewest_seen=fewest,
                    most_seen=most,
                    nats_per_token=None,
                    perplexity=None,
                    bits_per_byte=None,
                    tokens=protocol.scored_tokens,
                    status=CANNOT_RUN,
                    reason=reason,
                )


def _filled(row: ExtrapolationRow, losses: Tensor, num_bytes: int | None) -> ExtrapolationRow:
    nats = float(losses.double().mean())
    bits = nats * len(losses) / math.log(2) / num_bytes if num_bytes else None
    return replace(row, nats_per_token=nats, perplexity=math.exp(nats), bits_per_byte=bits, status=OK, reason=None)


def _position_loss(losses: Mapping[tuple[str, int], Tensor]) -> PositionLoss | None:
    """Loss by position in the longest non-overlapping windows, None if there are none."""
    length = max((length for kind, length in losses if kind == NON_OVERLAPPING), default=None)
    if length is None:
        return None
    by_window = losses[NON_OVERLAPPING, length].double().view(-1, length)
    return PositionLoss(length, len(by_window), by_window.mean(0).tolist())


def _check_model_and_tokens(model: PreTrainedModel, tokens: Tensor, name: str) -> None:
    """Check for a causal language model and for tokens inside its vocabulary; raises `InputError`."""
    head = model.get_output_embeddings()
    if head is None or model.config.is_encoder_decoder:
        raise InputError(f"model {name!r} is a {type(model).__name__}; perplexity needs a causal language model")
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens is a {type(tokens).__name__}; give a tensor, torch.tensor(tokens), of one text")
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise InputError(f"tokens of shape {tuple(tokens.shape)}, {tokens.dtype}; give one dimension of torch.int64")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"the text has token ids from {low} to {high}, and model {name!r} knows 0 to {vocabulary - 1}; "
            "use the tokenizer that the model was trained with"
        )


def _plan_losses(
    model: PreTrainedModel,
    tokens: Tensor,
    plan: dict[tuple[str, int], list[Window]],
    *,
    bos_token_id: int | None,
    name: str,
    batch_tokens: int | None,
    progress: bool,
) -> dict[tuple[str, int], Tensor]:
    """Losses of every entry of the plan, (protocol, length) -> windows; the longest must fit in memory."""
    if not plan:
        return {}
    longest = max(length for _, length in plan)
    batch_tokens = batch_tokens or longest
    losses = {}
    with evaluation_mode(model), torch.inference_mode():
        sliced = _logits_follow_from_hidden_states(model, tokens)
        check_memory(
            model.config,
            length=longest,
            batch=max(1, batch_tokens // longest),
            dtype=model.dtype,
            device=input_device(model),
            sliced_logits=sliced,
        )
        total = sum(window.length for windows in plan.values() for window in windows)
        with progress_bar(f"evaluating {name}", total, shown=progress) as advance:
            for (protocol, length), windows in plan.items():
                batch = max(1, batch_tokens // length)
                values = window_losses(
                    model,
                    tokens,
                    windows,
                    bos_token_id=bos_token_id,
                    batch=batch,
                    sliced_logits=sliced,
                    advance=advance,
                )
                _check_finite(values, name=name, length=length)
                losses[protocol, length] = values
    return losses


def _logits_follow_from_hidden_states(model: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether logits are exactly the output embeddings applied to the last hidden states.

    Not so if logits are capped, scaled or computed by a wrapper. Cap and scale are nearly the identity
    on small logits, so nothing but rounding is tolerated.
    """
    ids = tokens[None, : min(16, len(tokens))].to(input_device(model))
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        return False
    expected = model(input_ids=ids, use_cache=False).logits.float()
    given = model.get_output_embeddings()(hidden).float()
    if given.shape != expected.shape:
        return False
    return bool(((given - expected).abs() <= 1e-6 * expected.abs().max()).all())


def window_losses(
    model: PreTrainedModel,
    tokens: Tensor,
    windows: Iterable[Window],
    *,
    bos_token_id: int | None = None,
    batch: int = 1,
    sliced_logits: bool = False,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Cross-entropy of every scored token of the windows, in their order.

    Returns a float32 CPU tensor of shape (scored tokens,), in nats. `batch` windows make one forward
    pass. With `bos_token_id` that token stands in for the first input of each window. With `sliced_logits` the
    output embeddings are applied to 1024 hidden states at a time, so that (length, vocabulary) logits never
    exist; right only for models whose logits are exactly that.
    `advance` is told the input tokens done.
    """
    losses = []
    for group in _batches(windows, batch):
        ids = torch.stack([tokens[w.start : w.start + w.length] for w in group]).to(input_device(model))
        if bos_token_id is not None:
            ids[:, 0] = bos_token_id
        targets = torch.stack([tokens[w.first_target : w.start + w.length + 1] for w in group]).to(input_device(model))
        if sliced_logits:
            features = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head = model.get_output_embeddings()
        else:
            features, head = model(input_ids=ids, use_cache=False).logits, nn.Identity()
        # Input i predicts token i + 1, so the scored targets belong to the last positions.
        features = features[:, -targets.shape[1] :].flatten(0, 1)
        slices = zip(features.split(memory.LOGITS_SLICE), targets.flatten().split(memory.LOGITS_SLICE), strict=True)
        losses += [F.cross_entropy(head(x).float(), y, reduction="none").cpu() for x, y in slices]
        advance(ids.numel())
    return torch.cat(losses)


def _batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Yield lists of at most `size` neighbouring windows with the same number of inputs and of targets."""
    for _, group in groupby(windows, key=lambda window: (window.length, window.num_targets)):
        while batch := list(islice(group, size)):
            yield batch


def _check_finite(losses: Tensor, *, name: str, length: int) -> None:
    """Check that losses are numbers and their perplexity fits a float; raises `InputError`."""
    wrong = int((~losses.isfinite()).sum())
    if wrong or float(losses.double().mean()) > _MAX_NATS:
        what = f"{wrong} of {len(losses)} losses are NaN or infinite" if wrong else "the perplexity overflows"
        raise InputError(
            f"model {name!r}: {what} at length {length}; check its weights, or use dtype float32 if it overflows"
        )
