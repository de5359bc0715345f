"""The metrics against numbers counted by hand."""

import numpy as np
import pytest

from metrics import accuracy, confusion_matrix, mean_error, median_error, precision_recall_f1, rmse

# Ten samples of four classes. By hand:       predicted
#   class 0: 4 samples, 3 hit, 1 taken for 1   3 1 0 0
#   class 1: 3 samples, 2 hit, 1 taken for 0   1 2 0 0
#   class 2: 3 samples, never predicted        2 1 0 0
#   class 3: no samples, never predicted       0 0 0 0
TRUTH = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
GUESS = [0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
MATRIX = np.array([[3, 1, 0, 0], [1, 2, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0]])


def test_confusion_matrix_and_accuracy_by_hand():
    matrix = confusion_matrix(TRUTH, GUESS, 4)
    assert matrix.dtype == np.int64
    assert np.array_equal(matrix, MATRIX)
    assert accuracy(matrix) == 0.5  # (3 + 2) / 10


def test_scores_and_their_averages_by_hand():
    precision, recall, f1 = precision_recall_f1(MATRIX)
    assert precision == pytest.approx([3 / 6, 2 / 4, 0, 0])
    assert recall == pytest.approx([3 / 4, 2 / 3, 0, 0])
    # Class 0: 2 * 1/2 * 3/4 / (5/4) = 3/5; class 1: 2 * 1/2 * 2/3 / (7/6) = 4/7
    assert f1 == pytest.approx([3 / 5, 4 / 7, 0, 0])
    assert precision_recall_f1(MATRIX, "macro") == pytest.approx(
        [(1 / 2 + 1 / 2) / 4, (3 / 4 + 2 / 3) / 4, (3 / 5 + 4 / 7) / 4]
    )
    # Weights 4/10, 3/10, 3/10, 0
    assert precision_recall_f1(MATRIX, "weighted") == pytest.approx(
        [0.4 / 2 + 0.3 / 2, 0.4 * 3 / 4 + 0.3 * 2 / 3, 0.4 * 3 / 5 + 0.3 * 4 / 7]
    )


def test_errors_by_hand():
    truth, forecast = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0, 2.0], [0.0, 10.0]])
    assert mean_error(truth, forecast) == 2.5  # absolute errors 1, 0, 3, 6
    assert median_error(truth, forecast) == 2.0
    assert rmse(truth, forecast) == pytest.approx(np.sqrt(46 / 4))


def test_small_integer_types_do_not_overflow():
    labels = np.full(3, 20, np.uint8)  # 20 * 21 + 20 = 440 does not fit
    assert confusion_matrix(labels, labels, 21)[20, 20] == 3
    assert mean_error(np.array([1, 2], np.uint8), np.array([2, 4], np.uint8)) == 1.5


@pytest.mark.parametrize("measure", [mean_error, median_error, rmse])
@pytest.mark.parametrize(
    ("truth", "forecast"),
    [([], []), ([[1.0, 2.0]], [[1.0], [2.0]]), ([np.nan], [1.0]), ([1.0], [np.inf])],
)
def test_unfit_errors_are_refused(measure, truth, forecast):
    with pytest.raises(ValueError, match=r"y_true|y_pred"):
        measure(truth, forecast)


@pytest.mark.parametrize(
    ("truth", "guess"), [([], []), ([0, 1], [0]), ([[0]], [[0]]), ([0.0, 1.0], [0.0, 1.0])]
)
def test_unfit_labels_are_refused(truth, guess):
    with pytest.raises(ValueError):
        confusion_matrix(truth, guess, 4)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_labels_outside_the_classes_are_refused(wrong):
    # Unrefused, truth 1 and guess -1 would count as 0 and 3, truth 0 and guess 4 as 1 and 0.
    for truth, guess in ([1, 0], [wrong, 0]), ([0, wrong], [1, 1]):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            confusion_matrix(truth, guess, 4)


@pytest.mark.parametrize("matrix", [np.zeros((2, 2)), np.ones((2, 3)), [[1, -1], [0, 1]]])
def test_unfit_matrices_and_averages_are_refused(matrix):
    for unfit in (lambda: accuracy(matrix), lambda: precision_recall_f1(matrix)):
        with pytest.raises(ValueError, match="confusion matrix"):
            unfit()
    with pytest.raises(ValueError, match="micro"):
        precision_recall_f1(MATRIX, "micro")
