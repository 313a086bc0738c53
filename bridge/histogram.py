"""Counts of observations by size, cheap enough for the data path. Pure."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """How many observations were at most so large. `bounds` are the upper ends of the buckets, ascending."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.total = 0.0
        # The last one is for what is larger than every bound.
        self._counts = [0] * (len(bounds) + 1)

    @property
    def cumulative(self) -> list[int]:
        """For each bound, and then for infinity, how many observations were no larger."""
        return list(accumulate(self._counts))

    def observe(self, value: float) -> None:
        """Counts one observation."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_since(self, moments: Sequence[int], now: int, scale: int, weight: int = 1) -> None:
        """Counts how long ago each of the moments was, divided by `scale`; what lies ahead of `now` was just now.

        `moments` ascend, each stands for `weight` of its like. Only the bounds are looked up: faster than one by one.
        """
        later = len(moments)
        for bucket, bound in enumerate(self.bounds):
            first = bisect_left(moments, now - bound * scale)
            self._counts[bucket] += (later - first) * weight
            later = first
        self._counts[-1] += later * weight
        past = bisect_right(moments, now)
        self.total += (past * now - sum(moments[:past])) / scale * weight
