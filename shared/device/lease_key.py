"""A candidate's key in GPU_LOCK: each write and delete is a compare-and-set on the key's sequence."""

import msgspec
from nats.js import JetStreamContext

from shared.clock import elapsed
from shared.device.lease_queue import STREAM, read_record
from shared.errors import LeaseLost, NotFound
from shared.nats.errors import nats_errors
from shared.nats.streams import LOCK_MARKER_TTL
from shared.schema.worker import LeaseRecord

_EXPECTED = "Nats-Expected-Last-Subject-Sequence"


class LeaseKey:
    """One key, which expires `ttl` seconds after its latest write. Methods raise `Unavailable` without an answer."""

    def __init__(self, js: JetStreamContext, subject: str, ttl: int) -> None:
        self._js, self._subject, self._ttl = js, subject, ttl
        self.sequence = 0  # of the latest write that is known
        self.deadline = 0.0  # on `shared.clock`: the key lasts at least until then; counted from before the write

    async def read(self) -> LeaseRecord | None:
        """The record as the leader has it, None where there is none that can be read; takes over its sequence."""
        try:
            with nats_errors("the lease cannot be read"):
                message = await self._js.get_msg(STREAM, subject=self._subject)
        except NotFound:
            self.sequence = 0
            return None
        self.sequence = message.seq or 0
        return read_record(message.data) if message.data else None

    async def enter(self, record: LeaseRecord) -> int:
        """Write over what was read, whose owner is gone. Returns the sequence; raises `WrongSequence`."""
        return await self._write(record, elapsed())

    async def renew(self, record: LeaseRecord) -> int:
        """Write over our latest write. Returns the sequence; raises `WrongSequence`.

        Raises `LeaseLost` once the deadline is past: another candidate may have taken the device since, and a server
        that brings keys back may have brought ours back too, with the sequence that we know.
        """
        now = elapsed()
        if now >= self.deadline:
            raise LeaseLost("the lease on the device is gone")
        return await self._write(record, now)

    async def delete(self) -> None:
        """Put a delete marker over our latest write. Raises `WrongSequence`."""
        await delete_key(self._js, self._subject, self.sequence, self._ttl / 4)

    async def _write(self, record: LeaseRecord, now: float) -> int:
        headers = {"Nats-TTL": f"{self._ttl}s", _EXPECTED: str(self.sequence)}
        with nats_errors("the lease cannot be written"):
            ack = await self._js.publish(
                self._subject, msgspec.json.encode(record), timeout=self._ttl / 4, headers=headers
            )
        self.sequence = ack.seq
        self.deadline = now + self._ttl - 1
        return ack.seq


async def delete_key(js: JetStreamContext, subject: str, sequence: int, timeout: float) -> None:
    """Put a delete marker over the write with this sequence. Raises `WrongSequence` or `Unavailable`."""
    headers = {"KV-Operation": "DEL", "Nats-TTL": f"{LOCK_MARKER_TTL}s", _EXPECTED: str(sequence)}
    with nats_errors("the lease cannot be deleted"):
        await js.publish(subject, b"", timeout=timeout, headers=headers)
