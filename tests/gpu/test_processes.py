"""Two worker processes that share the card under the real lease, on a nats-server and an S3 server of their own.

This alone needs what workers need beside an engine; `make gpu` leaves it out where that is missing.
"""

import asyncio
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from deploy.local.servers.embedded import ROLES, S3Server, free_port, nats_server, s3_server
from shared.errors import ConfigError
from shared.settings import Settings
from tests.gpu.conftest import ROOT
from tests.integration.flow import open_flow, overlaps

SECONDS = (6, 3, 1.04)


async def songs(device: str, offload: bool, folder: Path) -> tuple[list[np.ndarray], int]:
    """Audio of three songs of the demo model, float32 ``[samples, 2]``, and how often both models met on the device."""
    async with (
        nats_server(folder, free_port(), dict.fromkeys(ROLES, "secret")) as broker,
        s3_server(folder, free_port(S3Server.ports), "tester", "secretsecret") as store,
    ):
        settings = Settings(
            nats_url=broker.url,
            s3_endpoint=store.url,
            s3_access_key="tester",
            s3_secret_key="secretsecret",
            data_dir=folder,
            model_path=ROOT / "ckpt/demo",
            model_dtype="float32",
            device=device,
            sequential_offload=offload,
            codec_steps=2,
        )
        async with open_flow(replace(settings, turn_seconds=2.0, batch=4), "tokenizer", "codec") as flow:
            ids = [await flow.submit(seconds, seed=n, tags="piano,happy") for n, seconds in enumerate(SECONDS)]
            jobs = [await flow.ended(job_id) for job_id in ids]
            assert [job.status for job in jobs] == ["completed"] * 3, jobs
            found = [soundfile.read(io.BytesIO(await flow.store.get(str(job.audio_key)))) for job in jobs]
            for process in flow.processes:
                assert await flow.stop(process) == 0
            return [audio for audio, _ in found], overlaps(flow.journal())


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: sockets are made in it."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        yield Path(name)


@pytest.mark.gpu
def test_three_songs_are_the_same_in_turns_and_with_both_models_resident(
    folder: Path, say: Callable[..., None]
) -> None:
    compare("cuda:0", folder, say)


def compare(device: str, folder: Path, say: Callable[..., None]) -> None:
    """In float32 the songs of both ways are equal, and only without offload do the models meet."""
    try:
        in_turns, met = asyncio.run(songs(device, True, folder / "turns"))
        resident, _ = asyncio.run(songs(device, False, folder / "resident"))
    except ConfigError as error:  # a server's binary
        pytest.skip(str(error))
    assert met == 0
    for one, other in zip(in_turns, resident, strict=True):
        assert one.shape == other.shape
        assert np.abs(one).max() > 0.01
        assert np.array_equal(one, other)
    say(songs=len(in_turns), seconds=[round(len(audio) / 24000, 2) for audio in in_turns])
