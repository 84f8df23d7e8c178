"""Perplexity of one model at several lengths, on the same scored tokens at every length."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import InputError
from ..model.anatomy import position_limit
from ..utils import evaluation_mode, progress_bar
from . import memory
from .memory import check_memory
from .protocol import (
    NON_OVERLAPPING,
    PROTOCOLS,
    SLIDING,
    Window,
    check_protocol,
    context_seen,
    non_overlapping_windows,
    sliding_windows,
    stride_at,
)

__all__ = [
    "CROPPED",
    "FULL",
    "OK",
    "Extrapolation",
    "ExtrapolationRow",
    "PositionBin",
    "PositionLoss",
    "evaluate_extrapolation",
    "window_losses",
]

FULL = "full"
CROPPED = "cropped"
OK = "ok"

# exp overflows a float64 just above this.
_MAX_NATS = 709.0


@dataclass(frozen=True)
class ExtrapolationRow:
    """One number of the comparison: a model at one length under one protocol.

    `context` is "full" (all of the window) or "cropped" (never more than the training length). Each of the `tokens`
    scored tokens sees `fewest_seen` to `most_seen` tokens before it. `nats_per_token`, `perplexity` and
    `bits_per_byte` are None if `status` is not "ok"; `bits_per_byte` is also None if the number of bytes is unknown.
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

    `losses` has the nats of each scored token, float32 of shape (scored tokens,), behind each row with numbers: by its
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
    """Perplexity of a causal language model at each length, and its loss by position.

    The last `scored_tokens` tokens of `tokens` (shape (num_tokens,), int64) are scored, the same ones
    at every length, every token once and with equal weight; only the context before them varies. Two
    protocols, both reported:

    - `sliding`: a window of `length` tokens moves by `stride` tokens and scores only its last `stride`
      targets, so that every target sees `length - stride + 1` to `length` tokens. The default stride is an eighth of
      each length, the largest one allowed: so every target sees more than seven eighths of the length.
    - `non_overlapping`: windows lie end to end and score all their targets, which see 1 to `length`
      tokens. Lengths above `scored_tokens` have no such windows.

    Why both: the first targets of a window have little to go by and are hard to predict (the early-token
    curse, Press et al. 2022, appendix B). Under `non_overlapping` longer windows leave fewer such
    targets, so perplexity falls with length even for a model that uses only the few tokens before each
    target: a falling curve is no evidence that the distant context helps. It is nevertheless what most
    papers print, and the loss in the cheapest use of a model. Under `sliding` every target has at least
    `length - stride + 1` tokens before it, so what changes with length is what the model makes of the
    tokens added far away.

    With `bos_token_id` every window begins with that token, in place of its oldest one: models that were trained with a
    beginning-of-sequence token rest much attention on it. It counts as one of the tokens that a target sees.

    A model with a learned position table of N rows gets rows without numbers and the status "cannot run:
    ..." at lengths beyond N. With `cropped` there are further rows of context "cropped": the same
    model, never shown more than the last `train_length` tokens, so that beyond `train_length` its
    value is that at `train_length`.

    `num_bytes` is the number of UTF-8 bytes of the scored tokens (None: no bits per byte).
    `batch_tokens` is the number of tokens in one forward pass (default: the longest length, so that
    short windows cost no more memory than the longest). Runs on the model's device, in evaluation mode,
    without gradients; the mode is restored.

    Raises `InputError` where lengths and tokens do not fit together, before any work where the longest
    length will not fit in memory, and where a loss is not finite.
    """
    _check_model_and_tokens(model, tokens, name)
    check_protocol(
        len(tokens),
        lengths=lengths,
        train_length=train_length,
        scored_tokens=scored_tokens,
        stride=stride,
    )
    limit = position_limit(model)
    runnable = [length for length in sorted(lengths) if limit is None or length <= limit]
    plan: dict[tuple[str, int], list[Window]] = {}
    for length in runnable:
        own = stride_at(length, stride)
        plan[SLIDING, length] = sliding_windows(len(tokens), length=length, scored_tokens=scored_tokens, stride=own)
        if length <= scored_tokens:
            windows = non_overlapping_windows(len(tokens), length=length, scored_tokens=scored_tokens)
            plan[NON_OVERLAPPING, length] = windows
    losses = _plan_losses(
        model, tokens, plan, bos_token_id=bos_token_id, name=name, batch_tokens=batch_tokens, progress=progress
    )

    rows = []
    behind = {}
    for context in (FULL, CROPPED) if cropped else (FULL,):
        for protocol in PROTOCOLS:
            for length in sorted(lengths):
                if protocol == NON_OVERLAPPING and length > scored_tokens:
                    continue
                read = min(length, train_length) if context == CROPPED else length
                scored = losses.get((protocol, read))
                if scored is not None:
                    behind[context, protocol, length] = scored
                nats, perplexity, bits, status = _numbers(scored, num_bytes, limit)
                fewest, most = context_seen(protocol, read, scored_tokens=scored_tokens, stride=stride)
                rows.append(
                    ExtrapolationRow(
                        model=name,
                        protocol=protocol,
                        length=length,
                        context=context,
                        fewest_seen=fewest,
                        most_seen=most,
                        nats_per_token=nats,
                        perplexity=perplexity,
                        bits_per_byte=bits,
                        tokens=scored_tokens,
                        status=status,
                    )
                )
    tiled = [length for protocol, length in losses if protocol == NON_OVERLAPPING]
    if not tiled:
        return Extrapolation(rows, None, behind)
    by_window = losses[NON_OVERLAPPING, max(tiled)].double().view(-1, max(tiled))
    return Extrapolation(rows, PositionLoss(max(tiled), len(by_window), by_window.mean(0).tolist()), behind)


def _check_model_and_tokens(model: PreTrainedModel, tokens: Tensor, name: str) -> None:
    """Check for a causal language model and for tokens inside its vocabulary; raises `InputError`."""
    head = model.get_output_embeddings()
    if head is None or model.config.is_encoder_decoder:
        raise InputError(f"model {name!r} is a {type(model).__name__}; perplexity needs a causal language model")
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
            device=model.device,
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

    Not so where logits are capped, scaled or computed by a wrapper. Cap and scale are nearly the identity
    on small logits, so nothing but rounding is tolerated.
    """
    ids = tokens[None, : min(16, len(tokens))].to(model.device)
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
        ids = torch.stack([tokens[w.start : w.start + w.length] for w in group]).to(model.device)
        if bos_token_id is not None:
            ids[:, 0] = bos_token_id
        targets = torch.stack([tokens[w.first_target : w.start + w.length + 1] for w in group]).to(model.device)
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
            f"model {name!r}: {what} at length {length}; check its weights, or use dtype float32 where it overflows"
        )


def _numbers(
    losses: Tensor | None, num_bytes: int | None, limit: int | None
) -> tuple[float | None, float | None, float | None, str]:
    """Nats a token, perplexity, bits per byte and status; `losses` is None where the model cannot run."""
    if losses is None:
        return None, None, None, f"cannot run: learned position table has {limit} rows"
    nats = float(losses.double().mean())
    bits_per_byte = nats * len(losses) / math.log(2) / num_bytes if num_bytes else None
    return nats, math.exp(nats), bits_per_byte, OK
