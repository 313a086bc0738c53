"""Waiting between attempts: exponential, with jitter so that many daemons do not come back in step. Pure."""

import random


class Backoff:
    """Delays in seconds, from `first` doubling up to `longest`, each between half of that and all of it."""

    def __init__(self, first: float = 0.2, longest: float = 15.0, chance: random.Random | None = None) -> None:
        self._first = first
        self._longest = longest
        self._chance = chance or random.Random()  # noqa: S311 - jitter, not a secret
        self.attempts = 0

    def next(self) -> float:
        """The delay before the next attempt."""
        # The exponent is bounded: after days of attempts 2 ** n would not fit a float.
        ceiling = min(self._longest, self._first * 2.0 ** min(self.attempts, 32))
        self.attempts += 1
        return ceiling * self._chance.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Call after a success: the next delay is the first again."""
        self.attempts = 0
