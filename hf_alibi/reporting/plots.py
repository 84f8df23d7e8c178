"""Pictures made from result files: perplexity and cost against length, loss against position, loss against step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InputError
from ..evaluation.probe_tasks import TASKS
from ..evaluation.protocol import CROPPED, FULL, NON_OVERLAPPING, OK, SLIDING
from ..utils import replacing
from .curves import Comparison
from .results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "cost_by_length",
    "loss_by_position",
    "loss_by_row",
    "loss_curve",
    "perplexity_by_length",
    "probe_map",
    "require_matplotlib",
]


class _Style(NamedTuple):
    """How a line over length is drawn; `band`: with its interval."""

    line: Any
    marker: str
    band: bool = False
    zorder: int = 2


# The palette of Okabe and Ito, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Above this ratio of largest to smallest value a linear axis squashes the small ones.
_LOG_RATIO = 8.0
# By context; baselines take theirs in turn.
_STYLES = {FULL: _Style("-", "o", band=True, zorder=3), CROPPED: _Style("--", "")}
_BASELINE_STYLES = (
    _Style((0, (1, 1.2)), "^"),
    _Style((0, (6, 1.5, 1, 1.5)), "s"),
    _Style((0, (5, 1.5, 1, 1.5, 1, 1.5)), "D"),
    _Style((0, (9, 2)), "v"),
)
# Panels in a row of a map, and letters in a line of their titles.
_MAP_COLUMNS = 4
_MAP_TITLE = 28
_TITLES = {SLIDING: "sliding window", NON_OVERLAPPING: "non-overlapping windows"}


def perplexity_by_length(results: Results, path: Path) -> None:
    """Draw perplexity against length, one panel a protocol, one line a model, as a PNG at `path`.

    A model has its colour and a band, its 95 % interval; each of its baselines has a line style. The training length is
    a vertical line, and a model that cannot run at the greater lengths ends in a cross.
    """
    results = Comparison(results)
    rows, settings = results["rows"], results["settings"]
    colours = _colours(row["model"] for row in rows)
    styles = _styles(results)
    figure = _figure(width=5.6 * len(results.protocols()), height=4.4 + 0.2 * len(results.curves()) / 2)
    panels = figure.subplots(1, len(results.protocols()), sharey=True, squeeze=False)[0]
    for panel, protocol in zip(panels, results.protocols(), strict=True):
        for model, context in results.curves():
            drawn = results.curve(model, protocol, context)
            _draw_lengths(panel, drawn, results.curve_name(model, context), colours[model], styles[model, context])
        stride = f", stride {results.stride_words()}" if protocol == SLIDING else ""
        panel.set_title(_TITLES.get(protocol, protocol) + stride, fontsize=11)
        _length_axis(panel, sorted({row["length"] for row in rows}), settings["train_length"])
        panel.set_xlabel("evaluation length (tokens)")
    panels[0].set_ylabel("perplexity per token (lower is better)")
    _value_axis(panels[0], [row["perplexity"] for row in rows if row["perplexity"] is not None])
    _legend(figure, panels[0])
    _save(figure, path)


def _styles(results: Comparison) -> dict[tuple[str, str], _Style]:
    """Give every model in every context its style; the baselines of each model take theirs in turn."""
    unused = {model: cycle(_BASELINE_STYLES) for model, _ in results.curves()}
    return {(model, context): _STYLES.get(context) or next(unused[model]) for model, context in results.curves()}


def _draw_lengths(panel: Axes, rows: Sequence[Mapping[str, Any]], label: str, colour: str, style: _Style) -> None:
    """Draw one model in one context; a cross ends it if the model cannot run at the next length."""
    shown = [row for row in rows if row["perplexity"] is not None]
    stopped = [row for row in rows if row["perplexity"] is None]
    lengths, perplexities, low, high = (
        [row[field] for row in shown] for field in ("length", "perplexity", "perplexity_low", "perplexity_high")
    )
    if stopped:
        label += f" (cannot run past {lengths[-1]})" if shown else " (cannot run at these lengths)"
    panel.plot(
        lengths,
        perplexities,
        linestyle=style.line,
        color=colour,
        marker=style.marker,
        markersize=4,
        linewidth=1.6,
        label=None if stopped else label,
        zorder=style.zorder,
    )
    if style.band:
        panel.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)
    if stopped:
        panel.plot(
            lengths[-1:],
            perplexities[-1:],
            linestyle="",
            color=colour,
            marker="x",
            markersize=12,
            markeredgewidth=2.5,
            label=label,
            zorder=4,
        )


def probe_map(results: Results, path: Path, *, task: str) -> None:
    """Draw the share of a probe that was found, by depth and length, one panel a model or baseline, as a PNG."""
    results = Comparison(results)
    probe = results["probes"]
    rows = [row for row in probe["rows"] if row["task"] == task]
    names = list(dict.fromkeys((row["model"], row["context"]) for row in rows))
    columns = min(len(names), _MAP_COLUMNS)
    width = max(2.4, 0.5 * len(probe["lengths"]) + 0.5)
    height = max(1.6, 0.28 * len(probe["depths"]) + 0.7)
    figure = _figure(width=width * columns + 1.6, height=height * math.ceil(len(names) / columns) + 0.5)
    panels = figure.subplots(math.ceil(len(names) / columns), columns, sharex=True, sharey=True, squeeze=False)
    image = None
    for index, (panel, (model, context)) in enumerate(zip(panels.flat, names, strict=False)):
        cells = {
            (row["depth"], row["length"]): row
            for row in rows
            if (row["model"], row["context"], row["status"]) == (model, context, OK)
        }
        shares = [[_share(cells.get((depth, length))) for length in probe["lengths"]] for depth in probe["depths"]]
        image = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, values in enumerate(shares):
            for x, share in enumerate(values):
                text = "–" if math.isnan(share) else f"{share:.0%}"
                panel.text(x, y, text, ha="center", va="center", fontsize=8, color="black" if share > 0.6 else "white")
        panel.set_facecolor("0.6")
        panel.set_title("\n".join(wrap(results.curve_name(model, context), _MAP_TITLE)), fontsize=9)
        panel.set_xticks(range(len(probe["lengths"])), map(str, probe["lengths"]), rotation=45, fontsize=8)
        panel.tick_params(labelbottom=index + columns >= len(names))
        panel.set_yticks(range(len(probe["depths"])), [f"{depth:.0%}" for depth in probe["depths"]], fontsize=8)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    figure.suptitle(f"{TASKS[task].plural.capitalize()} found", fontsize=10)
    figure.supxlabel("length of the prompt (tokens)", fontsize=10)
    figure.supylabel("depth of the answer", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=panels, label="found", format="{x:.0%}", fraction=0.05, aspect=25)
    _save(figure, path)


def _share(row: Mapping[str, Any] | None) -> float:
    return math.nan if row is None else row["found"] / row["cases"]


def loss_by_position(results: Results, path: Path) -> None:
    """Draw the mean loss against the context before the target, one line a model, as a PNG at `path`."""
    by_model, settings = results["position_loss"], results["settings"]
    colours = _colours(row["model"] for row in results["rows"])
    figure = _figure(width=7.0, height=4.4)
    panel = figure.subplots()
    values = []
    for model, found in by_model.items():
        # The geometric middle of a bin is its middle on the logarithmic axis.
        middles = [math.sqrt(point["first"] * point["last"]) for point in found["bins"]]
        nats = [point["nats_per_token"] for point in found["bins"]]
        values += nats
        label = f"{model} ({found['windows']} window{'' if found['windows'] == 1 else 's'} of {found['length']} tokens)"
        panel.plot(middles, nats, "-o", color=colours[model], markersize=3, label=label)
    longest = max((found["length"] for found in by_model.values()), default=settings["train_length"])
    _length_axis(panel, _powers_of_two(max(longest, settings["train_length"])), settings["train_length"])
    panel.set_xlabel("position in the window (tokens of context before the target)")
    panel.set_ylabel("loss (nats per token)")
    panel.set_title("loss by position, non-overlapping windows", fontsize=11)
    _value_axis(panel, values)
    _legend(figure, panel)
    _save(figure, path)


def loss_curve(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw training and evaluation loss against the optimizer step, as a PNG at `path`.

    `metrics["history"]` holds dictionaries with "step" and any of "loss" and "eval_loss", in nats per
    token. `metrics["config"]` says what was learned.
    """
    taught = metrics["config"]["teacher_name_or_path"] is not None
    figure = _figure(width=7.0, height=4.4)
    panel = figure.subplots()
    values: list[float] = []
    for key, label, style in (
        ("loss", "training, distance to the teacher" if taught else "training", "-"),
        ("eval_loss", "held-out", "-o"),
    ):
        points = [(entry["step"], entry[key]) for entry in metrics["history"] if entry.get(key) is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            panel.plot(steps, losses, style, color=_COLOURS[key != "loss"], markersize=4, label=label)
            values += losses
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("loss (nats per token)")
    panel.grid(alpha=0.25)
    _value_axis(panel, values)
    if values:
        panel.legend(frameon=False)
    _save(figure, path)


def cost_by_length(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the cost per token of attention and its ratio to the first variant against length, as a PNG at `path`.

    `rows` are those of a benchmark's part "attention": one line a variant, dashed with the backward pass. A
    variant that was not run at a length has no point there. The ratio's band is its quartiles.
    """
    colours = _colours(row["variant"] for row in rows)
    figure = _figure(width=11.2, height=4.8)
    cost, ratio = figure.subplots(1, 2)
    for variant, colour in colours.items():
        for what, style in (("forward", "-o"), ("forward_backward", "--o")):
            shown = [row for row in rows if _is(row, variant=variant, what=what, status=OK)]
            if not shown:
                continue
            label = variant if what == "forward" else f"{variant}, with backward"
            lengths = [row["length"] for row in shown]
            cost.plot(
                lengths,
                [row["microseconds_per_token"] for row in shown],
                style,
                color=colour,
                markersize=4,
                label=label,
            )
            compared = [row for row in shown if row["ratio"] is not None]
            lengths = [row["length"] for row in compared]
            ratio.plot(lengths, [row["ratio"] for row in compared], style, color=colour, markersize=4)
            low, high = ([row[end] for row in compared] for end in ("ratio_low", "ratio_high"))
            ratio.fill_between(lengths, low, high, color=colour, alpha=0.15)
    for panel, title in (
        (cost, "attention: microseconds per token"),
        (ratio, f"ratio to {next(iter(colours))}, in the same round"),
    ):
        _length_axis(panel, sorted({row["length"] for row in rows}))
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("length (tokens)")
        panel.set_title(title, fontsize=11)
    _legend(figure, cost)
    _save(figure, path)


def loss_by_row(results: Results, path: Path) -> None:
    """Draw the held-out loss of each row of an ablation, a bar for the mean and a dot a seed, as a PNG at `path`."""
    rows = results["rows"]
    figure = _figure(width=7.0, height=1.2 + 0.4 * len(rows))
    panel = figure.subplots()
    names = [row["row"] for row in rows]
    control = results["settings"]["control"]
    colours = [_COLOURS[1] if name == control else _COLOURS[0] for name in names]
    panel.barh(names, [row["nats_per_token"] for row in rows], color=colours, alpha=0.6, height=0.7)
    for run in results["runs"]:
        panel.plot(run["nats_per_token"], names.index(run["row"]), "o", color="black", markersize=3)
    losses = [run["nats_per_token"] for run in results["runs"]]
    margin = 0.1 * (max(losses) - min(losses)) or 0.1
    # Losses differ by a few tenths of nats: from zero, no difference could be seen.
    panel.set_xlim(min(losses) - margin, max(losses) + margin)
    panel.invert_yaxis()
    panel.set_xlabel("held-out loss (nats per token; the axis does not begin at 0)")
    panel.grid(axis="x", alpha=0.25)
    _save(figure, path)


def require_matplotlib() -> None:
    """Raise `InputError` if matplotlib is not installed, before a run that ends in plots begins."""
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib; install it with pip install 'hf-alibi[plots]'")


def _figure(*, width: float, height: float) -> Figure:
    """Make a figure (inches) on the Agg canvas, which needs no display and no global state."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _is(row: Mapping[str, Any], **fields: str) -> bool:
    """Whether a row has these values."""
    return all(row[field] == value for field, value in fields.items())


def _colours(models: Iterable[str]) -> dict[str, str]:
    """Give every model its colour, the same in every picture."""
    names = dict.fromkeys(models)
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}


def _powers_of_two(longest: int) -> list[int]:
    return [2**power for power in range(longest.bit_length())]


def _length_axis(panel: Axes, ticks: Sequence[int], train_length: int | None = None) -> None:
    """Make x a binary logarithm with plain numbers, and mark the training length."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 8 else 0)
    panel.minorticks_off()
    if train_length is not None:
        panel.axvline(
            train_length,
            color="0.5",
            linestyle=":",
            linewidth=1.2,
            zorder=1,
            label=f"training length, {train_length}",
        )
    panel.grid(alpha=0.25)


def _value_axis(panel: Axes, values: Sequence[float]) -> None:
    """Make y logarithmic, with plain numbers, if a linear axis would squash most of the values."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not values or min(values) <= 0 or max(values) / min(values) < _LOG_RATIO:
        return
    panel.set_yscale("log")
    decades = math.log10(max(values) / min(values))
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, panel: Axes) -> None:
    """Put the legend below the panels, where it covers no data."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=3.5)
