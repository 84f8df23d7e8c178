"""`hf-alibi extrapolate`: compare models at lengths beyond their training length."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import InputError
from ..evaluation.baselines import ChosenBaselines, Lengths, check_names, choose, with_baseline
from ..evaluation.checked_model import CheckedModel, check_longest, check_model
from ..evaluation.comparisons import Key, with_intervals
from ..evaluation.perplexity import Extrapolation, evaluate_extrapolation
from ..evaluation.probe_prompts import Probe, ProbeText
from ..evaluation.probe_tasks import TASKS
from ..evaluation.probes import ProbeRow, evaluate_probe
from ..evaluation.protocol import FULL, Protocol
from ..evaluation.settings import ExtrapolateArguments
from ..model.anatomy import is_alibi
from ..model.loading import load_complete
from ..reporting.curves import Comparison
from ..reporting.findings import findings
from ..reporting.plots import loss_by_position, perplexity_by_length, probe_map, require_matplotlib
from ..reporting.report import probe_rows, table_rows, write_report
from ..reporting.results import Results, check_output_dir, environment, write_results
from ..training.data import bos_token_id, count_bytes, document_numbers, load_tokenizer, load_tokens, run_tokenizer
from ..training.settings import DataArguments
from .settings import load_settings

__all__ = ["compare", "extrapolate"]

# Tokens on which the tokenizers of two models are compared.
_SAMPLE_TOKENS = 4096


def extrapolate(argv: Sequence[str]) -> Results:
    """Run `compare` with the settings of `CONFIG.yaml --field value ...`."""
    return compare(*load_settings((ExtrapolateArguments, DataArguments), argv))


def compare(args: ExtrapolateArguments, data: DataArguments) -> Results:
    """Evaluate models at each length and write results, report and plots to `args.output_dir`.

    Output folder, model files, text, lengths and memory are checked for all models before the first is evaluated;
    nothing is written before the last is. Models are in memory one at a time, each with its baselines, which share its
    weights.

    Returns what `results.json` holds. Raises `InputError` if something given cannot be used.
    """
    output_dir = Path(args.output_dir)
    check_output_dir(output_dir)
    require_matplotlib()
    check_names(args.baselines or ())
    models = [
        check_model(name, given, dtype=args.dtype, attn_implementation=args.attn_implementation)
        for name, given in args.sources().items()
    ]
    text = _load_text(args, data, models)
    protocol, probe = args.protocol(), args.probe()
    longest = sorted({*protocol.lengths, *(probe.lengths if probe else ())})
    lengths = Lengths(train_length=protocol.train_length, longest=longest[-1])
    baselines = choose(args.baselines or (), {model.name: model.shell for model in models}, lengths)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in models:
        check_longest(model, longest, device)

    found = {model.name: _evaluate(model, baselines[model.name], lengths, args, text, device) for model in models}
    results: Results = {
        "kind": "extrapolation",
        "settings": {**asdict(protocol), **text.described},
        "environment": environment(),
        "models": {model.name: model.describe(baselines[model.name]) for model in models},
        **_numbers(found, document_numbers(text.scored, text.tokenizer), models, protocol),
        **_probes(probe, found),
        "position_loss": dict(_position_losses(found)),
    }
    _print(results, _write(results, output_dir), Console(highlight=False))
    return results


class _Text(NamedTuple):
    """What models read: held-out tokens, of which `scored` are scored, and prompts of the probes."""

    tokenizer: Tokenizer
    tokens: Tensor
    scored: Tensor
    num_bytes: int
    window_bos: int | None
    prompts: ProbeText | None
    described: dict[str, Any]
    """What the results say of it."""


def _load_text(args: ExtrapolateArguments, data: DataArguments, models: Sequence[CheckedModel]) -> _Text:
    """Read the held-out text, and check that it suits the protocol and all models."""
    protocol, probe = args.protocol(), args.probe()
    tokenizer = run_tokenizer(data, str(models[0].folder))
    held_out = load_tokens(data, tokenizer).held_out
    if not len(held_out):
        raise InputError("no text is held out; set validation_fraction above 0, or give validation_file")
    protocol.check(len(held_out))
    # No window begins further back.
    tokens = held_out[-(protocol.scored_tokens + max(protocol.lengths)) :].read()
    _check_vocabularies(models, tokens, tokenizer, shared=data.tokenizer_name is not None)
    wanted = data.document_bos if args.window_bos is None else args.window_bos
    window_bos = bos_token_id(tokenizer, wanted, field="window_bos")
    prompts = ProbeText(tokenizer, window_bos) if probe is not None else None
    if probe is not None and prompts is not None:
        probe.check(prompts)
    scored = tokens[-protocol.scored_tokens :]
    num_bytes = count_bytes(scored, tokenizer)
    described = {
        "text": _describe_text(data),
        "scored_bytes": num_bytes,
        "document_bos": _token(tokenizer, bos_token_id(tokenizer, data.document_bos)),
        "window_bos": _token(tokenizer, window_bos),
    }
    return _Text(tokenizer, tokens, scored, num_bytes, window_bos, prompts, described)


def _check_vocabularies(models: Sequence[CheckedModel], tokens: Tensor, tokenizer: Tokenizer, *, shared: bool) -> None:
    """Check that all models read the same tokens: perplexities of different vocabularies do not compare.

    `shared` says that the tokenizer was named for all models; then one may have no tokenizer of its own.
    """
    text = tokenizer.decode(tokens[-_SAMPLE_TOKENS:].tolist(), skip_special_tokens=True)
    expected = tokenizer.encode(text, add_special_tokens=False)
    sizes = {model.name: model.config.get_text_config().vocab_size for model in models}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"the vocabularies have different sizes ({sizes}), so the perplexities would not compare; "
            "compare models that share one tokenizer"
        )
    for model in models:
        if shared and not _has_tokenizer(model.folder):
            continue
        if load_tokenizer(str(model.folder)).encode(text, add_special_tokens=False) != expected:
            raise InputError(
                f"the tokenizer of model {model.name!r} splits the text differently from the one in use, so "
                "the perplexities would not compare; compare models that share one tokenizer"
            )


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))


class _Found(NamedTuple):
    """The results of a model: perplexities by context, and answers to the probes."""

    perplexities: dict[str, Extrapolation]
    answers: list[ProbeRow]


def _evaluate(
    checked: CheckedModel,
    baselines: ChosenBaselines,
    lengths: Lengths,
    args: ExtrapolateArguments,
    text: _Text,
    device: torch.device,
) -> _Found:
    """Load a model, evaluate it with its baselines and let go of it."""
    model = load_complete(
        checked.folder,
        dtype=checked.dtype,
        attn_implementation=checked.config._attn_implementation,
        name=f"the model {checked.name!r} ({checked.given})",
    ).to(device)
    probe, found = args.probe(), _Found({}, [])
    cropped = not is_alibi(checked.config) if args.cropped is None else checked.name in args.cropped
    try:
        for context in (FULL, *baselines.labels):
            variant = model if context == FULL else with_baseline(model, context, lengths)
            name = checked.name if context == FULL else f"{checked.name}, {baselines.labels[context]}"
            found.perplexities[context] = evaluate_extrapolation(
                variant,
                text.tokens,
                bos_token_id=text.window_bos,
                num_bytes=text.num_bytes,
                name=name,
                cropped=cropped and context == FULL,
                **asdict(args.protocol()),
            )
            if probe is not None and text.prompts is not None:
                rows = evaluate_probe(variant, text.prompts, probe, name=name, limit=checked.position_limit)
                found.answers.extend(replace(row, model=checked.name, context=context) for row in rows)
        return found
    finally:
        del model, variant
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _numbers(
    found: Mapping[str, _Found], documents: Tensor, models: Sequence[CheckedModel], protocol: Protocol
) -> dict[str, Any]:
    """Rows with intervals, and comparisons of each converted model, or else of the first, with all others."""
    rows, losses = [], {}
    for name, of_model in found.items():
        for line, extrapolation in of_model.perplexities.items():
            for row in extrapolation.rows:
                context = row.context if line == FULL else line
                rows.append(asdict(replace(row, model=name, context=context)))
                if (scored := extrapolation.losses.get((row.context, row.protocol, row.length))) is not None:
                    losses[Key(name, context, row.protocol, row.length)] = scored
    converted = [model.name for model in models if model.kind == "alibi"]
    subjects = converted or [models[0].name]
    return with_intervals(rows, losses, documents, subjects=subjects, train_length=protocol.train_length)


def _probes(probe: Probe | None, found: Mapping[str, _Found]) -> dict[str, Any]:
    if probe is None:
        return {}
    rows = [asdict(row) for of_model in found.values() for row in of_model.answers]
    return {"probes": {**asdict(probe), "rows": rows}}


def _position_losses(found: Mapping[str, _Found]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, of_model in found.items():
        loss = of_model.perplexities[FULL].position_loss
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
    drawn: list[tuple[Callable[[Results, Path], None], str]] = [
        (perplexity_by_length, "perplexity.png"),
        (loss_by_position, "position_loss.png"),
    ]
    for task in Comparison(results).probe_tasks():
        drawn.append((partial(probe_map, task=task), f"{task}.png"))
    for draw, name in drawn:
        draw(results, output_dir / name)
        written.append(output_dir / name)
    return [*written, *write_report(results, output_dir)]


def _print(results: Results, paths: Sequence[Path], console: Console) -> None:
    """Print perplexities, a table a protocol, what was found of each probe, what it comes to, and where files are."""
    results = Comparison(results)
    for protocol in results.protocols():
        title = f"Perplexity. {results.protocol_title(protocol)}"
        seen = ("tokens seen", results.tokens_seen(protocol))
        rows = [seen, *table_rows(results, protocol, "perplexity")]
        _print_table(console, title, results.protocol_lengths(protocol), rows)
    for task in results.probe_tasks():
        title = f"{TASKS[task].plural.capitalize()} found"
        _print_table(console, title, results["probes"]["lengths"], probe_rows(results, task))
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
