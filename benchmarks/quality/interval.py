"""Means over seeds, with their interval."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

# Student's t, two-sided 95 %, by degrees of freedom from 1; beyond them the normal distribution's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
_NORMAL95 = 1.96


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; infinite for a single value."""
    if len(values) < 2:
        return fmean(values), math.inf
    freedom = len(values) - 1
    t = _T95[freedom - 1] if freedom <= len(_T95) else _NORMAL95
    return fmean(values), t * stdev(values) / math.sqrt(len(values))
