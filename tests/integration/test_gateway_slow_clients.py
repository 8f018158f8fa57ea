"""Two hundred websockets on one song, most of them slow or gone: the others are not disturbed, and nothing is left."""

import asyncio
import fcntl
import json
import os
import socket
import struct
import termios
from typing import Any

import pytest
import websockets

from services.gateway.api import websocket_protocol as connection
from services.gateway.auth.api_keys import Caller
from services.gateway.events.broadcaster import SUBSCRIPTION_EVENTS, Subscription
from services.gateway.events.stored_events import StoredEvent
from shared.jobs.store import change
from shared.nats.subjects import TENANT
from shared.schema.event import Completed, Progress, Stage, cloud_event
from shared.schema.job import Status
from shared.settings import Settings
from tests.integration.gateway_fixtures import eventually, in_process

READING, STALLED, VANISHING = 40, 80, 80
PATIENCE = 60.0


def progress(done: int, job_id: str = "song") -> Progress:
    return Progress(job_id=job_id, status="generating", progress=done / 20, done=done, total=2000)


async def raw_client(base: str, job_id: str) -> socket.socket:
    """Open a client that requests the events and reads nothing, not even the answer, with a tiny receive buffer."""
    host, _, port = base.removeprefix("http://").partition("/")[0].partition(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (host, int(port)))
    head = f"GET /generate/{job_id}/events HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    await loop.sock_sendall(client, (head + key).encode())
    return client


def held(served: Any) -> int:
    """Number of bytes that the kernel and the event loop hold for a client."""
    unread = fcntl.ioctl(served.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", unread)[0]) + int(served.transport.get_write_buffer_size())


async def read_all(url: str, ready: asyncio.Event) -> tuple[list[dict[str, object]], int]:
    """Read all frames of a client; returns them and the code with which the server closed."""
    frames = []
    async with websockets.connect(url, proxy=None) as client:
        while True:
            try:
                frames.append(json.loads(await client.recv()))
                ready.set()
            except websockets.ConnectionClosed as closed:
                return frames, closed.rcvd.code if closed.rcvd else 0


async def test_slow_and_vanished_clients_cost_the_others_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(connection, "ABORT_SECONDS", 1.0)
    before = asyncio.all_tasks()
    descriptors = len(os.listdir("/proc/self/fd"))
    async with in_process(settings) as (gateway, server, base), asyncio.timeout(PATIENCE):
        job_id = (await gateway.submission.submit(Caller("local"), b'{"lyrics": "la"}')).job.job_id
        server.config.ws_ping_interval = None  # pings that are not answered let a client go too, much later
        idle = len(asyncio.all_tasks())
        url = f"{base.replace('http', 'ws', 1)}/generate/{job_id}/events"
        starts = [asyncio.Event() for _ in range(READING)]
        readers = [asyncio.create_task(read_all(url, start)) for start in starts]
        stalled = [await raw_client(base, job_id) for _ in range(STALLED)]
        vanishing = [await raw_client(base, job_id) for _ in range(VANISHING)]
        for start in starts:
            await start.wait()

        async def listening(count: int) -> bool:
            return gateway.broadcaster.subscriptions == count

        await eventually(lambda: listening(READING + STALLED + VANISHING), "not everybody is served")

        async def move_to(status: Status) -> None:
            await gateway.jobs.update(job_id, TENANT, lambda job: change(job, status=status))

        await move_to("generating")
        await gateway.events.publish(
            TENANT, Stage(job_id=job_id, status="generating", progress=0, stage="generating", phase=1)
        )
        for i, client in enumerate(vanishing):
            if i % 2:  # a process that was killed closes orderly, one whose machine was restarted does not
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        done = 0
        while gateway.broadcaster.subscriptions > READING:  # those who do not read are let go while the song goes on
            done += 1
            await gateway.events.publish(TENANT, progress(done, job_id))
            waiting = max(
                len(subscription)
                for subscriptions in gateway.broadcaster._subscriptions.values()
                for subscription in subscriptions
            )
            assert waiting <= SUBSCRIPTION_EVENTS
            if done % 100 == 0:
                assert max(map(held, server.server_state.connections)) < 256 * 1024

        async def connected(count: int) -> bool:
            return len(server.server_state.connections) == count

        # Their connections too: they are still there, and never read again.
        await eventually(lambda: connected(READING), "connections are left of clients that do not read")
        await gateway.events.publish(TENANT, progress(done + 1, job_id))
        await move_to("decoding")
        await move_to("completed")
        ended = Completed(
            job_id=job_id, status="completed", progress=100, result_url="/", duration_s=1, format="flac", seed=1
        )
        await gateway.events.publish(TENANT, ended)

        for frames, code in await asyncio.gather(*readers):
            assert code == 1000
            kinds = [str(frame["type"]).removeprefix("heartmula.song.") for frame in frames]
            assert [kind for kind in kinds if kind != "progress"] == ["snapshot", "stage", "completed"]
            seen = [frame["data"] for frame in frames if frame["type"] == "heartmula.song.progress"]
            assert seen[-1]["done"] == done + 1  # type: ignore[index]
            assert [int(str(frame["id"])) for frame in frames] == sorted({int(str(frame["id"])) for frame in frames})

        async def forgotten() -> bool:
            return (
                not gateway.broadcaster.subscriptions
                and not server.server_state.connections
                and not server.server_state.tasks
            )

        await eventually(forgotten, "something is left of clients that are gone")
        assert len(asyncio.all_tasks()) < idle + 25  # the gateway's own come and go
        for client in stalled:
            client.close()
    assert asyncio.all_tasks() <= before
    assert len(os.listdir("/proc/self/fd")) < descriptors + 25


async def test_a_mailbox_keeps_the_latest_progress_and_every_change_of_state() -> None:
    subscription = Subscription()
    begun = Stage(job_id="song", status="generating", progress=0, stage="generating", phase=1)
    subscription.put(StoredEvent(1, cloud_event(begun, "1")))
    for sequence in range(2, 1000):
        subscription.put(StoredEvent(sequence, cloud_event(progress(sequence), str(sequence))))
        assert len(subscription) <= SUBSCRIPTION_EVENTS
    got = [await subscription.get() for _ in range(len(subscription))]
    sequences = [stored.sequence for stored in got if stored]
    assert sequences[0] == 1
    assert sequences[-1] == 999
    assert sequences == sorted(sequences)

    for sequence in range(SUBSCRIPTION_EVENTS):
        subscription.put(StoredEvent(sequence, cloud_event(begun, str(sequence))))
    assert not subscription.lost
    subscription.put(
        StoredEvent(1000, cloud_event(begun, "1000"))
    )  # too many changes to keep, and none may be left out
    assert await subscription.get() is None
