"""Signals by which code deep inside a stage ends its work on a song.

They are control flow and not errors: nothing has gone wrong, none reaches a user, and they are no `HeartMulaError`.
`shared.worker.outcome.classify` says what each does to the song.
"""


class Signal(Exception):
    """Base of the signals. Its message is for the log."""


class JobStopped(Signal):
    """The song was cancelled, ended, or belongs to another worker now. Nothing is left to do for it."""


class Paused(Signal):
    """The song leaves the device through no fault of its own: it goes back into the queue and continues from there."""
