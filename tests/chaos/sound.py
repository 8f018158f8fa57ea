"""What songs and recordings of a run sound like, and whether their tokens are those of their audio."""

import asyncio
import functools
import io
from collections.abc import Sequence

import numpy as np
import soundfile

from services.codec_worker.engines.trivial import TrivialCodec, TrivialEncoder
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.trivial import TrivialEngine
from shared.errors import ObjectError
from shared.frames import frames_within, samples_of
from shared.model.prompt import Prompt
from shared.schema.job import Job
from shared.storage.keys import keys_with_renditions
from shared.storage.token_file import unpack
from tests.chaos.observer import Observer
from tests.chaos.recordings import AcceptedRecording, PlannedRecording
from tests.chaos.songs import AcceptedSong, Client
from tests.chaos.verdict import Verdict

_TOLERANCE = 1.5 / 2**15  # of 16 bits


async def judge_audio(verdict: Verdict, songs: Sequence[AcceptedSong], observer: Observer, client: Client) -> None:
    """Every completed song can be fetched and played; songs of the trivial engine have the expected samples."""
    for song in songs:
        job = observer.job(song.job_id)
        if job is not None and job.status == "completed":
            answer = await client.request("GET", f"/generate/{job.job_id}/result")
            fault = str(answer.status_code)
            if answer.status_code == 200:
                trivial = observer.settings.engine == "trivial"
                wanted = await expected_audio(job, observer) if trivial else None
                fault = await asyncio.to_thread(_audio_fault, job, answer.content, wanted)
            if fault:
                verdict.lost.append(f"{song.planned.name} ({job.job_id}): its audio is wrong, {fault}")


async def expected_audio(job: Job, observer: Observer) -> np.ndarray:
    """Audio of a song or recording as the trivial engines make it without interruption: float32 ``[samples, 2]``.

    What a song keeps of another one sounds as it does there.
    """
    if job.recording is not None:
        codes, _ = unpack(await observer.store.get(job.tokens_key or ""), job.job_id)
        return _decoded(codes, 0)
    audio = expected(job.request.seed or 0, frames_within(job.request.max_duration_ms or 0))
    if job.parent is None:
        return audio
    origin = observer.job(job.parent.id)
    assert origin is not None
    kept = samples_of(job.parent.frames, TrivialCodec.sample_rate)
    return np.concatenate([(await expected_audio(origin, observer))[:kept], audio[kept:]])


def _audio_fault(job: Job, data: bytes, wanted: np.ndarray | None) -> str:
    """Describe what is wrong with a song's audio; returns "" if nothing is."""
    try:
        audio, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    except soundfile.LibsndfileError as error:
        return f"it cannot be decoded: {error}"
    frames = frames_within(job.request.max_duration_ms or 0)
    samples = (job.frames or 0) * 2 * rate // 25  # a frame is 2 / 25 of a second
    if not 0 < (job.frames or 0) <= frames or (wanted is not None and job.frames != frames):
        return f"{job.frames} frames of {frames}"
    padding = 0.1 * rate if job.request.format == "mp3" else 0  # MP3 has blocks
    if abs(len(audio) - samples) > padding or audio.shape[1] != 2 or not np.isfinite(audio).all():
        return f"{audio.shape} samples, not {samples}"
    if wanted is not None and job.request.format not in ("mp3", "ogg"):
        difference = float(np.abs(audio - wanted).max())
        if difference > _TOLERANCE:
            return f"it is another song, by {difference:g}"
    return ""


@functools.cache
def expected(seed: int, frames: int) -> np.ndarray:
    """Audio that the trivial engine makes without interruption: float32 ``[samples, 2]``."""
    engine = TrivialEngine(0)
    engine.admit("song", Song(prompt=Prompt(tags=(), lyrics=()), max_frames=frames, seed=seed))
    made = [engine.step()["song"] for _ in range(frames)]
    codes = np.stack([frame for frame in made if frame is not None], axis=1)  # [8, T]
    return _decoded(codes, seed)


def _decoded(codes: np.ndarray, seed: int) -> np.ndarray:
    steps = TrivialCodec(0).decode(codes, seed=seed)
    return np.concatenate([step.audio for step in steps if step.audio is not None])


async def judge_recordings(
    verdict: Verdict, recordings: Sequence[AcceptedRecording], observer: Observer, keys: Sequence[str]
) -> None:
    """Every accepted recording is ready, its audio is what was uploaded, and its tokens are those of that audio.

    The store holds those two, renditions, and nothing else of recordings.
    """
    left = {key for key in keys if key.startswith("recordings/")}
    trivial = observer.settings.engine == "trivial"
    for recording in recordings:
        name, job = f"{recording.planned.name} ({recording.recording_id})", observer.job(recording.recording_id)
        if job is None or job.status != "completed" or job.audio_key is None or job.tokens_key is None:
            verdict.lost.append(f"{name} is {job.status if job else 'gone'}: {job.error if job else ''}")
            continue
        verdict.recordings += 1
        left -= {*keys_with_renditions(job.audio_key), job.tokens_key}
        try:
            flac, tokens = await observer.store.get(job.audio_key), await observer.store.get(job.tokens_key)
        except ObjectError as error:
            verdict.lost.append(f"{name}: {error}")
            continue
        audio, rate = soundfile.read(io.BytesIO(flac), dtype="int16", always_2d=True)
        codes, _ = unpack(tokens, job.job_id)
        if rate != recording.planned.rate or not np.array_equal(audio, recording.planned.audio()):
            verdict.lost.append(f"{name}: its audio is not what was uploaded")
        if codes.shape != (8, job.frames) or (trivial and not np.array_equal(codes, encoded(recording.planned))):
            verdict.lost.append(f"{name}: its tokens, {list(codes.shape)}, are others than those of its audio")
    verdict.others += [f"left in the store: {key}" for key in sorted(left)]


def encoded(planned: PlannedRecording) -> np.ndarray:
    """The codes that the trivial encoder makes of a recording without interruption, int16 ``[8, T]``."""
    audio = np.ascontiguousarray(planned.audio().T.astype(np.float32) / 2**15)
    steps = [step.codes for step in TrivialEncoder(0).encode(audio, planned.rate) if step.codes is not None]
    return np.concatenate(steps, axis=1)[:, : int(planned.seconds * 12.5)]
