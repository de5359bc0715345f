"""The measures that both tasks report, worked out by hand with NumPy, without scikit-learn."""

import numpy as np


def _checked(y_true, y_pred, kind):
    """Both arguments as arrays; ValueError if they are empty, unlike in shape, or not finite."""
    y_true = np.asarray(y_true)
    y_pred = np.asarray(y_pred)
    if y_true.shape != y_pred.shape or y_true.size == 0:
        shapes = f"{y_true.shape} and {y_pred.shape}"
        raise ValueError(f"y_true and y_pred are empty or differ in shape: {shapes}")
    for values in (y_true, y_pred):
        if not np.issubdtype(values.dtype, kind) or not np.isfinite(values).all():
            raise ValueError(f"y_true and y_pred must hold finite values of type {kind.__name__}")
    return y_true, y_pred


def confusion_matrix(y_true, y_pred, num_classes):
    """Count how often class i was taken for class j: (K, K) int64, rows the truth.

    y_true, y_pred: (N,) integers in 0..K-1; num_classes: K.
    Raises ValueError for arrays unlike in shape, empty ones, and labels outside 0..K-1.
    """
    y_true, y_pred = _checked(y_true, y_pred, np.integer)
    if y_true.ndim != 1:
        raise ValueError(f"labels must be a vector, not of shape {y_true.shape}")
    lowest = min(y_true.min(), y_pred.min())
    highest = max(y_true.max(), y_pred.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}")
    # The pair (truth, prediction) is one number in base K, so one count of N numbers fills the
    # matrix. int64 first: K * truth would overflow a small integer type.
    pairs = num_classes * y_true.astype(np.int64) + y_pred.astype(np.int64)
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _checked_matrix(matrix):
    """The confusion matrix as an array; ValueError if it is no square table of counts."""
    matrix = np.asarray(matrix, dtype=np.float64)  # 2 TP would overflow a small integer type
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a confusion matrix is square, this one has shape {matrix.shape}")
    if not np.isfinite(matrix).all() or (matrix < 0).any() or matrix.sum() == 0:
        raise ValueError("a confusion matrix holds counts, not all of them zero")
    return matrix


def accuracy(matrix):
    """Share of the samples on the diagonal of a (K, K) confusion matrix.

    Raises ValueError for a matrix that is not square or holds no counts.
    """
    matrix = _checked_matrix(matrix)
    return float(np.trace(matrix) / matrix.sum())


def precision_recall_f1(matrix, average=None):
    """Precision, recall and F1 of each class, or their average, from a (K, K) confusion matrix.

    For class k with TP = matrix[k, k]:  precision = TP / column sum,  recall = TP / row sum,
    F1 = 2 * precision * recall / (precision + recall) = 2 TP / (row sum + column sum).
    A class that is never predicted or never present scores 0, not NaN.
    average: None gives three (K,) float arrays; "macro" three floats, the plain means over the
    classes (of F1 too: it is not the F1 of the mean precision and recall); "weighted" three floats,
    the means weighted by the classes' row sums.
    Raises ValueError for another average, and for a matrix that is not square or holds no counts.
    """
    matrix = _checked_matrix(matrix)
    hits = np.diagonal(matrix)  # TP of each class
    support = matrix.sum(axis=1)  # how often it is present
    predicted = matrix.sum(axis=0)  # how often it is predicted
    precision = _quotient(hits, predicted)
    recall = _quotient(hits, support)
    f1 = _quotient(2 * hits, support + predicted)
    scores = (precision, recall, f1)
    if average is None:
        return scores
    if average == "macro":
        return tuple(float(score.mean()) for score in scores)
    if average == "weighted":
        return tuple(float(score @ support / support.sum()) for score in scores)
    raise ValueError(f'average must be None, "macro" or "weighted", not {average!r}')


def _quotient(numerator, denominator):
    """numerator / denominator, element by element; 0 where the denominator is 0."""
    quotient = np.zeros(len(numerator))
    return np.divide(numerator, denominator, out=quotient, where=denominator > 0)


def _absolute_errors(y_true, y_pred):
    """|y_true - y_pred| in float64: differences of small or unsigned integers would wrap around."""
    y_true, y_pred = _checked(y_true, y_pred, np.number)
    return np.abs(y_true.astype(np.float64) - y_pred.astype(np.float64))


def mean_error(y_true, y_pred):
    """Mean absolute error over all elements, in the arrays' unit.

    Raises ValueError for arrays that are empty, unlike in shape or not finite.
    """
    return float(_absolute_errors(y_true, y_pred).mean())


def median_error(y_true, y_pred):
    """Median absolute error over all elements, in the arrays' unit.

    Raises ValueError for arrays that are empty, unlike in shape or not finite.
    """
    return float(np.median(_absolute_errors(y_true, y_pred)))


def rmse(y_true, y_pred):
    """Root of the mean squared error, in the arrays' unit.

    Raises ValueError for arrays that are empty, unlike in shape or not finite.
    """
    return float(np.sqrt(np.mean(_absolute_errors(y_true, y_pred) ** 2)))
