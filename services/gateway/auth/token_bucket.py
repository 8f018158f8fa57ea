"""A token bucket, which limits how often something may happen."""

import math
from dataclasses import dataclass


@dataclass
class TokenBucket:
    """Holds up to `room` tokens and gains `a_second`. Times are seconds of any clock that does not go back."""

    room: float
    a_second: float
    left: float
    at: float  # when `left` was right

    def wait(self, count: int, now: float) -> float:
        """Seconds until there are `count` tokens: 0 where there are, infinite where there never will be."""
        self.left = min(self.room, self.left + (now - self.at) * self.a_second)
        self.at = now
        if count > self.room:
            return math.inf
        return 0.0 if self.left + 1e-9 >= count else (count - self.left) / self.a_second

    def take(self, count: int, now: float) -> float:
        """Take `count` tokens and return 0, or take none and return the seconds until there are enough."""
        if wait := self.wait(count, now):
            return wait
        self.left -= count
        return 0.0

    def give_back(self, count: int) -> None:
        """Put tokens back that were taken and not used."""
        self.left = min(self.room, self.left + count)
