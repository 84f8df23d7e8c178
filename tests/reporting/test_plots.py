"""Pictures hold what they should: looked at through what was drawn and through the file."""

import sys

import pytest

from helpers.made_up import made_up_results, with_keys
from hf_alibi.errors import InputError
from hf_alibi.reporting import plots
from hf_alibi.reporting.plots import loss_by_position, loss_curve, passkey_map, perplexity_by_length, require_matplotlib

LENGTHS = [8, 16, 32]
PNG = b"\x89PNG\r\n\x1a\n"


def results(**perplexities):
    """Results with these perplexities at each length, of models and, as `model__context`, of their baselines."""
    lines = {(name.split("__")[0], (name.split("__")[1:] or ["full"])[0]): p for name, p in perplexities.items()}
    kinds = {model: "original" for model, _ in lines}
    labels = {context: f"label of {context}" for _, context in lines}
    return made_up_results(lines, lengths=LENGTHS, kinds=kinds, labels=labels)


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
    perplexity_by_length(results(alibi=(9, 8, 7), other=(9, 10, 11), other__cropped=(9, 9, 9)), tmp_path / "p.png")
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
    assert "stride an eighth of the length" in figure.axes[0].get_title()


def test_a_model_that_cannot_run_is_crossed_at_its_last_length(tmp_path, drawn):
    perplexity_by_length(results(table=(9, 8, None), none=(None, None, None)), tmp_path / "p.png")
    found = lines(drawn[0])
    cross = found["table (cannot run past 16)"]
    assert (cross.get_marker(), list(cross.get_xdata()), list(cross.get_ydata())) == ("x", [16], [8])
    assert "none (cannot run at these lengths)" in found


def test_baselines_share_the_colour_of_their_model_and_differ_in_style(tmp_path, drawn):
    names = ["cropped", "rope_linear", "rope_dynamic", "rope_yarn", "sliding_window"]
    made = results(a=(9, 8, 7), b=(9, 10, 11), b__rope_yarn=(8, 8, 8), **{f"a__{name}": (9, 9, 9) for name in names})
    perplexity_by_length(made, tmp_path / "p.png")
    found = lines(drawn[0])
    of_a = [found[label] for label in found if label == "a" or label.startswith("a, ")]
    assert len(of_a) == 6
    assert {line.get_color() for line in of_a} == {found["a"].get_color()} != {found["b"].get_color()}
    styles = [(line.get_linestyle(), line._unscaled_dash_pattern, line.get_marker()) for line in of_a]
    assert len(set(styles)) == 6
    assert found["b, label of rope_yarn"].get_color() == found["b"].get_color()


def test_bands_are_the_intervals_of_the_models(tmp_path, drawn):
    perplexity_by_length(results(a=(9, 8, 7), b=(9, None, None), a__rope_yarn=(5, 5, 5)), tmp_path / "p.png")
    bands = [band.get_paths()[0].vertices for band in drawn[0].axes[0].collections]
    assert len(bands) == 2
    assert (bands[0][:, 1].min(), bands[0][:, 1].max()) == pytest.approx((7 / 1.1, 9 * 1.1))


def test_passkeys_are_a_map_a_model(tmp_path, drawn):
    made = results(a=(9, 8, 7), b=(9, 10, 11), b__rope_yarn=(8, 8, 8))
    found = {("a", "full"): (10, 5, 0), ("b", "full"): (3, None, None), ("b", "rope_yarn"): (0, 0, 0)}
    passkey_map(with_keys(made, found, lengths=LENGTHS), tmp_path / "k.png")
    assert is_picture(tmp_path / "k.png")
    panels = {panel.get_title(): panel for panel in drawn[0].axes if panel.get_title()}
    assert list(panels) == ["a", "b", "b, label of rope_yarn"]
    shown = panels["a"].images[0].get_array()
    assert shown.tolist() == [[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]
    assert [text.get_text() for text in panels["b"].texts] == ["30%", "–", "–"] * 2
    assert [label.get_text() for label in panels["a"].get_yticklabels()] == ["0%", "100%"]


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


UNTAUGHT = {"teacher_name_or_path": None}


def test_loss_curve_draws_what_the_history_has(tmp_path, drawn):
    history = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0, "eval_loss": 4.5},
        {"step": 3, "runtime": 1.0},
    ]
    loss_curve({"history": history, "config": UNTAUGHT}, tmp_path / "c.png")
    assert is_picture(tmp_path / "c.png")
    found = lines(drawn[0])
    assert list(found["training"].get_xdata()) == [1, 2]
    assert list(found["held-out"].get_ydata()) == [4.5]
    loss_curve({"history": [], "config": UNTAUGHT}, tmp_path / "empty.png")
    assert is_picture(tmp_path / "empty.png")
    loss_curve({"history": history, "config": {"teacher_name_or_path": "teacher"}}, tmp_path / "taught.png")
    assert set(lines(drawn[-1])) == {"training, distance to the teacher", "held-out"}


def test_pictures_leave_the_global_state_of_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    loss_curve({"history": [{"step": 1, "loss": 5.0}], "config": UNTAUGHT}, tmp_path / "c.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    for draw in (require_matplotlib, lambda: loss_curve({"history": [], "config": UNTAUGHT}, tmp_path / "c.png")):
        with pytest.raises(InputError, match=r"pip install 'hf-alibi\[plots\]'"):
            draw()
    assert list(tmp_path.iterdir()) == []
