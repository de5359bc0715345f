"""The pictures: what is drawn, names without a Chinese font."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager

from support import plots


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are drawn, but not written to files."""
    monkeypatch.setattr(plots, "save", lambda figure, path: None)


def test_learning_curves_begin_with_epoch_1(unsaved):
    panels = {"F1": {"RNN": [5, 6]}}
    figure = plots.draw_curves("a.png", panels)
    line = figure.axes[0].get_lines()[0]
    assert line.get_xydata().tolist() == [[1, 5], [2, 6]]
    assert line.get_label() == "RNN"


def test_a_confusion_matrix_has_the_truth_down_coloured_by_its_shares(unsaved):
    matrix = np.array([[1, 3], [0, 0]])
    figure = plots.draw_confusion("a.png", matrix, ["b", "c"], title="")
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.25, 0.75], [0, 0]]
    count = axes.texts[1]
    assert count.get_text() == "3"
    assert count.get_position() == (1, 0)  # column, row


def test_without_a_chinese_font_classes_have_english_names(monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    labels, _ = plots.label_font(["书籍", "a$b$", "别的"])
    assert labels == ["books", r"a\$b\$", "class 3"]  # between bare $ stands a formula


def test_a_forecast_lies_over_the_last_steps_of_the_truth(unsaved):
    stamps = pd.date_range("2009-01-01", periods=5)
    forecast = np.array([8, 10])
    windows = [(stamps, np.arange(5), forecast)]
    band = np.zeros((2, 2))
    figure = plots.draw_forecasts("a.png", windows, band, steps_a_day=1, title="")
    axes = figure.axes[0]
    line = axes.get_lines()[1]
    forecast_stamps = line.get_xdata(orig=True)
    assert list(forecast_stamps) == list(stamps[3:])
    assert list(line.get_ydata()) == [8, 10]
    assert "mean error 5.50" in axes.get_title()  # of 8 - 3 and 10 - 4


def test_errors_by_hours_ahead_are_means_and_medians(unsaved):
    errors = {"LSTM": np.array([[1], [2], [6]])}  # of three windows
    figure = plots.draw_lead_time("a.png", [24], errors, title="")
    means = figure.axes[0].get_lines()[0]
    medians = figure.axes[1].get_lines()[0]
    assert means.get_xydata().tolist() == [[24, 3]]
    assert medians.get_xydata().tolist() == [[24, 2]]


def test_a_picture_is_a_png_file(tmp_path):
    path = tmp_path / "a.png"
    plots.save(plots.new_figure(1, 1), path)
    assert path.read_bytes().startswith(b"\x89PNG")
