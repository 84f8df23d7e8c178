"""Does an engine compute what transformers does? Greedy continuations and their logits, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import InputError, VerificationError, one_line
from ..model.anatomy import has_no_positions
from ..model.loading import load_complete
from ..utils import progress_bar
from .engines.engine import Continuation, Engine
from .source import Source, open_source

__all__ = ["verify_export"]

# Prompts up to this length are continued in one batch.
_TOGETHER = 2048
# Without the bias, logits must differ by this many bounds, or the prompts could not tell.
_CONTROL = 10.0
# Where float32 in transformers is further from float64 than the bound, an engine may be this many times as far.
_MAGNIFIED = 4.0
# How much more the perplexity of a file with rounded weights may be, as a share.
_PERPLEXITY = 0.02
_PERPLEXITY_TOKENS = 2048
# Characters of the text that both tokenizers are given.
_TOKENIZED = 20_000


@dataclass(frozen=True)
class _Kind:
    """How a target is compared."""

    engine: str
    """Module in `engines`."""
    package: str
    """What has to be installed for it."""
    has_file: bool

    def bound(self, config: Any) -> float:
        """Largest difference of logits that rounding explains, in float32."""
        if self.engine == "llama_cpp":
            # GELU comes from a table in f16.
            return 2e-2 if config.model_type == "alibi_gpt2" else 2e-4
        return 5e-4


@dataclass(frozen=True)
class _Row:
    """What the comparison of one continuation gives."""

    tokens: int
    """Length of the prompt."""
    difference_at_once: float
    """The largest of any logit right after the prompt."""
    difference: float
    """The largest of any logit at the first `COMPARED` tokens written."""
    rounding: float | None
    """The largest of transformers' own float32 from float64; None if nothing asked for it."""
    control: float | None
    """The largest that leaving the bias out would make; None in a model without positions."""
    same_text: bool
    """Whether every token is the likeliest in transformers: False if two were equally likely within the bound."""
    is_within: bool
    is_likeliest: bool


_KINDS = {
    "vllm": _Kind("vllm", "vllm", has_file=False),
    "gguf": _Kind("llama_cpp", "llama-cpp-python", has_file=True),
    "onnx": _Kind("onnx_runtime", "onnxruntime", has_file=True),
}


def verify_export(
    target: str,
    folder: str | Path,
    file: str | Path | None = None,
    *,
    lengths: Sequence[int] | None = None,
    new_tokens: int = 16,
    text_file: str | Path | None = None,
    tensor_parallel: int = 1,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare an engine's logits and greedy text with those of transformers, in float32.

    Prompts are read in chunks; those of up to 2,048 tokens are one batch, padded if the engine pads. A file of rounded
    weights (f16, q8_0, ...) is compared by its perplexity on the first 2,048 tokens of `text_file`.

    Args:
        target: "vllm", "gguf" or "onnx".
        folder: of the converted model.
        file: what was exported; None for vLLM, which serves the folder.
        lengths: of the prompts, in tokens; None for 10, 1,000, and 100 past the limit that the model had.
        new_tokens: how many are written after each prompt.
        text_file: text that prompts are the beginning of; None for random tokens.
        tensor_parallel: ranks of vLLM.
        progress: whether to show a bar.

    Returns "engine" (its name and version), "bound", and "rows", one for each length: "tokens"; "difference", the
    largest of any logit at the first 32 tokens written, and "difference_at_once", at the first; "control", what it is
    without the bias; "same_text", False if two tokens were equally likely within the bound. Some tokens magnify any
    rounding: if the difference is above the bound, both are compared with float64, and the engine may be off by four
    times the most that transformers is, "rounding". For rounded weights "engine", "bound" and "perplexity" of both.

    Raises VerificationError if the engine differs by more or writes another text, InputError if it cannot be compared.
    """
    kind, path = _checked(target, folder, file, min(new_tokens, *(lengths or (1,))))
    source = open_source(folder, target)
    engine_module = _import(kind)
    rounded = target == "gguf" and _is_rounded(path)
    if rounded and text_file is None:
        raise InputError(f"{path} has rounded weights, which are compared by perplexity: give text_file")
    limit = source.config.alibi_original_max_position_embeddings or 1024
    lengths = (_PERPLEXITY_TOKENS,) if rounded else sorted(set(lengths or (10, 1000, limit + 100)))
    text = _text(source, text_file, lengths[-1])
    model = load_complete(source.folder, dtype=torch.float32, attn_implementation="sdpa", name=f"{folder}")
    with _loading(path, kind.package):
        engine: Engine = engine_module.open_engine(source.folder, path, lengths[-1] + new_tokens, tensor_parallel)
    try:
        with torch.no_grad():
            _same_tokens(engine, source.folder, text_file)
            if rounded:
                return _compare_perplexity(engine, model, text)
            rows, bound = [], kind.bound(source.config)
            with progress_bar("comparing prompts", len(lengths), shown=progress) as advance:
                for row in _compare(engine, model, [text[:length] for length in lengths], new_tokens, bound):
                    _judge(engine, bound, row)
                    rows.append(asdict(row))
                    advance(1)
            return {"engine": engine.version, "bound": bound, "rows": rows}
    finally:
        engine.close()


def _checked(target: str, folder: str | Path, file: str | Path | None, least: int) -> tuple[_Kind, Path]:
    """How a target is compared, and what its engine is given. Raises InputError if that cannot be."""
    if target not in _KINDS:
        raise InputError(f"target is {target!r}; it must be one of {', '.join(_KINDS)}")
    kind = _KINDS[target]
    if kind.has_file != (file is not None):
        ask = f"{target} compares an exported file: give it after the folder"
        raise InputError(ask if kind.has_file else f"vLLM serves the folder itself: leave {file} out")
    path = Path(folder if file is None else file).expanduser()
    if not path.exists():
        raise InputError(f"{path}: there is no such file; write it by `hf-alibi export {target}`")
    if least < 1:
        raise InputError(f"lengths and new_tokens must be at least 1, got {least}")
    return kind, path


def _import(kind: _Kind) -> Any:
    """The module of an engine; raises InputError without its package."""
    try:
        import_module(kind.package.replace("-python", "").replace("-", "_"))
    except ImportError as error:
        raise InputError(f"{kind.package} cannot be imported ({error}); pip install {kind.package}") from error
    return import_module(f"{__package__}.engines.{kind.engine}")


@contextmanager
def _loading(path: Path, package: str) -> Iterator[None]:
    """Context manager: whatever is raised for a file that cannot be loaded is an InputError."""
    try:
        yield
    except Exception as error:  # of engines, which have no common one
        raise InputError(f"{package} cannot load {path}: {one_line(error)}") from error


def _is_rounded(file: Path) -> bool:
    """Whether a GGUF file has weights that are not f32."""
    from gguf import GGUFReader

    with _loading(file, "gguf"):
        return any(tensor.tensor_type.name != "F32" for tensor in GGUFReader(file).tensors)


def _text(source: Source, text_file: str | Path | None, length: int) -> list[int]:
    """The first `length` tokens of a text, or random ones."""
    if text_file is None:
        words, generator = source.config.vocab_size, torch.Generator().manual_seed(0)
        return torch.randint(words, (length,), generator=generator).tolist()
    ids: list[int] = AutoTokenizer.from_pretrained(source.folder)(_read(text_file), verbose=False).input_ids
    if len(ids) < length:
        raise InputError(f"{text_file} has {len(ids)} tokens, and {length} are compared; give more text, or --lengths")
    return ids[:length]


def _read(text_file: str | Path) -> str:
    try:
        return Path(text_file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {text_file}: {error}") from error


def _same_tokens(engine: Engine, folder: Path, text_file: str | Path | None) -> None:
    """Raise VerificationError if the engine's own tokenizer cuts the beginning of the text otherwise."""
    if text_file is None:
        return
    text = _read(text_file)[:_TOKENIZED]
    found = engine.tokenized(text)
    expected = AutoTokenizer.from_pretrained(folder)(text, verbose=False).input_ids
    if found not in (None, expected):
        raise VerificationError(
            f"{engine.version} makes {len(found or ())} tokens of the first {len(text):,} characters of {text_file}, "
            f"and not the {len(expected)} of transformers"
        )


def _compare(
    engine: Engine, model: PreTrainedModel, prompts: list[list[int]], new_tokens: int, bound: float
) -> Iterator[_Row]:
    """What the comparison of each continuation gives, shorter prompts first and in one batch."""
    together = [prompt for prompt in prompts if len(prompt) <= _TOGETHER]
    batches = [together] * bool(together) + [[prompt] for prompt in prompts if len(prompt) > _TOGETHER]
    for batch in batches:
        for prompt, found in zip(batch, engine.continued(batch, new_tokens), strict=True):
            yield _row(model, prompt, found, bound)


def _expected(model: PreTrainedModel, prompt: list[int], found: Continuation) -> Tensor:
    """Logits of transformers, (tokens, vocabulary), at the places of the engine's."""
    ids = torch.tensor([[*prompt, *found.ids[:-1]]])
    logits: Tensor = model(input_ids=ids, logits_to_keep=len(found.ids), use_cache=False).logits[0]
    return logits


def _row(model: PreTrainedModel, prompt: list[int], found: Continuation, bound: float) -> _Row:
    expected = _expected(model, prompt, found)
    control = None if has_no_positions(model.config) else _without_bias(model, prompt, found, expected)
    logits = torch.from_numpy(found.logits)
    rounding, allowed = None, torch.tensor(bound)
    difference = (logits - expected[: len(logits)]).abs().amax(dim=-1)
    if not (difference <= bound).all():
        # Some tokens magnify any rounding, that of transformers as well: float64 says by how much.
        exact = _expected(model.double(), prompt, found)
        model.float()
        difference = (logits - exact[: len(logits)]).abs().amax(dim=-1)
        rounding = (expected - exact).abs().amax(dim=-1)
        allowed = (_MAGNIFIED * rounding.amax()).clamp(min=bound)
    behind = expected.amax(dim=-1) - expected.gather(1, torch.tensor(found.ids)[:, None])[:, 0]
    return _Row(
        tokens=len(prompt),
        difference_at_once=difference[0].item(),
        difference=difference.max().item(),
        rounding=None if rounding is None else rounding.max().item(),
        control=control,
        same_text=not behind.any().item(),
        is_within=bool((difference <= allowed).all()),
        is_likeliest=bool((behind <= 2 * allowed).all()),
    )


def _without_bias(model: PreTrainedModel, prompt: list[int], found: Continuation, expected: Tensor) -> float:
    """How much logits change if the model runs without its bias: what the comparison would see then."""
    config: Any = model.config
    slopes = config.alibi_slopes
    config.alibi_slopes = [0.0] * config.num_attention_heads
    try:
        return (_expected(model, prompt, found) - expected).abs().max().item()
    finally:
        config.alibi_slopes = slopes


def _judge(engine: Engine, bound: float, row: _Row) -> None:
    """Raise VerificationError unless a row is within the bound, and far outside without the bias."""
    after = f"after {row.tokens:,} tokens"
    if row.control is not None and row.control < _CONTROL * bound:
        raise VerificationError(
            f"this prompt cannot tell whether the bias is there: without it logits change by {row.control:.1e} "
            f"{after}, and the bound is {bound:.0e}; give longer ones"
        )
    own = f", where float32 itself is off by {row.rounding:.1e}" if (row.rounding or 0.0) > bound else ""
    if not row.is_within:
        raise VerificationError(
            f"{engine.version} differs from transformers by {row.difference:.1e} {after}{own}; rounding explains "
            f"{bound:.0e}"
        )
    if not row.is_likeliest:
        raise VerificationError(f"{engine.version} writes another text than transformers {after}")


def _compare_perplexity(engine: Any, model: PreTrainedModel, text: list[int]) -> dict[str, Any]:
    expected = _perplexity(model(input_ids=torch.tensor([text]), use_cache=False).logits[0], text)
    found = _perplexity(torch.from_numpy(engine.prompt_logits(text)), text)
    if not found <= (1 + _PERPLEXITY) * expected:
        raise VerificationError(
            f"{engine.version} has perplexity {found:.3f} with these weights, transformers {expected:.3f} with the "
            f"whole ones: more than {_PERPLEXITY:.0%} above; choose a type with more bits"
        )
    return {"engine": engine.version, "bound": _PERPLEXITY, "perplexity": {"engine": found, "transformers": expected}}


def _perplexity(logits: Tensor, text: list[int]) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(text[1:])).item())
