"""`hf-alibi extrapolate`: compare models at lengths beyond their training length."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import InputError, one_line
from ..evaluation.baselines import ALL, BASELINES, Choice, Reach, check_names, choose, with_baseline
from ..evaluation.comparisons import Key, with_intervals
from ..evaluation.memory import check_memory
from ..evaluation.passkey import PasskeyProbe, PasskeyRow, PasskeyText, evaluate_passkey
from ..evaluation.perplexity import FULL, Extrapolation, evaluate_extrapolation
from ..evaluation.protocol import check_protocol
from ..model.anatomy import has_no_positions, is_alibi, position_limit
from ..model.loading import load_complete
from ..reporting.curves import protocol_lengths, protocol_title, protocols, tokens_seen
from ..reporting.findings import findings
from ..reporting.plots import loss_by_position, passkey_map, perplexity_by_length, require_matplotlib
from ..reporting.report import passkey_rows, table_rows, write_report
from ..reporting.results import METRICS_FILE, Results, check_output_dir, environment, write_results
from ..training.data import DataArguments, bos_token_id, count_bytes, document_numbers, load_tokenizer, load_tokens
from .settings import load_settings

__all__ = ["ComparisonArguments", "ExtrapolateArguments", "Protocol", "compare", "extrapolate"]

_MULTIPLES = (1, 2, 4, 8, 16)
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NONE = "none"
# A name on the hub: one or two parts, none of which is a step to another folder.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
# Tokens on which the tokenizers of two models are compared.
_SAMPLE_TOKENS = 4096


class Protocol(NamedTuple):
    """How much is scored, at which lengths; the arguments of `evaluate_extrapolation`, all in tokens."""

    lengths: list[int]
    train_length: int
    scored_tokens: int
    stride: int | None


@dataclass(kw_only=True)
class ComparisonArguments:
    """How models are compared, in a conversion too."""

    lengths: list[int] | None = field(
        default=None, metadata={"help": "Evaluation lengths in tokens. Default: the training length x 1 2 4 8 16."}
    )
    scored_tokens: int | None = field(
        default=None,
        metadata={"help": "Held-out tokens scored, a multiple of every length. Default: 4 x the longest length."},
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Stride of the sliding window at every length, at most an eighth of the shortest length. Default: "
            "an eighth of each length."
        },
    )
    window_bos: bool | None = field(
        default=None,
        metadata={
            "help": "Begin each window with the tokenizer's beginning-of-sequence token, in place of its oldest token. "
            "Default: if documents begin with it."
        },
    )
    baselines: list[str] | None = field(
        default=None,
        metadata={
            "help": f"What models are also compared with, any of {', '.join(BASELINES)}; {ALL}: those that fit each "
            "model. Default: none."
        },
    )


@dataclass(kw_only=True)
class ExtrapolateArguments(ComparisonArguments):
    """Which models are compared, at which lengths."""

    # Only beside None does HfArgumentParser take a mapping as a string, which is then JSON.
    models: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": 'Name to folder or hub name, e.g. {"alibi": "runs/alibi", "original": "gpt2"}.'},
    )
    train_length: int = field(metadata={"help": "Length in tokens that the models were trained at."})
    output_dir: str = field(metadata={"help": "New or empty folder for results, report and plots."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention backend, such as eager or sdpa. Default: the library's choice."},
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights; auto: as saved."}
    )
    cropped: list[str] | None = field(
        default=None,
        metadata={
            "help": "Models also shown with their context cropped to train_length. Default: those without "
            f"ALiBi; {_NONE}: no model."
        },
    )
    passkey_cases: int = field(
        default=0, metadata={"help": "Cases of the passkey probe for each length and depth; 0: no probe."}
    )
    passkey_depths: list[float] | None = field(
        default=None, metadata={"help": "Where the key stands, from 0 to 1. Default: 0 0.25 0.5 0.75 1."}
    )
    passkey_lengths: list[int] | None = field(
        default=None, metadata={"help": "Lengths of the probe in tokens, answer included. Default: lengths."}
    )

    def __post_init__(self) -> None:
        check_names(self.baselines or ())
        self._check_probe()
        self.models = _parse_models(self.models)
        for name in self.cropped or ():
            if name not in self.models and self.cropped != [_NONE]:
                raise InputError(f"cropped names {name!r}; the models are {', '.join(self.models)} ({_NONE}: no model)")
        if self.train_length < 1 or min(self.lengths or [1]) < 1:
            raise InputError(f"train_length {self.train_length}, lengths {self.lengths}: each must be at least 1 token")

    def _check_probe(self) -> None:
        if self.passkey_cases < 0:
            raise InputError(f"passkey_cases is {self.passkey_cases}; give a number of cases, or 0 for no probe")
        for name, values, allowed in (
            ("passkey_depths", self.passkey_depths, lambda depth: 0 <= depth <= 1),
            ("passkey_lengths", self.passkey_lengths, lambda length: length >= 1),
        ):
            if len(set(values or ())) != len(values or ()) or not all(map(allowed, values or ())):
                ends = "from 0 to 1" if name == "passkey_depths" else "of at least 1 token"
                raise InputError(f"{name} is {values}; give different numbers {ends}")

    def probe(self) -> PasskeyProbe | None:
        """Return the passkey probe with the defaults filled in, None where it is off."""
        if not self.passkey_cases:
            return None
        return PasskeyProbe(
            lengths=sorted(self.passkey_lengths or self.protocol().lengths),
            depths=sorted(self.passkey_depths or _DEPTHS),
            cases=self.passkey_cases,
        )

    def protocol(self) -> Protocol:
        """Return lengths and scored tokens with the defaults filled in."""
        lengths = sorted(self.lengths or [self.train_length * multiple for multiple in _MULTIPLES])
        return Protocol(
            lengths=lengths,
            train_length=self.train_length,
            scored_tokens=4 * math.lcm(*lengths) if self.scored_tokens is None else self.scored_tokens,
            stride=self.stride,
        )


def _parse_models(given: dict[str, str] | str | None) -> dict[str, str]:
    """Return the mapping of names to sources, which the command line gives as JSON."""
    try:
        models = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise InputError(f"models {given!r} is not JSON ({error}); give {{name: folder or hub name}}") from error
    if not isinstance(models, dict) or not models or not all(isinstance(path, str) for path in models.values()):
        raise InputError(f"models is {given!r}; it must be a mapping, {{name: folder or hub name, ...}}")
    return {str(name): path for name, path in models.items()}


@dataclass(frozen=True)
class _Source:
    """A model on disk whose files were checked, and what can be known of it without its weights.

    `shell` is the model on the meta device.
    """

    name: str
    given: str
    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    shell: PreTrainedModel

    @property
    def position_limit(self) -> int | None:
        return position_limit(self.shell)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.shell.parameters())

    def describe(self, baselines: Choice) -> dict[str, Any]:
        """Return what the results say of this model."""
        given = Path(self.given)
        return {
            # The folder alone: where it lies on this machine is nobody's business.
            "source": given.name if given.is_absolute() else self.given,
            "model_type": self.config.model_type,
            "kind": self.kind,
            "positions": self._positions(),
            "attention": self.config._attn_implementation,
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": self.parameters,
            "position_limit": self.position_limit,
            "made_for": self._made_for(),
            "training": self._training(),
            "baselines": baselines.labels,
            "left_out": baselines.left_out,
        }

    @property
    def kind(self) -> str:
        """As the `attention` of a training run."""
        if not is_alibi(self.config):
            return "original"
        return "nope" if has_no_positions(self.config) else "alibi"

    def _made_for(self) -> int | None:
        """The length in tokens that the model was made for, by its config; None if that does not say."""
        config = self.config.get_text_config()
        field = "alibi_train_length" if is_alibi(self.config) else "max_position_embeddings"
        length: int | None = getattr(config, field, None)
        return length

    def _training(self) -> dict[str, Any] | None:
        """How long `hf-alibi finetune` or `convert` trained it; None if no metrics of a training lie beside it."""
        try:
            metrics = json.loads((self.folder / METRICS_FILE).read_text(encoding="utf-8"))
            config = metrics["config"]
            distilled = config["distill_tokens"] * config["distill_epochs"] if self.kind == "alibi" else 0
            # A training that began with a converted model has no conversion of its own to tell of.
            continued = self.kind != "original" and bool(metrics.get("continued"))
            return {
                "steps": metrics["steps"],
                "tokens": metrics["tokens_seen"],
                "distilled": distilled,
                "continued": continued,
            }
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _positions(self) -> str:
        words = {"alibi": "ALiBi", "nope": "none (ALiBi, all slopes 0)"}
        table = "its own" if self.position_limit is None else f"learned table, {self.position_limit} rows"
        return words.get(self.kind, table)


def extrapolate(argv: Sequence[str]) -> Results:
    """Run `compare` with the settings of `CONFIG.yaml --field value ...`."""
    return compare(*load_settings((ExtrapolateArguments, DataArguments), argv))


def compare(args: ExtrapolateArguments, data: DataArguments) -> Results:
    """Evaluate models at each length and write results, report and plots to `args.output_dir`.

    Output folder, model files, text, lengths and memory are checked for all models before the first is
    evaluated; nothing is written before the last is. Models are in memory one at a time, each with its baselines, which
    share its weights.

    Returns what `results.json` holds. Raises `InputError` where something given cannot be used.
    """
    console = Console(highlight=False)
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    require_matplotlib()
    protocol, probe = args.protocol(), args.probe()
    sources = [_check_source(name, given, args) for name, given in _parse_models(args.models).items()]
    tokenizer = load_tokenizer(data.tokenizer_name or str(sources[0].folder))
    tokens = _load_tokens(data, tokenizer)
    check_protocol(len(tokens), **protocol._asdict())
    _check_vocabularies(sources, tokens, tokenizer, shared=data.tokenizer_name is not None)
    window_bos = bos_token_id(
        tokenizer, data.document_bos if args.window_bos is None else args.window_bos, field="window_bos"
    )
    text = PasskeyText(tokenizer, window_bos) if probe is not None else None
    if probe is not None and text is not None:
        probe.check(text)
    lengths = sorted({*protocol.lengths, *(probe.lengths if probe else ())})
    reach = Reach(train_length=protocol.train_length, longest=lengths[-1])
    baselines = choose(args.baselines or (), {source.name: source.shell for source in sources}, reach)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for source in sources:
        _check_source_memory(source, lengths, device)

    scored = tokens[-protocol.scored_tokens :]
    num_bytes = count_bytes(scored, tokenizer)
    done = {
        source.name: _evaluate(
            source,
            baselines[source.name],
            args,
            reach,
            tokens,
            text=text,
            window_bos=window_bos,
            device=device,
            num_bytes=num_bytes,
        )
        for source in sources
    }
    results: Results = {
        "kind": "extrapolation",
        "settings": {
            **protocol._asdict(),
            "text": _describe_text(data),
            "scored_bytes": num_bytes,
            "document_bos": _token(tokenizer, bos_token_id(tokenizer, data.document_bos)),
            "window_bos": _token(tokenizer, window_bos),
        },
        "environment": environment(),
        "models": {source.name: source.describe(baselines[source.name]) for source in sources},
        **_numbers(done, document_numbers(scored, tokenizer), sources, protocol),
        **_passkeys(probe, done),
        "position_loss": dict(_position_losses(done)),
    }
    paths = _write(results, output_dir)
    _print(results, paths, console)
    return results


def _check_source(name: str, given: str, args: ExtrapolateArguments) -> _Source:
    """Find a model, check its config and its weight files, and build it without weights."""
    folder = _local_folder(name, given)
    _check_weights(name, folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        dtype = (config.dtype or torch.float32) if args.dtype == "auto" else getattr(torch, args.dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attn_implementation)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise InputError(
            f"model {name!r} ({given}) cannot be built: {one_line(error)}; give a causal language model that "
            "transformers or hf-alibi saved"
        ) from error
    return _Source(name, given, folder, model.config, dtype, model)


def _local_folder(name: str, given: str) -> Path:
    """Return the folder of a model, downloading what the hub has under this name and no folder holds."""
    if Path(given).is_dir():
        return Path(given)
    reason = ""
    if _HUB_NAME.fullmatch(given):
        try:
            return Path(snapshot_download(given, allow_patterns=_HUB_FILES))
        except (OSError, ValueError) as error:
            reason = f", and the hub gives none ({one_line(error)})"
    raise InputError(f"model {name!r}: there is no folder {given}{reason}; give an existing folder or a hub name")


def _check_weights(name: str, folder: Path) -> None:
    """Check that every weight file is there and as long as its header says; reads the headers only."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            shards = ["model.safetensors"]
        for shard in shards:
            with safe_open(folder / shard, framework="pt"):
                pass
    except FileNotFoundError as error:
        raise InputError(
            f"model {name!r}: {folder} has no {shard}; give a folder written by save_pretrained"
        ) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"model {name!r}: a weight file in {folder} is broken or cut short ({one_line(error)}); copy it again"
        ) from error


def _load_tokens(data: DataArguments, tokenizer: Tokenizer) -> Tensor:
    """Return the held-out tokens, the only ones that are read here."""
    held_out = load_tokens(data, tokenizer).held_out
    if not len(held_out):
        raise InputError("no text is held out; set validation_fraction above 0, or give validation_file")
    return held_out


def _check_vocabularies(sources: Sequence[_Source], tokens: Tensor, tokenizer: Tokenizer, *, shared: bool) -> None:
    """Check that all models read the same tokens: perplexities of different vocabularies do not compare.

    `shared` says that the tokenizer was named for all models; then one may have no tokenizer of its own.
    """
    text = tokenizer.decode(tokens[-_SAMPLE_TOKENS:].tolist(), skip_special_tokens=True)
    expected = tokenizer.encode(text, add_special_tokens=False)
    sizes = {source.name: source.config.get_text_config().vocab_size for source in sources}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"the vocabularies have different sizes ({sizes}), so the perplexities would not compare; "
            "compare models that share one tokenizer"
        )
    for source in sources:
        if shared and not _has_tokenizer(source.folder):
            continue
        if load_tokenizer(str(source.folder)).encode(text, add_special_tokens=False) != expected:
            raise InputError(
                f"the tokenizer of model {source.name!r} splits the text otherwise than the one in use, so "
                "the perplexities would not compare; compare models that share one tokenizer"
            )


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))


def _check_source_memory(source: _Source, lengths: Sequence[int], device: torch.device) -> None:
    """Check that the longest length a model runs at fits in memory, its weights included."""
    limit = source.position_limit
    runnable = [length for length in lengths if limit is None or length <= limit]
    if runnable:
        check_memory(
            source.config,
            length=runnable[-1],
            batch=1,
            dtype=source.dtype,
            device=device,
            weight_bytes=source.parameters * source.dtype.itemsize,
        )


def _is_cropped(source: _Source, args: ExtrapolateArguments) -> bool:
    return not is_alibi(source.config) if args.cropped is None else source.name in args.cropped


class _Done(NamedTuple):
    """What was found of one model: perplexities by context, and keys."""

    perplexities: dict[str, Extrapolation]
    keys: list[PasskeyRow]


def _evaluate(
    source: _Source,
    baselines: Choice,
    args: ExtrapolateArguments,
    reach: Reach,
    tokens: Tensor,
    *,
    text: PasskeyText | None,
    window_bos: int | None,
    device: torch.device,
    num_bytes: int,
) -> _Done:
    """Load a model, evaluate it with its baselines and let go of it."""
    model = load_complete(
        source.folder,
        dtype=source.dtype,
        attn_implementation=source.config._attn_implementation,
        name=f"the model {source.name!r} ({source.given})",
    ).to(device)
    protocol, probe, done = args.protocol(), args.probe(), _Done({}, [])
    try:
        for context in (FULL, *baselines.labels):
            variant = model if context == FULL else with_baseline(model, context, reach)
            name = source.name if context == FULL else f"{source.name}, {baselines.labels[context]}"
            cropped = context == FULL and _is_cropped(source, args)
            done.perplexities[context] = evaluate_extrapolation(
                variant,
                tokens,
                bos_token_id=window_bos,
                num_bytes=num_bytes,
                name=name,
                cropped=cropped,
                **protocol._asdict(),
            )
            if probe is not None and text is not None:
                rows = evaluate_passkey(variant, text, probe, name=name, limit=source.position_limit)
                done.keys.extend(replace(row, model=source.name, context=context) for row in rows)
        return done
    finally:
        del model, variant
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _numbers(
    done: Mapping[str, _Done], documents: Tensor, sources: Sequence[_Source], protocol: Protocol
) -> dict[str, Any]:
    """Rows with intervals, and comparisons of each converted model, or else of the first, with all others."""
    rows, losses = [], {}
    for name, found in done.items():
        for line, extrapolation in found.perplexities.items():
            for row in extrapolation.rows:
                context = row.context if line == FULL else line
                rows.append(asdict(replace(row, model=name, context=context)))
                if (behind := extrapolation.losses.get((row.context, row.protocol, row.length))) is not None:
                    losses[Key(name, context, row.protocol, row.length)] = behind
    converted = [source.name for source in sources if source.kind == "alibi"]
    subjects = converted or [sources[0].name]
    return with_intervals(rows, losses, documents, subjects=subjects, train_length=protocol.train_length)


def _passkeys(probe: PasskeyProbe | None, done: Mapping[str, _Done]) -> dict[str, Any]:
    if probe is None:
        return {}
    return {"passkey": {**asdict(probe), "rows": [asdict(row) for found in done.values() for row in found.keys]}}


def _position_losses(done: Mapping[str, _Done]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, found in done.items():
        loss = found.perplexities[FULL].position_loss
        if loss is not None:
            bins = [asdict(point) for point in loss.bins()]
            yield name, {"length": loss.length, "windows": loss.windows, "bins": bins}


def _describe_text(data: DataArguments) -> str:
    if data.validation_file is not None:
        return ", ".join(Path(path).name for path in data.validation_file)
    source = data.dataset_name or ", ".join(Path(path).name for path in data.train_file or ())
    return f"the last {100 * data.validation_fraction:.3g} % of the tokens of {source}"


def _token(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    return None if token_id is None else str(tokenizer.convert_ids_to_tokens(token_id))


def _write(results: Results, output_dir: Path) -> list[Path]:
    written = list(write_results(results, output_dir))
    drawn = [(perplexity_by_length, "perplexity.png"), (loss_by_position, "position_loss.png")]
    if "passkey" in results:
        drawn.append((passkey_map, "passkey.png"))
    for draw, name in drawn:
        draw(results, output_dir / name)
        written.append(output_dir / name)
    return [*written, *write_report(results, output_dir)]


def _print(results: Results, paths: Sequence[Path], console: Console) -> None:
    """Print the perplexities, one table a protocol, the keys found, what it comes to, and where the files are."""
    for protocol in protocols(results):
        title = f"Perplexity. {protocol_title(results, protocol)}"
        seen = ("tokens seen", tokens_seen(results, protocol))
        rows = [seen, *table_rows(results, protocol, "perplexity")]
        _print_table(console, title, protocol_lengths(results, protocol), rows)
    if "passkey" in results:
        _print_table(console, "Passkeys found", results["passkey"]["lengths"], passkey_rows(results))
    for sentence in findings(results):
        console.print(sentence.replace("**", ""), markup=False)
    for path in paths:
        console.print(str(path), markup=False, soft_wrap=True)


def _print_table(console: Console, title: str, lengths: Sequence[int], rows: Iterable[tuple[str, list[str]]]) -> None:
    table = Table(title=title)
    table.add_column("model")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for name, cells in rows:
        table.add_row(escape(name), *map(escape, cells))
    console.print(table)
