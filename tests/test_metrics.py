"""The metrics against numbers counted by hand."""

import numpy as np
import pytest

from metrics import accuracy, confusion_matrix, mean_error, median_error, precision_recall_f1, rmse

# Ten samples of four classes; class 2 is never predicted, class 3 neither predicted nor present.
TRUTH = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
GUESS = [0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
MATRIX = [[3, 1, 0, 0], [1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0]]


def test_the_confusion_matrix_and_its_scores_by_hand():
    assert confusion_matrix(TRUTH, GUESS, 4).tolist() == MATRIX
    labels = np.full(3, 20, np.uint8)  # 20 * 21 + 20 = 440 does not fit
    assert confusion_matrix(labels, labels, 21)[20, 20] == 3
    assert precision_recall_f1(np.int8([[100]]))[2] == 1  # 2 * 100 does not fit
    assert accuracy(MATRIX) == 0.5  # (3 + 2) / 10
    precision, recall, f1 = precision_recall_f1(MATRIX)
    assert precision == pytest.approx([3 / 6, 2 / 4, 0, 0])
    assert recall == pytest.approx([3 / 4, 2 / 3, 0, 0])
    # Class 0: 2 * 1/2 * 3/4 / (5/4) = 3/5; class 1: 2 * 1/2 * 2/3 / (7/6) = 4/7
    assert f1 == pytest.approx([3 / 5, 4 / 7, 0, 0])
    macro = [(1 / 2 + 1 / 2) / 4, (3 / 4 + 2 / 3) / 4, (3 / 5 + 4 / 7) / 4]
    assert precision_recall_f1(MATRIX, "macro") == pytest.approx(macro)
    weighted = [0.4 / 2 + 0.3 / 2, 0.4 * 3 / 4 + 0.3 * 2 / 3, 0.4 * 3 / 5 + 0.3 * 4 / 7]
    assert precision_recall_f1(MATRIX, "weighted") == pytest.approx(weighted)


def test_errors_by_hand():
    truth, forecast = [[1.0, 2.0], [3.0, 4.0]], [[2.0, 2.0], [0.0, 10.0]]
    assert mean_error(truth, forecast) == 2.5  # absolute errors 1, 0, 3, 6
    assert median_error(truth, forecast) == 2.0
    assert rmse(truth, forecast) == pytest.approx(np.sqrt(46 / 4))
    assert mean_error(np.uint8([1, 2]), np.uint8([2, 4])) == 1.5  # in uint8, 1 - 2 is 255


def test_unfit_arguments_are_refused():
    errors = [([], []), ([[1, 2]], [[1], [2]]), ([1, np.nan], [1, 1]), ([1], [np.inf])]
    # Unrefused, truth 1 and guess -1 would count as 0 and 3, truth 0 and guess 4 as 1 and 0.
    labels = [([[0]], [[0]]), ([0.0], [0.0]), ([1], [-1]), ([-1], [1]), ([0], [4]), ([4], [0])]
    matrices = [[[0]], [[np.nan]], [[1, -1], [0, 1]], np.ones((2, 3)), np.ones((2, 2, 2))]
    calls = [(measure, *pair) for measure in (mean_error, median_error, rmse) for pair in errors]
    calls += [(confusion_matrix, *pair, 4) for pair in labels]
    calls += [(score, matrix) for score in (accuracy, precision_recall_f1) for matrix in matrices]
    calls.append((precision_recall_f1, MATRIX, "micro"))
    for function, *arguments in calls:
        with pytest.raises(ValueError, match=r"y_true|y_pred|labels|confusion matrix|micro"):
            function(*arguments)
