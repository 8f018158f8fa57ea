"""Supervision of a part of the local stack: a server or service that ends unexpectedly is started again."""

import asyncio
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn, Protocol

from deploy.local.servers.base import PortInUse, StartFailed


class Part(Protocol):
    """A server or a process that a supervisor starts and stops."""

    name: str

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""

    async def start(self) -> None:
        """Start it, for the first time or again."""

    async def stop(self) -> None:
        """Stop it in an orderly way."""

    def kill(self) -> None:
        """Kill it."""

    async def wait(self) -> int:
        """Wait until it has ended and return the exit code."""

    def exit_report(self) -> str:
        """Describe how it ended; the first line is a sentence."""

    def rotate_log(self) -> None:
        """Move a log that has become too long to ``<name>.old``."""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often a part may end, and the delay before each restart. All times in seconds."""

    max_ends: int
    window: float = 600.0  # in which the ends are counted
    first_delay: float = 0.5  # doubled by each further end
    max_delay: float = 15.0

    def delay(self, ends: int) -> float:
        """Return the seconds to wait after a number of ends, 1 or more."""
        return min(self.first_delay * 2.0 ** (ends - 1), self.max_delay)


# A song that crashes workers ends five of them before it fails, and must not end the stack.
RUNNING = RestartPolicy(max_ends=10)
STARTING = RestartPolicy(max_ends=6)  # until the stack is ready: a failure is likely permanent, and the user waits


class Supervisor:
    """Restarts a part that ends unexpectedly, after a delay that grows, within the limits of a `RestartPolicy`."""

    def __init__(self, part: Part, policy: RestartPolicy, final_codes: Collection[int] = ()) -> None:
        """`final_codes` are exit codes after which the part is not restarted."""
        self.part = part
        self.policy = policy
        self._final_codes = final_codes
        self._ends: list[float] = []
        self._changing = asyncio.Lock()  # held by `watch` or by `restart` while it restarts the part

    async def restart(self) -> None:
        """Stop the part and start it again. This does not count as an end.

        Raises the errors of `Part.start`, after which `watch`, if it runs, keeps trying.
        """
        async with self._changing:
            await self.part.stop()
            await self.part.start()

    async def watch(self) -> NoReturn:
        """Restart the part, which has been started, whenever it ends. Cancel this before stopping the part.

        Raises `StartFailed` when it has ended with a final code, or too often.
        """
        while True:
            code = await self.part.wait()
            async with self._changing:
                if self.part.running:  # `restart` has stopped and started it
                    continue
                report = self.part.exit_report()
                if code in self._final_codes:
                    raise StartFailed(report)
                while not self.part.running:
                    await asyncio.sleep(self._count_end(report))
                    print(f"starting {self.part.name} again", flush=True)
                    try:
                        await self.part.start()
                    except (StartFailed, PortInUse) as error:
                        report = str(error)
                    except OSError as error:  # out of memory or processes
                        report = f"{self.part.name} cannot be started: {error.strerror}"

    def _count_end(self, report: str) -> float:
        """Count an end and report it; returns the seconds until the next start."""
        now = time.monotonic()
        self._ends = [end for end in self._ends if end > now - self.policy.window] + [now]
        count = len(self._ends)
        if count >= self.policy.max_ends:
            minutes = self.policy.window / 60
            raise StartFailed(f"{self.part.name} ended {count} times within {minutes:g} minutes; lastly, {report}")
        delay = self.policy.delay(count)
        sentence = report.partition("\n")[0].removesuffix("; its log ends:")
        print(f"{sentence}; starting it again in {delay:g} s", file=sys.stderr, flush=True)
        return delay
