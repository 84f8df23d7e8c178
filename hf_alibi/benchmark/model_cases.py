"""What `hf-alibi benchmark` times in models: forward, training step, decode step, and attention on real activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from ..attention.backends import BACKENDS, wrapped_backends
from ..attention.cache import AlibiCache
from ..attention.sdpa.reads import record_reads
from ..errors import InputError, one_line
from ..evaluation.memory import peak_bytes
from ..evaluation.perplexity import window_losses
from ..evaluation.protocol import Window
from ..model.anatomy import is_alibi, text_decoder
from ..model.loading import load_complete
from ..model.patching import apply_alibi
from ..training.data import load_tokenizer, load_tokens
from ..training.settings import PYTHON_DOCS, DataArguments
from .attention_cases import CAUSAL, FORWARD, SDPA, causal_attention
from .settings import BenchmarkArguments, Case
from .timing import OK, Row, Stopwatch

__all__ = ["ALL_LAYERS", "activation_cases", "decode_cases", "model_cases", "sequence_cases"]

UNCONVERTED, CONVERTED, DROPPING = "unconverted", "converted", "converted, AlibiCache"
# Steps after which an AlibiCache has dropped what it can.
_SETTLE = 40
TRAINING_STEP = "training_step"
ALL_LAYERS = "all layers"

# Weights, their gradients and the two moments of AdamW.
_COPIES_IN_TRAINING = 4


def _gpt2(args: BenchmarkArguments, length: int) -> PretrainedConfig:
    return GPT2Config(
        n_embd=args.heads * args.head_dim,
        n_head=args.heads,
        n_layer=args.model_layers,
        n_positions=length,
        vocab_size=args.vocab_size,
        # With dropout, PyTorch leaves its fused kernel on CPU.
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def _llama(args: BenchmarkArguments, length: int) -> PretrainedConfig:
    width = args.heads * args.head_dim
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_attention_heads=args.heads,
        num_key_value_heads=args.model_key_value_heads,
        num_hidden_layers=args.model_layers,
        max_position_embeddings=length,
        vocab_size=args.vocab_size,
        bos_token_id=0,
        eos_token_id=0,
    )


_SHAPES: dict[str, Callable[[BenchmarkArguments, int], PretrainedConfig]] = {"gpt2": _gpt2, "llama": _llama}
_CACHES: dict[str, Callable[[PretrainedConfig, int], Cache]] = {
    "dynamic": lambda config, length: DynamicCache(config=config),
    "static": lambda config, length: StaticCache(config=config, max_cache_len=length),
}


def _build(config: PretrainedConfig, args: BenchmarkArguments, device: torch.device) -> dict[str, PreTrainedModel]:
    """Both models with the same random weights."""
    models = {}
    for name in (UNCONVERTED, CONVERTED):
        torch.manual_seed(args.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype), attn_implementation="sdpa")
        # What GPT-2 falls back to, but with a warning.
        model.loss_type = model.loss_type or "ForCausalLM"
        models[name] = model.to(device).eval()
    apply_alibi(models[CONVERTED])
    return models


def _weight_bytes(config: PretrainedConfig, args: BenchmarkArguments) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return sum(parameter.nbytes for parameter in model.parameters())


def model_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """Forward, and training step (forward, loss, backward, AdamW), of both models with random weights and tokens."""

    def measure(shape: str, length: int, train: bool, stopwatch: Stopwatch) -> list[Row]:
        config = _SHAPES[shape](args, length)
        dtype: torch.dtype = getattr(torch, args.dtype)
        logits = args.batch_size * length * args.vocab_size * 12
        layer = peak_bytes(config, length=length, batch=args.batch_size, dtype=dtype, sliced_logits=False) - logits
        # Training keeps what a layer computes until its backward pass.
        needed = logits + layer * (args.model_layers if train else 1)
        needed += 2 * _weight_bytes(config, args) * (_COPIES_IN_TRAINING if train else 1)
        if reason := args.why_not(needed):
            return stopwatch.compare(dict.fromkeys((UNCONVERTED, CONVERTED), reason), baseline=UNCONVERTED)
        models = _build(config, args, device)
        ids = torch.randint(args.vocab_size, (args.batch_size, length), device=device)
        step = _training_step if train else _forward
        return stopwatch.compare({name: step(model, ids) for name, model in models.items()}, baseline=UNCONVERTED)

    for shape in _SHAPES:
        for what in (FORWARD, TRAINING_STEP):
            for length in args.model_lengths:
                run = partial(measure, shape, length, what == TRAINING_STEP)
                yield Case("model", shape, what, length, args.batch_size * length, run)


def _forward(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return run


def _training_step(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def decode_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """One new token after a cache of random keys and values, the same cache for both models.

    A third variant is the converted model with an `AlibiCache` that has dropped what it can.
    """

    def measure(shape: str, kind: str, context: int, stopwatch: Stopwatch) -> list[Row]:
        config = _SHAPES[shape](args, context + 1)
        weights = _weight_bytes(config, args)
        key_heads = getattr(config, "num_key_value_heads", args.heads)
        size = (args.batch_size, key_heads, context, args.head_dim)
        dtype: torch.dtype = getattr(torch, args.dtype)
        cached = 2 * args.batch_size * key_heads * context * args.head_dim * dtype.itemsize
        # Two caches; a layer's keys and values are copied when a token is appended, and again where heads are repeated.
        needed = 2 * weights + cached * (2 * args.model_layers + 2 * args.heads // key_heads)
        if reason := args.why_not(needed):
            return stopwatch.compare(dict.fromkeys((UNCONVERTED, CONVERTED, DROPPING), reason), baseline=UNCONVERTED)
        models = _build(config, args, device)
        cache = _CACHES[kind](config, context + 1)
        dropping = AlibiCache()
        for layer in range(args.model_layers):
            keys, values = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
            cache.update(keys, values, layer)
            dropping.update(keys, values, layer)
        ids = torch.randint(args.vocab_size, (args.batch_size, 1), device=device)

        def step(model: PreTrainedModel, cache: Cache) -> object:
            with torch.no_grad():
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            _forget_last(cache)
            return logits

        for _ in range(_SETTLE):
            step(models[CONVERTED], dropping)
        return stopwatch.compare(
            {
                **{name: partial(step, model, cache) for name, model in models.items()},
                DROPPING: partial(step, models[CONVERTED], dropping),
            },
            baseline=UNCONVERTED,
        )

    for shape in _SHAPES:
        for kind in _CACHES:
            for context in args.contexts:
                run = partial(measure, shape, kind, context)
                yield Case("decode", shape, f"{kind} cache", context, args.batch_size, run)


def _forget_last(cache: Cache) -> None:
    """Take the last token off again, so that every step has the same context."""
    if isinstance(cache, StaticCache):
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
    else:
        cache.crop(-1)


def sequence_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """Perplexity of a small converted model on one sequence, short and long; ratios are those of the cost per token."""
    config = GPT2Config(n_embd=128, n_head=4, n_layer=2, n_positions=1, vocab_size=256, bos_token_id=0, eos_token_id=0)
    shortest, longest = args.sequence_lengths[0], args.sequence_lengths[-1]

    def evaluate(model: PreTrainedModel, tokens: Tensor, length: int) -> object:
        with torch.inference_mode():
            return window_losses(model, tokens, [Window(0, length, 1)], sliced_logits=True).mean().exp()

    def measure(stopwatch: Stopwatch) -> list[Row]:
        torch.manual_seed(args.seed)
        model = apply_alibi(AutoModelForCausalLM.from_config(config)).to(device).eval()
        tokens = torch.randint(config.vocab_size, (longest + 1,))
        variants: dict[str, Callable[[], object] | str] = {}
        for length in args.sequence_lengths:
            reason = args.why_not(peak_bytes(config, length=length, batch=1, dtype=torch.float32))
            variants[f"{length} tokens"] = reason or partial(evaluate, model, tokens, length)
        rows = stopwatch.compare(variants, baseline=f"{shortest} tokens")
        for length, row in zip(args.sequence_lengths, rows, strict=True):
            ratios = ("ratio", "ratio_low", "ratio_high")
            row |= {name: row[name] * shortest / length for name in ratios if row[name] is not None}
            if row["seconds"] is not None:
                row["microseconds_per_token"] = row["seconds"] / length * 1e6
        return rows

    yield Case("sequence", "small model", "perplexity", longest, longest, measure)


def activation_cases(args: BenchmarkArguments, device: torch.device) -> Iterator[Case]:
    """Attention on the queries, keys and values of a real model reading real text, layer by layer.

    Model and text are loaded at the first case. Raises InputError if they cannot be used.
    """
    model, converted = _load(args, device)
    tokens = _read_text(args)
    if int(tokens.max()) >= model.config.get_text_config().vocab_size:
        raise InputError(f"{args.model_name_or_path}: its tokenizer has token ids that the model does not know")
    if len(tokens) < args.activation_lengths[-1]:
        raise InputError(
            f"{args.text} has {len(tokens)} tokens, and activation_lengths asks for {args.activation_lengths[-1]}; "
            "give a longer text or shorter lengths"
        )
    what = "converted here, untrained" if converted else "ALiBi checkpoint"

    def measure(length: int, stopwatch: Stopwatch) -> list[Row]:
        names = {module: name for name, module in text_decoder(model).self_attentions}
        rows: list[Row] = []

        def visit(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> None:
            attend = partial(BACKENDS["sdpa"], module, query, key, value, None, scaling=scaling)
            plain = partial(causal_attention, query, key, value, scaling)
            timed = stopwatch.compare({CAUSAL: plain, SDPA: attend}, baseline=CAUSAL)
            timed[1] |= _reads(attend)
            rows.extend({"subject": names[module], **row} for row in timed)

        with torch.no_grad(), _visiting(visit):
            model.base_model(input_ids=tokens[None, :length].to(device), use_cache=False)
        return [*rows, *_all_layers(rows)]

    for length in args.activation_lengths:
        yield Case("activations", ALL_LAYERS, what, length, length, partial(measure, length))


def _load(args: BenchmarkArguments, device: torch.device) -> tuple[PreTrainedModel, bool]:
    """The model, and whether it had to be converted; raises `InputError` if it lacks weights or cannot be converted."""
    name = f"the model_name_or_path {args.model_name_or_path}"
    model = load_complete(
        str(args.model_name_or_path), dtype=getattr(torch, args.dtype), attn_implementation="sdpa", name=name
    )
    converted = not is_alibi(model.config)
    if converted:
        try:
            apply_alibi(model)
        except ValueError as error:
            raise InputError(f"{name} cannot be converted to ALiBi: {one_line(error)}") from error
    return model.to(device).eval(), converted


def _read_text(args: BenchmarkArguments) -> Tensor:
    source: dict[str, Any] = {"dataset_name": args.text} if args.text == PYTHON_DOCS else {"train_file": [args.text]}
    data = DataArguments(**source, validation_fraction=0.0)
    return load_tokens(data, load_tokenizer(str(args.model_name_or_path))).train[0].read()


@contextmanager
def _visiting(visit: Callable[[nn.Module, Tensor, Tensor, Tensor, float | None], None]) -> Iterator[None]:
    """Call `visit` before each call of an ALiBi attention function while the context is open."""

    def visited(attention: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Any]:
            visit(module, query, key, value, kwargs.get("scaling"))
            return attention(module, query, key, value, *args, **kwargs)

        return attend

    with wrapped_backends(visited):
        yield


def _reads(attend: Callable[[], object]) -> Row:
    """Query-key pairs that one call reads: of each head, and as a share of the causal ones."""
    with record_reads() as reads:
        attend()
    if not reads:
        # Not worth windows: the plain causal kernel reads everything.
        return {"pairs_kept": 1.0}
    (read,) = reads
    return {
        "pairs_kept": sum(read.pairs) / (len(read.pairs) * read.causal_pairs),
        "pairs": list(read.pairs),
        "causal_pairs": read.causal_pairs,
        "windows": list(read.windows),
    }


def _all_layers(rows: list[Row]) -> Iterator[Row]:
    """Both variants over all layers: sums of the layers' medians, their ratio, and the mean share of pairs.

    `ratio_low` and `ratio_high` are here the smallest and the largest ratio of a layer.
    """
    sums = {variant: sum(row["seconds"] for row in rows if row["variant"] == variant) for variant in (CAUSAL, SDPA)}
    for variant, seconds in sums.items():
        layers = [row for row in rows if row["variant"] == variant]
        shares = [row["pairs_kept"] for row in layers if "pairs_kept" in row]
        yield {
            "subject": ALL_LAYERS,
            "variant": variant,
            "status": OK,
            "seconds": seconds,
            "ratio": seconds / sums[CAUSAL],
            "ratio_low": min(row["ratio"] for row in layers),
            "ratio_high": max(row["ratio"] for row in layers),
            "pairs_kept": sum(shares) / len(shares) if shares else None,
        }
