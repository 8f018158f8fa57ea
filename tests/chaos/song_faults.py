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
from tests.chaos.observer import Observer
from tests.chaos.songs import AcceptedSong, Client

_PATIENCE = 300.0  # for a song to reach a stage
_LOOK_SECONDS = 0.02
_ROOM_SECONDS = 0.3  # between two attempts to queue a song again


class SongFaultInjector:
    """Injects into each song the fault that its plan names."""

    def __init__(self, client: Client, observer: Observer, log: Callable[[str], None]) -> None:
        self.done: Counter[str] = Counter()
        self.broken: list[str] = []
        self._client, self._observer, self._log = client, observer, log

    async def inject(self, song: AcceptedSong) -> None:
        """Inject the song's fault; returns when that is done, or when the song has ended before."""
        match song.planned.fault:
            case "cancel":
                await self._cancel(song)
            case "tokens-deleted" | "tokens-corrupted":
                await self._damage_tokens(song)
            case "duplicate-submission":
                await self._submit_again(song)
            case "duplicate-job":
                await self._queue_again(song)
            case "poison":
                self._record_fault(song)

    def _record_fault(self, song: AcceptedSong) -> None:
        job = self._observer.job(song.job_id)
        fault = str(song.planned.fault)
        self.done[fault] += 1
        self._log(f"{fault}: {song.planned.name} ({song.job_id}) while {job.status if job else 'unknown'}")

    async def _reaches_stage(self, song: AcceptedSong) -> bool:
        """Wait for the moment that the plan names; returns whether the song has not ended."""
        observer, planned = self._observer, song.planned

        def reached() -> bool:
            job = observer.job(song.job_id)
            return job is not None and planned.stage in ("queued", job.status)

        await observer.until(lambda: reached() or observer.ended(song.job_id), _PATIENCE)
        await asyncio.sleep(planned.delay)
        return not observer.ended(song.job_id)

    async def _cancel(self, song: AcceptedSong) -> None:
        while await self._reaches_stage(song):
            self._record_fault(song)
            answer = await self._client.request("DELETE", f"/generate/{song.job_id}")
            if answer.status_code == 404 and song.planned.via == "intake":  # it found the queue full, and comes again
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            if answer.status_code not in (200, 409):  # 409: it was completed meanwhile
                self.broken.append(f"{song.planned.name}: DELETE answered {answer.status_code} {answer.text}")
            return

    async def _damage_tokens(self, song: AcceptedSong) -> None:
        """Delete or damage the song's tokens as soon as there are some, in the stage that the plan names or later."""
        observer, prefix = self._observer, f"tokens/{song.job_id}/"
        await self._reaches_stage(song)
        while not observer.ended(song.job_id):
            try:
                for key in await observer.keys(prefix):
                    if song.planned.fault == "tokens-corrupted":
                        data = bytearray(await observer.store.get(key))
                        data[-1 - song.planned.number % (len(data) // 2)] ^= 1 << song.planned.number % 8
                        await observer.store.put(key, bytes(data))
                    else:
                        await observer.store.delete(key)
                    self._record_fault(song)
                    return
            except (Unavailable, ObjectError):
                pass
            await asyncio.sleep(_LOOK_SECONDS)

    async def _submit_again(self, song: AcceptedSong) -> None:
        await asyncio.sleep(song.planned.delay)
        again = await self._client.submit(song.planned)
        self._record_fault(song)
        if again != song.job_id:
            self.broken.append(f"{song.planned.name} was submitted again and became {again} beside {song.job_id}")

    async def _queue_again(self, song: AcceptedSong) -> None:
        """Queue the song a second time, in the other lane: in its own there is room for one message a song."""
        lane: Priority = "normal" if song.planned.request.priority == "high" else "high"
        order = TokenJob(job_id=song.job_id, tenant=TENANT)
        while await self._reaches_stage(song):
            try:
                await self._observer.js.publish(token_subject(lane, song.job_id), msgspec.json.encode(order))
                self._record_fault(song)
                return
            except (nats.errors.Error, APIError, TimeoutError):
                self._log(f"duplicate-job: {song.planned.name} found no room")
                await asyncio.sleep(_ROOM_SECONDS)
