"""Figures of a sample with their 95 % intervals, as plain dictionaries for JSON. What is undefined is None."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

import numpy as np

Figure = dict[str, float | int | None]
"""mean, low and high: the estimate and its 95 % interval; num: of how many values. Some have further keys."""

_Z = NormalDist().inv_cdf(0.975)


def share(hits: Sequence[bool]) -> Figure:
    """The share of hits, with Wilson's interval (1927), which is honest near 0 and 1 too."""
    num = len(hits)
    if num == 0:
        return _figure(None, None, None, 0)
    mean = sum(hits) / num
    centre = (mean + _Z**2 / (2 * num)) / (1 + _Z**2 / num)
    half = _Z / (1 + _Z**2 / num) * math.sqrt(mean * (1 - mean) / num + _Z**2 / (4 * num**2))
    # At 0 and 1 the interval ends there, but for rounding.
    return _figure(mean, min(mean, max(centre - half, 0.0)), max(mean, min(centre + half, 1.0)), num)


def average(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> Figure:
    """The mean, with the normal interval of its standard error, which takes two values.

    least, most: what the mean can be, where the interval ends.
    """
    num = len(values)
    if num < 2:
        return _figure(values[0] if values else None, None, None, num)
    mean, half = fmean(values), _Z * stdev(values) / math.sqrt(num)
    return _figure(mean, max(mean - half, least), min(mean + half, most), num)


def spread(values: Sequence[float]) -> Figure:
    """`average` of distances, with the median and the 95th percentile."""
    median, high = np.quantile(values, (0.5, 0.95)).tolist() if values else (None, None)
    return average(values, 0) | {"median": median, "p95": high}


def _figure(mean: float | None, low: float | None, high: float | None, num: int) -> Figure:
    return {"mean": mean, "low": low, "high": high, "num": num}
