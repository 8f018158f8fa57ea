"""Uploads: from the body of a request to a recording that is durably in the queue."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from services.gateway.auth.api_keys import Caller
from services.gateway.auth.quota import Quotas
from services.gateway.errors import ApiError, to_api_error
from services.gateway.monitoring.health import Health
from services.gateway.monitoring.metrics import Metrics
from services.gateway.recordings.storing import RecordingStore, Stored
from services.gateway.submission.outage import Outage
from services.gateway.uploads.receiver import Upload, UploadLimits, receive
from services.gateway.uploads.room import Room, disk_error
from shared.audio.decoding.child_process import decode_recording
from shared.audio.decoding.messages import Decoded, DecodingLimits
from shared.errors import QueueFull, RecordingRefused
from shared.frames import seconds_of
from shared.jobs.recordings import recording_id
from shared.schema.base import RECORDING_SCHEMA
from shared.schema.job import Job, Recording
from shared.schema.request import GenerateRequest
from shared.settings import Settings
from shared.storage.keys import recording_key
from shared.storage.tempdirs import scratch_folder

log = logging.getLogger(__name__)

LEAST_SECONDS = 1.0  # of audio, which are the frames of a short prefix
MOST_UPLOADS = 64  # that one gateway has in hand at once; the room on its disk may allow fewer
MOST_OF_TENANT = 16
_DECODED_AT_ONCE = 2
_OUTPUT_RATE = 670_000  # bytes of FLAC that a second may take: stereo at 96 kHz and 24 bits has 576,000 before it
_RETRY_SECONDS = 15


@dataclass(frozen=True)
class UploadRequest:
    """A request with a file, whose body has not been read."""

    body: AsyncIterable[bytes]
    content_type: str
    content_length: int | None  # None: not known
    title: str | None


class Uploads:
    """Takes uploads of one gateway. Nothing of one is in memory as a whole, and what is refused leaves nothing.

    1. Refuse what can be refused before the first byte is read.
    2. Receive the file, which gives the recording's id.
    3. Find the recording where the file was uploaded before.
    4. Count a new one against its tenant's limits.
    5. Decode it, in a process of its own.
    6. Store it, record it and queue it.
    """

    def __init__(
        self,
        settings: Settings,
        quotas: Quotas,
        health: Health,
        metrics: Metrics,
        store: RecordingStore,
        outage: Outage,
        *,
        can_encode: bool,
    ) -> None:
        """`can_encode`: whether the checkpoint has an encoder."""
        self._quotas, self._health, self._metrics = quotas, health, metrics
        self._store, self._outage = store, outage
        self._can_encode, self._most_waiting = can_encode, settings.queue_limit
        self.limits = UploadLimits(most_bytes=settings.recording_mb * 1_000_000)
        seconds = settings.recording_seconds
        self._decoding = DecodingLimits(seconds=seconds, output_bytes=round(max(seconds, 15) * _OUTPUT_RATE))
        self._scratch = settings.data_dir / "tmp"
        self._room = Room(self._scratch)
        self._in_hand: Counter[str] = Counter()  # uploads by tenant
        self._free = asyncio.Semaphore(_DECODED_AT_ONCE)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by recording, those in use
        self._closing = False
        self._interruptible: set[asyncio.Timeout] = set()

    def close(self) -> None:
        """Take no more, and end what is being received or decoded; what is decoded already is still stored."""
        self._closing = True
        for limit in self._interruptible:
            limit.reschedule(asyncio.get_running_loop().time())

    async def take(self, caller: Caller, request: UploadRequest) -> Stored:
        """Take an upload. Returns once it is durably stored and queued, or was before.

        Raises `ApiError`; then it leaves nothing behind.
        """
        try:
            self._require_encoder()
            self._quotas.check_rate(caller, 1)
            await self._health.require_servers()
            await self._require_place()
            found = await self._take(caller, request)
        except Exception as error:
            refusal = to_api_error(error, self._outage.retry_after(error))
            self._metrics.recordings_refused.labels(refusal.kind).inc()
            if refusal is error:
                raise
            raise refusal from error
        if found.is_new:
            self._metrics.recordings_accepted.inc()
            log.info("%s: recording accepted, %.1f s", found.job.job_id, found.job.duration_s or 0)
        return found

    def _require_encoder(self) -> None:
        if not self._can_encode:
            raise ApiError(
                501,
                "no-encoder",
                "recordings need the codec's encoder, which is not there: `make models ENCODER=1` fetches it into the "
                "checkpoint folder; then restart the services",
            )

    async def _require_place(self) -> None:
        """Recordings share a stream with songs that wait for their audio, and must not fill it."""
        if ((await self._health.snapshot()).queue.encode or 0) >= self._most_waiting:
            raise QueueFull("as many recordings wait as may; try again in a while")

    async def _take(self, caller: Caller, request: UploadRequest) -> Stored:
        """Steps 2 to 6."""
        with self._place(caller), self._scratch_folder() as folder:
            async with self._until_closed():
                upload = await self._receive(request, folder)
            job_id = recording_id(caller.tenant, upload.sha256)
            async with self._locks.setdefault(job_id, asyncio.Lock()):  # the second of two finds the first
                known = await self._store.find(caller.tenant, job_id)
                if known is not None:
                    return Stored(known, is_new=False)
                return await self._take_new(caller, upload, request.title, folder)

    @contextlib.contextmanager
    def _place(self, caller: Caller) -> Iterator[None]:
        """A place among the uploads in hand. One that waits for a decoder has it, too: its file is on the disk."""
        if self._in_hand[caller.tenant] >= MOST_OF_TENANT or self._in_hand.total() >= MOST_UPLOADS:
            raise _busy("as many recordings are being received as can be; try again")
        self._in_hand[caller.tenant] += 1
        try:
            yield
        finally:
            self._in_hand -= Counter([caller.tenant])  # which leaves out tenants that have none

    @contextlib.contextmanager
    def _scratch_folder(self) -> Iterator[Path]:
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(scratch_folder(self._scratch))
            except OSError as error:
                raise disk_error(error) from error
            yield folder

    async def _receive(self, request: UploadRequest, folder: Path) -> Upload:
        with self._room.reserve(self._decoding.output_bytes):  # it will be needed: known before the file is here
            pass
        return await receive(
            request.body,
            folder / "upload",
            self._room,
            self.limits,
            content_type=request.content_type,
            content_length=request.content_length,
        )

    async def _take_new(self, caller: Caller, upload: Upload, title: str | None, folder: Path) -> Stored:
        async with self._quotas.lock(caller):
            await self._quotas.take(caller, 1)
        try:
            flac = folder / "audio.flac"
            async with self._until_closed():
                decoded = await self._decode(upload, flac)
            job = _record(caller.tenant, upload, decoded, title, flac.stat().st_size)
            async with self._quotas.lock(caller):  # others may have been accepted during the decoding
                await self._quotas.check_at_once(caller, 1)
                found = await self._store.store(job, flac)
        except RecordingRefused:  # which took a decoder's time: files that cannot be used are no way around the limits
            raise
        except BaseException:
            self._quotas.give_back(caller, 1)
            raise
        if not found.is_new:
            self._quotas.give_back(caller, 1)
        return found

    async def _decode(self, upload: Upload, flac: Path) -> Decoded:
        async with self._free:
            with self._room.reserve(self._decoding.output_bytes):
                decoded = await decode_recording(upload.path, flac, self._decoding)
        if decoded.seconds < LEAST_SECONDS:
            words = f"it plays for {decoded.seconds:.2f} s, and a recording must play for {LEAST_SECONDS:g} s at least"
            raise RecordingRefused("too-short", words)
        upload.path.unlink()
        return decoded

    @contextlib.asynccontextmanager
    async def _until_closed(self) -> AsyncIterator[None]:
        """Do something that ends with a 503 `ApiError` when this gateway is shut down."""
        if self._closing:
            raise _busy("the gateway is shutting down; try again")
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._interruptible.add(limit)
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise _busy("the gateway is shutting down; try again") from None
        finally:
            self._interruptible.discard(limit)


def _record(tenant: str, upload: Upload, decoded: Decoded, title: str | None, flac_bytes: int) -> Job:
    return Job(
        schema=RECORDING_SCHEMA,
        job_id=recording_id(tenant, upload.sha256),
        tenant=tenant,
        request=GenerateRequest(lyrics="", title=title, seed=0, format="flac"),
        created_at=time.time(),
        recording=Recording(
            sha256=upload.sha256,
            upload_bytes=upload.size,
            upload_format=decoded.audio_format,
            channels=decoded.channels,
        ),
        audio_key=recording_key(tenant, upload.sha256),
        audio_bytes=flac_bytes,
        duration_s=seconds_of(decoded.frames, decoded.sample_rate),
        sample_rate=decoded.sample_rate,
    )


def _busy(detail: str) -> ApiError:
    return ApiError(503, "unavailable", detail, headers={"Retry-After": str(_RETRY_SECONDS)})
