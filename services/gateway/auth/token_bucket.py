"""How often something may be asked for."""

import math
from dataclasses import dataclass


@dataclass
class TokenBucket:
    """A token bucket. Times in seconds, of any clock that does not go back."""

    room: float
    a_second: float
    left: float
    at: float

    def wait(self, count: int, now: float) -> float:
        """Seconds until there will be so many: 0 where there are, infinite where there never will be."""
        self.left = min(self.room, self.left + (now - self.at) * self.a_second)
        self.at = now
        if count > self.room:
            return math.inf
        return 0.0 if self.left + 1e-9 >= count else (count - self.left) / self.a_second

    def take(self, count: int, now: float) -> float:
        """Take so many, or nothing and return the seconds until there will be enough."""
        if wait := self.wait(count, now):
            return wait
        self.left -= count
        return 0.0
