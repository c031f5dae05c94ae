"""Which source each draw of a mixture comes from: a repeating sequence that keeps every source near its share."""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np

_MAX_PERIOD = 10_000  # weights are taken as fractions with at most this denominator


@functools.lru_cache(maxsize=16)
def chairman(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """(source of every draw of one period, how many draws of that source came before it, draws a source a period).

    Of the sources that would otherwise fall behind by a whole draw the one with the nearest deadline is taken; no
    source is ever further than one draw from its share. R. Tijdeman, "The chairman assignment problem", 1980.
    """
    fractions = [Fraction(weight).limit_denominator(_MAX_PERIOD) or Fraction(weight) for weight in weights]
    total = sum(fractions)
    shares = [fraction / total for fraction in fractions]
    period = functools.reduce(lambda a, b: a * b // np.gcd(a, b), (int(share.denominator) for share in shares))
    if period > _MAX_PERIOD:
        rounded = [max(1, round(share * _MAX_PERIOD)) for share in shares]
        period = sum(rounded)
        shares = [Fraction(count, period) for count in rounded]
    counts = [int(share * period) for share in shares]
    done, turns, ranks = [0] * len(counts), [], []
    slack = Fraction(1, max(1, 2 * len(counts) - 2))
    for draw in range(1, period + 1):
        due = [i for i, share in enumerate(shares) if share * draw - done[i] >= slack and done[i] < counts[i]]
        chosen = min(due, key=lambda i: ((1 - slack + done[i]) / shares[i], i))
        turns.append(chosen)
        ranks.append(done[chosen])
        done[chosen] += 1
    return np.array(turns), np.array(ranks), tuple(counts)
