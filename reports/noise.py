"""What is a difference and what is noise: mean and standard deviation over runs, when a lead counts, a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RULE = (
    "Bold: the best of its column, where its lead over the second exceeds the standard deviation of both, each over at "
    "least two runs."
)
EXACT = 18  # pairs up to which every assignment of signs is tried
DRAWS = 20_000  # assignments drawn (seed 0) above that


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1 in the denominator; None for n = 1) of `n` values in [0, 1]."""

    mean: float
    std: float | None
    n: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """None where there is no value, or one is missing: a mean over fewer runs would pass for the mean over all."""
    there = [v for v in values if v is not None and not np.isnan(v)]
    if not there or len(there) < len(values):
        return None
    return Spread(float(np.mean(there)), float(np.std(there, ddof=1)) if len(there) > 1 else None, len(there))


def clear_best(spreads: Sequence[Spread | None]) -> int | None:
    """The index of the largest mean, where `RULE` lets it pass for a win; None otherwise."""
    ranked = sorted((i for i, s in enumerate(spreads) if s), key=lambda i: -_known(spreads[i]).mean)
    if len(ranked) < 2:
        return None
    best, second = _known(spreads[ranked[0]]), _known(spreads[ranked[1]])
    if best.std is None or second.std is None:
        return None
    return ranked[0] if best.mean - second.mean > max(best.std, second.std) else None


def _known(one: Spread | None) -> Spread:
    assert one is not None
    return one


def sign_flip(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired permutation test (Fisher 1935): how often the mean difference is at least as far
    from 0 when each pair swaps its sides at random. Pairs without a difference count. None without pairs.

    Exact up to `EXACT` pairs, where the smallest value possible is 2 / 2^pairs; above that from `DRAWS` seeded draws,
    the observed one counted among them.
    """
    d = np.asarray(differences, float)
    if not d.size:
        return None
    observed = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # sums in another order differ in the last digits
    if d.size <= EXACT:
        sums = np.zeros(1)
        for one in d:
            sums = np.concatenate([sums + one, sums - one])
        return float(np.mean(np.abs(sums) >= observed))
    signs = np.random.default_rng(0).integers(0, 2, (DRAWS, d.size), dtype=np.int8) * 2 - 1
    return float((1 + np.count_nonzero(np.abs(signs @ d) >= observed)) / (1 + DRAWS))
