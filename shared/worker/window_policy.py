"""The policy of windows: decides when a song whose tokens are still being made is put into the queue for its audio.

A function of facts alone. Where models take turns, each such message costs a swap of models and pauses all songs that
are being made; so it is published only for somebody who listens.
"""

from dataclasses import dataclass
from enum import Enum, auto


class Publish(Enum):
    """When to publish the windows of a song that wait for decoding."""

    NOW = auto()
    ON_LEAVING = auto()  # when the song leaves the device for another reason
    NOT_YET = auto()


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The facts about a song whose tokens are being made."""

    waiting: int  # windows of which all tokens are there, and that are not decoded
    models_stay: bool  # both models stay on the device: nothing is swapped for a window
    dry_in: float | None  # seconds until a listener runs dry; None: there is no listener


def decide(now: Windows, away: float) -> Publish:
    """Decide for a song. `away` is how long the device was last away from this worker, in seconds."""
    if now.waiting <= 0:  # more may be decoded than is saved: of tokens that were lost and are made again
        return Publish.NOT_YET
    if now.models_stay:
        return Publish.NOW
    if now.dry_in is None:
        return Publish.NOT_YET
    return Publish.NOW if now.dry_in <= margin(away) else Publish.ON_LEAVING


def margin(away: float) -> float:
    """Seconds before a listener runs dry at which the device is handed over for it.

    Twice what the last handover took, which has as many windows again in it, and a moment for the next to be noticed.
    """
    return 2 * away + 3.0
