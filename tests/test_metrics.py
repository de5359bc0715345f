"""The metrics against numbers worked out by hand."""

import numpy as np
import pytest

from metrics import accuracy, confusion_matrix, mean_error, median_error, precision_recall_f1, rmse

# Four samples, three of class 0 and one of class 1; class 2 is neither present nor predicted.
TRUTH = [0, 0, 0, 1]
GUESS = [0, 0, 1, 1]
MATRIX = [[2, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_the_confusion_matrix_has_a_row_for_each_true_class():
    assert confusion_matrix(TRUTH, GUESS, 3).tolist() == MATRIX


def test_labels_of_a_small_integer_type_do_not_overflow():
    labels = np.uint8([20])  # 21 * 20 + 20 = 440 does not fit
    assert confusion_matrix(labels, labels, 21)[20, 20] == 1


def test_accuracy_is_the_share_on_the_diagonal():
    assert accuracy(MATRIX) == 0.75


def test_precision_recall_and_f1_of_each_class():
    counts = 40 * np.int8(MATRIX)  # the same shares; 2 * 80 does not fit into this type
    precision, recall, f1 = precision_recall_f1(counts)
    assert precision == pytest.approx([1, 0.5, 0])  # two of two predicted, one of two
    assert recall == pytest.approx([2 / 3, 1, 0])  # two of three present, one of one
    # 2 * 1 * 2/3 / (1 + 2/3) = 4/5 and 2 * 1/2 * 1 / (1/2 + 1) = 2/3
    assert f1 == pytest.approx([4 / 5, 2 / 3, 0])


def test_macro_is_the_plain_mean_over_the_classes():
    # (1 + 1/2 + 0) / 3, (2/3 + 1 + 0) / 3 and (4/5 + 2/3 + 0) / 3
    assert precision_recall_f1(MATRIX, "macro") == pytest.approx([0.5, 5 / 9, 22 / 45])


def test_weighted_counts_each_class_as_often_as_it_is_present():
    # (3 * 1 + 1/2) / 4, (3 * 2/3 + 1) / 4 and (3 * 4/5 + 2/3) / 4
    assert precision_recall_f1(MATRIX, "weighted") == pytest.approx([7 / 8, 0.75, 23 / 30])


Y_TRUE = [[1, 2], [3, 4]]
Y_PRED = [[2, 3], [8, 1]]  # absolute errors 1, 1, 5, 3


def test_mean_error_by_hand():
    assert mean_error(Y_TRUE, Y_PRED) == 2.5


def test_median_error_by_hand():
    assert median_error(Y_TRUE, Y_PRED) == 2


def test_rmse_by_hand():
    assert rmse(Y_TRUE, Y_PRED) == 3  # the root of (1 + 1 + 25 + 9) / 4


def test_errors_of_a_small_integer_type_do_not_wrap_around():
    values = np.uint8([1])
    assert mean_error(values, 2 * values) == 1  # in uint8, 1 - 2 is 255


@pytest.mark.parametrize("measure", [mean_error, median_error, rmse])
def test_values_that_are_empty_unlike_in_shape_or_not_finite_are_refused(measure):
    with pytest.raises(ValueError):
        measure([], [])
    with pytest.raises(ValueError):
        measure([1], [])
    with pytest.raises(ValueError):
        measure([1], [np.inf])


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ValueError):
        confusion_matrix([1], [-1], 3)  # would count as truth 0, guess 2
    with pytest.raises(ValueError):
        confusion_matrix([0], [3], 3)  # would count as truth 1, guess 0


def test_labels_that_are_no_integers_are_refused():
    with pytest.raises(ValueError):
        confusion_matrix([0.0], [0.0], 3)


@pytest.mark.parametrize("matrix", [[[0]], [[-1]], [[np.nan]], [[1, 2]]])
def test_a_matrix_that_is_not_square_or_holds_no_counts_is_refused(matrix):
    with pytest.raises(ValueError):
        accuracy(matrix)
    with pytest.raises(ValueError):
        precision_recall_f1(matrix)


def test_an_unknown_average_is_refused():
    with pytest.raises(ValueError):
        precision_recall_f1(MATRIX, "micro")
