"""Songs on S3 servers of others, each of which is killed and started again while songs are made."""

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from shared.settings import Settings
from tests.integration.flow import open_flow
from tests.real.stores import STORES, OtherStore, Versity

SONGS = 4


@pytest.mark.parametrize("kind", STORES, ids=lambda kind: kind.program)
async def test_songs_are_made_while_the_store_is_killed_and_started_again(
    kind: type[OtherStore], nats_settings: Settings, tmp_path: Path
) -> None:
    if kind.found() is None:
        pytest.skip(f"{kind.program} is not on the PATH")
    folder = tmp_path / "store"
    folder.mkdir()
    store = kind(folder)
    await store.start()
    settings = replace(
        nats_settings,
        s3_endpoint=store.url,
        s3_access_key=store.access_key,
        s3_secret_key=store.secret_key,
        s3_bucket="heartmula",
        trivial_step_ms=20,
        trivial_window=(25, 15),
        batch=2,
    )
    try:
        async with open_flow(settings, "tokenizer", "codec") as flow:
            songs = [await flow.submit(6, seed=number) for number in range(SONGS)]
            await flow.until(songs[0], lambda job: job.status == "generating")
            store.kill()
            await asyncio.sleep(2)
            await store.start()
            for job_id in songs:
                job = await flow.ended(job_id)
                assert job.status == "completed", job
                audio = await flow.store.get(str(job.audio_key))
                assert soundfile.info(io.BytesIO(audio)).duration == pytest.approx(6, abs=0.1)
                if isinstance(store, Versity):
                    assert (store.folder / "heartmula" / str(job.audio_key)).read_bytes() == audio
    finally:
        await store.stop()
