"""Means with standard errors, of one model or of the paired difference between two."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t


def clustered_mean(values: np.ndarray) -> tuple[float, float]:
    """The mean of `values` [windows, tokens] and its standard error, with windows as clusters.

    Tokens of one window are not independent; windows, cut from a shuffled text, nearly are. With windows of equal length
    the error is that of the mean of window means (Cameron & Miller 2015, "A practitioner's guide to cluster-robust
    inference", section II). It is NaN for fewer than two windows.
    """
    means = np.asarray(values, np.float64).mean(1)
    error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else float("nan")
    return float(means.mean()), float(error)


def paired_difference(ours_rows: ArrayLike, theirs_rows: ArrayLike) -> tuple[float, float, float]:
    """The mean of ours − theirs, its standard error, and the p value of the paired t-test that it is zero.

    ours_rows, theirs_rows: [seeds, windows] or [seeds, windows, tokens]; the same entry has the same seed and tokens.
    The variance is that over windows of the mean over seeds, plus that over seeds. Each is the variance of a mean. The
    test has windows − 1 degrees of freedom. Where nothing varies, p is 1 for equal models and 0 for others. With a
    single window the error and p are NaN.
    """
    difference = np.asarray(ours_rows, np.float64) - np.asarray(theirs_rows, np.float64)
    rows = difference.mean(tuple(range(2, difference.ndim)))  # over tokens, if there are any
    seeds, windows = rows.shape
    delta, over_windows = clustered_mean(rows.mean(0)[:, None])
    over_seeds = rows.mean(1).var(ddof=1) / seeds if seeds > 1 else 0.0
    stderr = float(np.hypot(over_windows, over_seeds**0.5))
    if not stderr:
        return delta, stderr, 1.0 - bool(delta)
    variance = rows.mean(0).var(ddof=1) / windows + over_seeds if windows > 1 else float("nan")
    p = 2 * t.sf(abs(delta) / variance**0.5, windows - 1)  # rounds as scipy's ttest_1samp does
    return delta, stderr, float(p)


def nll_difference(nll: np.ndarray, reference: np.ndarray) -> dict:
    """`paired_difference` of two models' nll [windows, tokens], under the keys of result.json."""
    return dict(zip(("delta_nll", "stderr", "p"), paired_difference(nll[None], reference[None]), strict=True))
