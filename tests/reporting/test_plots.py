"""Pictures hold what they should: looked at through what was drawn and through the file."""

import sys
from functools import partial

import pytest

from helpers.made_up import made_up_results, with_keys
from hf_alibi.errors import InputError
from hf_alibi.reporting import plots
from hf_alibi.reporting.plots import loss_by_position, loss_curve, perplexity_by_length, probe_map, require_matplotlib

LENGTHS = [8, 16, 32]
PNG = b"\x89PNG\r\n\x1a\n"


def results(**perplexities):
    """Results with these perplexities at each length, of models and, as `model__context`, of their baselines."""
    lines = {(name.split("__")[0], (name.split("__")[1:] or ["full"])[0]): p for name, p in perplexities.items()}
    kinds = {model: "original" for model, _ in lines}
    labels = {context: f"label of {context}" for _, context in lines}
    return made_up_results(lines, lengths=LENGTHS, kinds=kinds, labels=labels)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw a picture, check its file, and return the figure."""
    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or save(figure, path))

    def check(function, data):
        path = tmp_path / "picture.png"
        function(data, path)
        assert [found.name for found in tmp_path.iterdir()] == ["picture.png"]
        assert path.read_bytes().startswith(PNG)
        assert path.stat().st_size > 5000
        return figures[-1]

    return check


def lines(figure):
    """Label to line, of the first panel."""
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_perplexity_has_a_panel_a_protocol_and_a_line_a_model(draw):
    figure = draw(perplexity_by_length, results(alibi=(9, 8, 7), other=(9, 10, 11), other__cropped=(9, 9, 9)))
    assert len(figure.axes) == 2
    found = lines(figure)
    assert list(found["alibi"].get_ydata()) == [9, 8, 7]
    assert list(found["other"].get_xdata()) == LENGTHS
    assert found["other"].get_linestyle() == "-"
    assert found["other, cropped to 8"].get_linestyle() == "--"
    assert found["other, cropped to 8"].get_color() == found["other"].get_color() != found["alibi"].get_color()
    assert set(found["training length, 8"].get_xdata()) == {8}
    assert "stride an eighth of the length" in figure.axes[0].get_title()


def test_a_model_that_cannot_run_is_crossed_at_its_last_length(draw):
    found = lines(draw(perplexity_by_length, results(table=(9, 8, None), none=(None, None, None))))
    cross = found["table (cannot run past 16)"]
    assert (cross.get_marker(), list(cross.get_xdata()), list(cross.get_ydata())) == ("x", [16], [8])
    assert "none (cannot run at these lengths)" in found


def test_baselines_share_the_colour_of_their_model_and_differ_in_style(draw):
    names = ["cropped", "rope_linear", "rope_dynamic", "rope_yarn", "sliding_window"]
    made = results(a=(9, 8, 7), b=(9, 10, 11), b__rope_yarn=(8, 8, 8), **{f"a__{name}": (9, 9, 9) for name in names})
    found = lines(draw(perplexity_by_length, made))
    of_a = [found[label] for label in found if label == "a" or label.startswith("a, ")]
    assert len(of_a) == 6
    assert {line.get_color() for line in of_a} == {found["a"].get_color()} != {found["b"].get_color()}
    styles = [(line.get_linestyle(), line._unscaled_dash_pattern, line.get_marker()) for line in of_a]
    assert len(set(styles)) == 6
    assert found["b, label of rope_yarn"].get_color() == found["b"].get_color()


def test_bands_are_the_intervals_of_the_models(draw):
    figure = draw(perplexity_by_length, results(a=(9, 8, 7), b=(9, None, None), a__rope_yarn=(5, 5, 5)))
    bands = [band.get_paths()[0].vertices for band in figure.axes[0].collections]
    assert len(bands) == 2
    assert (bands[0][:, 1].min(), bands[0][:, 1].max()) == pytest.approx((7 / 1.1, 9 * 1.1))


def test_what_is_found_is_a_map_a_model(draw):
    made = results(a=(9, 8, 7), b=(9, 10, 11), b__rope_yarn=(8, 8, 8))
    found = {("a", "full"): (10, 5, 0), ("b", "full"): (3, None, None), ("b", "rope_yarn"): (0, 0, 0)}
    figure = draw(partial(probe_map, task="passkey"), with_keys(made, found, lengths=LENGTHS))
    panels = {panel.get_title(): panel for panel in figure.axes if panel.get_title()}
    assert list(panels) == ["a", "b", "b, label of rope_yarn"]
    shown = panels["a"].images[0].get_array()
    assert shown.tolist() == [[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]
    assert [text.get_text() for text in panels["b"].texts] == ["30%", "–", "–"] * 2
    assert [label.get_text() for label in panels["a"].get_yticklabels()] == ["0%", "100%"]


@pytest.mark.parametrize(("last", "scale"), [(11.0, "linear"), (4000.0, "log")])
def test_values_far_apart_get_a_logarithmic_axis(draw, last, scale):
    figure = draw(perplexity_by_length, results(a=(9, 8, 7), b=(9, 10, last)))
    assert figure.axes[0].get_yscale() == scale


def test_loss_by_position_puts_bins_at_their_middle(draw):
    line = lines(draw(loss_by_position, results(alibi=(9, 8, 7))))["alibi (2 windows of 32 tokens)"]
    assert list(line.get_xdata()) == pytest.approx([1, (2 * 4) ** 0.5, (5 * 32) ** 0.5])
    assert list(line.get_ydata()) == [3.0, 3.0, 3.0]


def test_loss_by_position_without_any_curve_is_still_a_picture(draw):
    draw(loss_by_position, {**results(a=(None, None, None)), "position_loss": {}})


UNTAUGHT = {"teacher_name_or_path": None}


def test_loss_curve_draws_what_the_history_has(draw):
    history = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0, "eval_loss": 4.5}, {"step": 3, "runtime": 1.0}]
    found = lines(draw(loss_curve, {"history": history, "config": UNTAUGHT}))
    assert list(found["training"].get_xdata()) == [1, 2]
    assert list(found["held-out"].get_ydata()) == [4.5]
    draw(loss_curve, {"history": [], "config": UNTAUGHT})
    taught = draw(loss_curve, {"history": history, "config": {"teacher_name_or_path": "teacher"}})
    assert set(lines(taught)) == {"training, distance to the teacher", "held-out"}


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
