"""Pictures hold what they should: looked at through what was drawn and through the file."""

import sys
from itertools import pairwise

import pytest

from hf_alibi import plots
from hf_alibi.errors import InputError
from hf_alibi.plots import loss_by_position, loss_curve, perplexity_by_length, require_matplotlib

LENGTHS = [8, 16, 32]
CANNOT = "cannot run: learned position table has 8 rows"
PNG = b"\x89PNG\r\n\x1a\n"


def results(**perplexities):
    """Results with these perplexities at each length, equal in both protocols; None: cannot run."""
    rows = [
        {
            "model": name.removesuffix("_cropped"),
            "protocol": protocol,
            "length": length,
            "context": "cropped" if name.endswith("_cropped") else "full",
            "perplexity": perplexity,
            "status": "ok" if perplexity else CANNOT,
        }
        for name, values in perplexities.items()
        for protocol in ("sliding", "non_overlapping")
        for length, perplexity in zip(LENGTHS, values, strict=True)
    ]
    bins = [{"first": a, "last": b - 1, "nats_per_token": 3.0, "tokens": 4} for a, b in pairwise((1, 2, 5, 33))]
    models = dict.fromkeys(name.removesuffix("_cropped") for name in perplexities)
    return {
        "settings": {"train_length": 8, "lengths": LENGTHS, "stride": 4, "scored_tokens": 64},
        "rows": rows,
        "position_loss": {name: {"length": 32, "windows": 2, "bins": bins} for name in models},
    }


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures as they are saved."""
    figures = []
    save = plots._save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def lines(figure):
    """Label to line, of the first panel."""
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def is_picture(path):
    return path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


def test_perplexity_has_a_panel_a_protocol_and_a_line_a_model(tmp_path, drawn):
    perplexity_by_length(results(alibi=(9, 8, 7), other=(9, 10, 11), other_cropped=(9, 9, 9)), tmp_path / "p.png")
    assert is_picture(tmp_path / "p.png")
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    (figure,) = drawn
    assert len(figure.axes) == 2
    found = lines(figure)
    assert list(found["alibi"].get_ydata()) == [9, 8, 7]
    assert list(found["other"].get_xdata()) == LENGTHS
    assert found["other"].get_linestyle() == "-"
    assert found["other, cropped to 8"].get_linestyle() == "--"
    assert found["other, cropped to 8"].get_color() == found["other"].get_color() != found["alibi"].get_color()
    assert set(found["training length, 8"].get_xdata()) == {8}
    assert "stride 4" in figure.axes[0].get_title()


def test_a_model_that_cannot_run_is_crossed_at_its_last_length(tmp_path, drawn):
    perplexity_by_length(results(table=(9, 8, None), none=(None, None, None)), tmp_path / "p.png")
    found = lines(drawn[0])
    cross = found["table (cannot run past 16)"]
    assert (cross.get_marker(), list(cross.get_xdata()), list(cross.get_ydata())) == ("x", [16], [8])
    assert "none (cannot run at these lengths)" in found


@pytest.mark.parametrize(("last", "scale"), [(11.0, "linear"), (4000.0, "log")])
def test_values_far_apart_get_a_logarithmic_axis(tmp_path, drawn, last, scale):
    perplexity_by_length(results(a=(9, 8, 7), b=(9, 10, last)), tmp_path / "p.png")
    assert drawn[0].axes[0].get_yscale() == scale


def test_loss_by_position_puts_bins_at_their_middle(tmp_path, drawn):
    loss_by_position(results(alibi=(9, 8, 7)), tmp_path / "l.png")
    assert is_picture(tmp_path / "l.png")
    line = lines(drawn[0])["alibi (2 windows of 32 tokens)"]
    assert list(line.get_xdata()) == pytest.approx([1, (2 * 4) ** 0.5, (5 * 32) ** 0.5])
    assert list(line.get_ydata()) == [3.0, 3.0, 3.0]


def test_loss_by_position_without_any_curve_is_still_a_picture(tmp_path):
    loss_by_position({**results(a=(None, None, None)), "position_loss": {}}, tmp_path / "l.png")
    assert is_picture(tmp_path / "l.png")


def test_loss_curve_draws_what_the_history_has(tmp_path, drawn):
    history = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0, "eval_loss": 4.5},
        {"step": 3, "runtime": 1.0},
    ]
    loss_curve({"history": history}, tmp_path / "c.png")
    assert is_picture(tmp_path / "c.png")
    found = lines(drawn[0])
    assert list(found["training"].get_xdata()) == [1, 2]
    assert list(found["held-out"].get_ydata()) == [4.5]
    loss_curve({"history": []}, tmp_path / "empty.png")
    assert is_picture(tmp_path / "empty.png")


def test_pictures_leave_the_global_state_of_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    loss_curve({"history": [{"step": 1, "loss": 5.0}]}, tmp_path / "c.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    for draw in (require_matplotlib, lambda: loss_curve({"history": []}, tmp_path / "c.png")):
        with pytest.raises(InputError, match=r"pip install 'hf-alibi\[plots\]'"):
            draw()
    assert list(tmp_path.iterdir()) == []
