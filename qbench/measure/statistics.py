"""Means with standard errors, of one model or of the difference between two on the same tokens."""

import numpy as np
from scipy.stats import ttest_1samp


def clustered_mean(values: np.ndarray) -> tuple[float, float]:
    """Mean of `values` [windows, tokens] and its standard error, the windows taken as clusters.

    Tokens of one window are not independent; windows, cut from a shuffled text, nearly are. With windows of equal length
    the error is that of the mean of window means (Cameron & Miller 2015, "A practitioner's guide to cluster-robust
    inference", section II). NaN for the error of fewer than two windows.
    """
    means = np.asarray(values, np.float64).mean(1)
    error = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else float("nan")
    return float(means.mean()), float(error)


def paired_mean(values: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """The mean of values − reference, both [windows, tokens] of the same tokens, its standard error, and the p value of
    the paired t-test over windows that it is zero (1 where nothing differs, NaN for fewer than two windows)."""
    difference = np.asarray(values, np.float64) - reference
    delta, stderr = clustered_mean(difference)
    p = ttest_1samp(difference.mean(1), 0).pvalue if stderr else 1.0
    return delta, stderr, float(p)


def paired(values: np.ndarray, reference: np.ndarray) -> dict:
    """`paired_mean` of negative log-likelihoods, as a result tells it."""
    return dict(zip(("delta_nll", "stderr", "p"), paired_mean(values, reference), strict=True))
