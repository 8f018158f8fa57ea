"""The turn policy: decides whether a worker continues, takes another song, or releases the device.

Swapping models is expensive, so a turn is a slice of time and not a song; and a song that has its tokens must not wait
for all others to get theirs, so a slice ends. Somebody who listens to a song while it is made cannot wait for the end
of a slice, so a turn may end early for them. All decisions are functions of numbers alone.
"""

from dataclasses import dataclass
from enum import Enum, auto

from shared.schema.request import Priority
from shared.worker.window_policy import margin

HIGH_IN_A_ROW = 4  # songs of the high lane for each one of the normal lane, while both wait


class Decision(Enum):
    """What a worker does next."""

    GO_ON = auto()  # with the songs in hand
    ADMIT = auto()  # take another song
    YIELD = auto()  # pause the songs in hand and leave the device


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The facts that a worker with the device decides by."""

    running: int  # songs in hand
    slots: int  # songs that it can have in hand
    waiting: bool  # whether more songs wait for this stage
    held: float  # seconds since the turn began
    wanted: float | None  # seconds for which the other role has waited for the device; None: it does not
    dry_in: float | None = None  # seconds until a listener runs dry whom the other role can help; None: there is none
    away: float = 0.0  # seconds for which the device was last away from this worker, see `TurnPolicy.away`


@dataclass(frozen=True)
class TurnPolicy:
    """The rule of turns.

    While no other worker waits, a turn goes on for as long as there is work. Otherwise it takes new songs until its
    slice is over, then has a quarter of a slice to finish what it has. So the other role waits for a slice at most,
    and no turn is shorter than a slice unless its work runs out or a listener runs dry.

    For a listener a turn ends as soon as it has lasted for half the time for which the device was away before. So a
    third of the time is left at least, however many listeners come and whatever swaps take. Were it as long as the
    device was away, eight listeners on a card would run dry: their windows take longer than the frames between them.
    """

    slice: float  # seconds

    def decide(self, now: Situation) -> Decision:
        """Decide for a situation."""
        over = now.wanted is not None and now.held >= self.slice
        if over and now.wanted is not None and now.wanted >= self.slice / 4:
            return Decision.YIELD
        if now.wanted is not None and self.may_be_cut(now.held, now.away) and _pressing(now):
            return Decision.YIELD
        if now.waiting and now.running < now.slots and not over:
            return Decision.ADMIT
        return Decision.GO_ON if now.running else Decision.YIELD

    def may_be_cut(self, held: float, away: float) -> bool:
        """Whether a turn that has lasted for `held` seconds may end for a listener."""
        return held >= self.away(away) / 2

    def away(self, seconds: float) -> float:
        """The time for which the device was away, as far as it counts: a turn of the other role may last long."""
        return min(seconds, self.slice / 4)


def _pressing(now: Situation) -> bool:
    return now.dry_in is not None and now.dry_in <= margin(now.away)


def lanes(highs_in_a_row: int) -> tuple[Priority, Priority]:
    """Order in which to look for the next song, after a number of songs of the high lane in a row."""
    return ("normal", "high") if highs_in_a_row >= HIGH_IN_A_ROW else ("high", "normal")
