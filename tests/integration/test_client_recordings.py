"""Recordings by the Python client and the command line, against a real gateway and workers with the trivial engine."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from heartmula_client import AsyncClient, ContinueFrom, Parent, Refused, UnknownRecording
from shared.settings import Settings
from shared.storage.token_file import unpack
from tests.integration.flow import Flow, open_flow
from tests.integration.gateway_fixtures import running_gateway
from tests.integration.recorded import RATE, codes_of, noise
from tests.integration.test_client import UNKNOWN, heartmula

AUDIO = noise(40, channels=2)  # more than one chunk of the encoder


async def tokens_of(flow: Flow, job_id: str) -> np.ndarray:
    """The tokens of a song that has ended, int16 ``[8, T]``."""
    job = await flow.ended(job_id)
    assert job.status == "completed", job.error
    return unpack(await flow.store.get(str(job.tokens_key)), job_id)[0]


async def test_songs_go_on_from_a_file(settings: Settings, tmp_path: Path) -> None:
    file, codes = tmp_path / "tape.wav", codes_of(AUDIO)
    soundfile.write(file, AUDIO, RATE)
    async with (
        running_gateway(settings, tmp_path, recording_mb=2) as gateway,
        open_flow(replace(gateway.settings, batch=2), "tokenizer", "codec") as flow,
        AsyncClient(gateway.base) as client,
    ):
        over: list[tuple[int, int]] = []
        uploaded = await client.upload(file, title="Tape", on_progress=lambda *share: over.append(share))
        size = file.stat().st_size
        assert over[-1] == (size, size)
        states = [state async for state in client.watch_recording(uploaded.recording_id)]
        assert (states[-1].status, states[-1].title, states[-1].duration) == ("ready", "Tape", 40)

        origin = ContinueFrom(recording_id=uploaded.recording_id, at_ms=35_079)
        accepted = await client.generate("la", continue_from=origin, max_duration_ms=40_000, variants=2, seed=3)
        ids = [each.job_id for each in accepted.variants]
        code, _, err = await heartmula(
            gateway.base, "extend", "tape.wav", "--lyrics", "la", "--seconds", "41", "-o", "whole.flac", folder=tmp_path
        )
        assert (code, soundfile.info(tmp_path / "whole.flac").duration) == (0, pytest.approx(41, abs=0.1)), err
        (last,) = [song.job_id for song in (await client.songs()).songs if song.job_id not in ids]
        for job_id in ids:
            assert np.array_equal((await tokens_of(flow, job_id))[:, :438], codes[:, :438])
        assert np.array_equal((await tokens_of(flow, last))[:, :500], codes)
        assert (await client.song(ids[0])).parent == Parent(recording_id=uploaded.recording_id, at_ms=35_040)
        assert (await client.recording(uploaded.recording_id)).children == [*ids, last]

        (listed,) = (await client.recordings()).recordings
        assert (listed.recording_id, listed.status) == (uploaded.recording_id, "ready")
        code, out, _ = await heartmula(gateway.base, "download", uploaded.recording_id, folder=tmp_path)
        assert (code, out) == (0, "Tape.flac\n")
        assert np.array_equal(soundfile.read(tmp_path / "Tape.flac", dtype="int16")[0], AUDIO)
        code, out, _ = await heartmula(gateway.base, "tree", last)
        assert (code, out.splitlines()[0].split()) == (0, [uploaded.recording_id, "recording", "Tape"])

        await client.delete_recording(uploaded.recording_id)
        with pytest.raises(UnknownRecording):
            await client.recording(uploaded.recording_id)
        with pytest.raises(UnknownRecording):
            await client.generate("la", continue_from=ContinueFrom(recording_id=UNKNOWN))
        assert np.array_equal((await tokens_of(flow, last))[:, :500], codes)
        assert not (await client.song(last)).parent.exists  # type: ignore[union-attr]

        large = tmp_path / "large.wav"
        with large.open("wb") as out_file:
            out_file.truncate(30_000_000)
        with pytest.raises(Refused) as refused:  # before all of it is sent
            await client.upload(large)
        assert (refused.value.status, refused.value.type) == (413, "/problems/too-large")
