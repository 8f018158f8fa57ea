"""Errors at the boundary to NATS: a refusal during an election is waited out, an error of another origin passes."""

from typing import cast

import pytest
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from shared.errors import Unavailable
from shared.nats.streams import bootstrap
from shared.schema.worker import WorkerStatus
from shared.settings import Settings
from shared.worker.heartbeat import Heartbeat


class Electing:
    """JetStream while a cluster elects the leader of a stream."""

    async def account_info(self) -> None:
        raise NotFoundError(code=404, description="stream not found")


async def test_the_set_up_is_tried_again_while_a_cluster_elects() -> None:
    with pytest.raises(Unavailable, match="JetStream could not be set up: stream not found"):
        await bootstrap(cast(JetStreamContext, Electing()), Settings())


class WithoutLedger(Heartbeat):
    """Heartbeats of a worker that cannot read the ledger of its device."""

    def __init__(self) -> None:
        pass

    def _status(self) -> WorkerStatus:
        raise OSError("too many open files")


async def test_a_worker_that_cannot_read_its_ledger_ends_instead_of_blaming_nats() -> None:
    with pytest.raises(OSError, match="too many open files"):
        await WithoutLedger().run()
