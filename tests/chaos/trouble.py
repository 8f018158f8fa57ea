"""Faults of single songs: cancelled, asked for twice, queued twice, their tokens deleted or damaged."""

import asyncio
from collections import Counter
from collections.abc import Callable

import msgspec
import nats
from nats.js.errors import APIError

from shared.errors import ObjectError, Unavailable
from shared.nats.subjects import TENANT, token_subject
from shared.schema.job import TokenJob
from shared.schema.request import Priority
from tests.chaos.outside import Outside
from tests.chaos.songs import Client, Taken

_PATIENCE = 300.0  # for a song to reach a stage
_LOOK_SECONDS = 0.02


class Trouble:
    """Does to each song what its wish says."""

    def __init__(self, client: Client, outside: Outside, tell: Callable[[str], None]) -> None:
        self.done: Counter[str] = Counter()
        self.broken: list[str] = []
        self._client, self._outside, self._tell = client, outside, tell

    async def make(self, song: Taken) -> None:
        """Returns when it is done, or when the song has ended before."""
        match song.wish.fault:
            case "cancel":
                await self._cancel(song)
            case "tokens-deleted" | "tokens-corrupted":
                await self._damage(song)
            case "duplicate-submission":
                await self._ask_again(song)
            case "duplicate-job":
                await self._queue_again(song)
            case "poison":
                self._happens(song)

    def _happens(self, song: Taken) -> None:
        job = self._outside.job(song.job_id)
        fault = str(song.wish.fault)
        self.done[fault] += 1
        self._tell(f"{fault}: {song.wish.name} ({song.job_id}) while {job.status if job else 'unknown'}")

    async def _at_stage(self, song: Taken) -> bool:
        """Wait for the moment that the wish names; whether the song still lives."""
        outside, wish = self._outside, song.wish

        def reached() -> bool:
            job = outside.job(song.job_id)
            return job is not None and wish.stage in ("queued", job.status)

        await outside.until(lambda: reached() or outside.ended(song.job_id), _PATIENCE)
        await asyncio.sleep(wish.delay)
        return not outside.ended(song.job_id)

    async def _cancel(self, song: Taken) -> None:
        if await self._at_stage(song):
            self._happens(song)
            answer = await self._client.ask("DELETE", f"/generate/{song.job_id}")
            if answer.status_code not in (200, 409):  # 409: it was completed meanwhile
                self.broken.append(f"{song.wish.name}: DELETE answered {answer.status_code} {answer.text}")

    async def _damage(self, song: Taken) -> None:
        """As soon as there are tokens, in the stage that the wish names or later."""
        outside, prefix = self._outside, f"tokens/{song.job_id}/"
        await self._at_stage(song)
        while not outside.ended(song.job_id):
            try:
                for key in await outside.keys(prefix):
                    if song.wish.fault == "tokens-corrupted":
                        data = bytearray(await outside.store.get(key))
                        data[-1 - song.wish.number % (len(data) // 2)] ^= 1 << song.wish.number % 8
                        await outside.store.put(key, bytes(data))
                    else:
                        await outside.store.delete(key)
                    self._happens(song)
                    return
            except (Unavailable, ObjectError):
                pass
            await asyncio.sleep(_LOOK_SECONDS)

    async def _ask_again(self, song: Taken) -> None:
        await asyncio.sleep(song.wish.delay)
        again = await self._client.take(song.wish)
        self._happens(song)
        if again != song.job_id:
            self.broken.append(f"{song.wish.name} was asked for again and became {again} beside {song.job_id}")

    async def _queue_again(self, song: Taken) -> None:
        """In the other lane: in its own there is room for one message a song."""
        if not await self._at_stage(song):
            return
        lane: Priority = "normal" if song.wish.request.priority == "high" else "high"
        order = TokenJob(job_id=song.job_id, tenant=TENANT)
        try:
            await self._outside.js.publish(token_subject(lane, song.job_id), msgspec.json.encode(order))
            self._happens(song)
        except (nats.errors.Error, APIError, TimeoutError):
            self._tell(f"duplicate-job: {song.wish.name} found no room")
