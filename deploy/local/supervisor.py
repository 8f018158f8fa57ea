"""Keeps a part of the local stack running: a server or a service that ends unasked is started again."""

import asyncio
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn, Protocol

from deploy.local.servers.base import PortInUse, StartFailed


class Part(Protocol):
    """A server or a process."""

    name: str

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""

    async def start(self) -> None:
        """Start it, for the first time or again."""

    async def stop(self) -> None:
        """End it in an orderly way."""

    def kill(self) -> None:
        """End it at once."""

    async def wait(self) -> int:
        """Wait for its end and return the exit code."""

    def exit_report(self) -> str:
        """How it ended; the first line is a sentence."""

    def bound_log(self) -> None:
        """Set its log aside when that has become too long."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a part may end, and how long it is left alone then. All times in seconds."""

    ends: int
    within: float = 600.0
    first_pause: float = 0.5  # doubled by each further end
    longest_pause: float = 15.0

    def pause(self, ends: int) -> float:
        """Seconds to wait after so many ends, 1 or more."""
        return min(self.first_pause * 2.0 ** (ends - 1), self.longest_pause)


# A song on which workers die ends five of them before it is failed, and must not end the stack.
RUNNING = Patience(ends=10)
STARTING = Patience(ends=6)  # until the stack is ready: more likely nothing works, and the user waits for the reason


class Supervisor:
    """Starts a part again whenever it ends unasked, after a pause that grows, until its patience is over."""

    def __init__(self, part: Part, patience: Patience, final_codes: Collection[int] = ()) -> None:
        """`final_codes` are exit codes of ends that another start would not mend."""
        self.part = part
        self.patience = patience
        self._final_codes = final_codes
        self._ends: list[float] = []
        self._changing = asyncio.Lock()  # by one at a time: `watch` or `restart`

    async def restart(self) -> None:
        """Stop the part and start it again; this does not count as an end.

        Raises what the start raises. `watch`, if it runs, goes on trying then.
        """
        async with self._changing:
            await self.part.stop()
            await self.part.start()

    async def watch(self) -> NoReturn:
        """Start the part, which runs by now, again whenever it ends. Cancel this before the part is stopped for good.

        Raises `StartFailed` when it ended with a final code, or too often.
        """
        while True:
            code = await self.part.wait()
            async with self._changing:
                if self.part.running:  # `restart` ended it
                    continue
                report = self.part.exit_report()
                if code in self._final_codes:
                    raise StartFailed(report)
                while not self.part.running:
                    await asyncio.sleep(self._pause(report))
                    print(f"starting {self.part.name} again", flush=True)
                    try:
                        await self.part.start()
                    except (StartFailed, PortInUse) as error:
                        report = str(error)
                    except OSError as error:  # no memory or no process left for it
                        report = f"{self.part.name} cannot be started: {error.strerror}"

    def _pause(self, report: str) -> float:
        """Count an end that was just seen and say so; returns the seconds until the next start."""
        now = time.monotonic()
        self._ends = [end for end in self._ends if end > now - self.patience.within] + [now]
        count = len(self._ends)
        if count >= self.patience.ends:
            minutes = self.patience.within / 60
            raise StartFailed(f"{self.part.name} ended {count} times within {minutes:g} minutes; lastly, {report}")
        pause = self.patience.pause(count)
        sentence = report.partition("\n")[0].removesuffix("; its log ends:")
        print(f"{sentence}; starting it again in {pause:g} s", file=sys.stderr, flush=True)
        return pause
