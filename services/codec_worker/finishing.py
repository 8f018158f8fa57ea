"""The end of a song: its files, its record, and what is left of the way there."""

import asyncio
import logging
import shutil
from pathlib import Path

from services.codec_worker.decoding_loop import DecodingLoop
from services.codec_worker.part_store import delete
from services.codec_worker.song_file import SongFile
from services.codec_worker.song_in_work import SongInWork
from services.codec_worker.song_record import StoredAudio
from services.codec_worker.song_writer import FileBuilder, SongWriter
from services.codec_worker.token_fetch import token_keys
from shared.audio.forms import CONTENT_TYPES
from shared.audio.peaks import CONTENT_TYPE as PEAKS_TYPE
from shared.audio.tags import SongTags
from shared.errors import ObjectError, Unavailable
from shared.jobs.events import end_event
from shared.schema.job import DecodeJob, Job
from shared.settings import Settings
from shared.storage.keys import audio_key, converted_key, kept_tokens_key, keys_with_renditions, peaks_key
from shared.storage.tempdirs import scratch_folder
from shared.storage.token_file import pack
from shared.tracing import span
from shared.worker.signals import JobStopped

log = logging.getLogger(__name__)


class Finisher:
    """Decodes songs to their end."""

    def __init__(self, loop: DecodingLoop, settings: Settings) -> None:
        self._loop = loop
        self._scratch, self._output = settings.data_dir / "tmp", settings.output_path

    async def run(self, song: SongInWork) -> bool:
        """Decode what is left of a song, store its files and complete its record. Returns whether that was done.

        Else the song made place for others at a window. Raises `ObjectError` when a part cannot be used; then there are
        none any more.
        """
        job = song.context.job
        audio_format = job.request.format
        with (
            scratch_folder(self._scratch) as folder,
            SongFile(
                folder, job.job_id, audio_format, song.stream.header, song.sample_rate, SongTags.of(job.request)
            ) as file,
        ):
            builder = FileBuilder(file, song.parts.parts, song.context, song.worker)
            try:
                writer = SongWriter(song.stream, song.parts, builder, flac=audio_format == "flac")
                if not await self._loop.run(song, writer):
                    return False
                await builder.finish()
            except ObjectError as error:
                log.warning("%s: decoding begins again, %s", job.job_id, error)
                await song.parts.begin_again()
                raise
            finally:
                await builder.abandon()
            audio = await self._store(song, file)
        await self._complete(song, audio)
        return True

    async def _store(self, song: SongInWork, file: SongFile) -> StoredAudio:
        context, worker, job = song.context, song.worker, song.context.job
        key = audio_key(job.job_id, context.turn.fencing_token, job.request.format)
        files = {key: file.path}
        if file.has_flac and file.path != file.flac_path:  # listeners of the stream go on in it, at the same byte
            files[converted_key(key, "flac")] = file.flac_path
        with span("store audio"):
            for name, path in files.items():
                content_type = CONTENT_TYPES["flac" if path == file.flac_path else job.request.format]
                await worker.retry(
                    lambda name=name, path=path, kind=content_type: worker.store.put_file(name, path, kind),  # type: ignore[misc]
                    context,
                )
            await worker.retry(lambda: worker.store.put(peaks_key(key), song.stream.peaks(), PEAKS_TYPE), context)
        if self._output is not None:
            await asyncio.to_thread(_copy, file.path, self._output)
        return StoredAudio(
            key=key,
            size=file.path.stat().st_size,
            samples=file.samples,
            sample_rate=song.sample_rate,
            frames=song.tokens.codes.shape[1],
        )

    async def _complete(self, song: SongInWork, audio: StoredAudio) -> None:
        context, worker = song.context, song.worker
        try:
            done = await worker.retry(lambda: song.record.complete(audio))
        except JobStopped:
            await delete(worker.store, [audio.key, converted_key(audio.key, "flac"), peaks_key(audio.key)])
            raise
        context.publish(end_event(done))
        await _keep_tokens(song, done)
        if song.parts.parts:
            await self._delete_stream(song, audio)

    async def _delete_stream(self, song: SongInWork, audio: StoredAudio) -> None:
        """Delete all that lies beside the finished audio: the parts, and what workers left that died with them."""
        store, kept = song.worker.store, keys_with_renditions(audio.key)
        try:
            found = await store.list(f"audio/{song.job_id}/")
        except Unavailable as error:
            log.warning("%s: its parts were not deleted: %s", song.job_id, error)
            return
        await delete(store, [item.key for item in found if item.key not in kept])


async def _keep_tokens(song: SongInWork, done: Job) -> None:
    """Keep the tokens of which the audio was made where the record names them, and delete the song's others.

    The reconciler finds further ones, of tokenizers that had lost their lease.
    """
    context, store, tokens = song.context, song.worker.store, song.tokens
    order = context.order
    assert isinstance(order, DecodeJob) and done.tokens_key is not None
    if done.tokens_key != tokens.key:  # a second tokenizer, which makes equal tokens as a rule, changed the record
        try:
            await store.put(done.tokens_key, pack(tokens.codes, tokens.meta))
        except Unavailable as error:
            log.warning("%s: its tokens were not stored again under %s: %s", song.job_id, done.tokens_key, error)
    others = {tokens.key, *token_keys(context.job, order), *([kept_tokens_key(song.job_id)] if done.parent else [])}
    await delete(store, sorted(others - {done.tokens_key}))


def _copy(path: Path, folder: Path) -> None:
    """Copy a file under another name first, so that programs which watch the folder never see half a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{path.name}.part"
        shutil.copyfile(path, partial)
        partial.replace(folder / path.name)
    except OSError as error:
        # The song is safe in the object store; a full or missing folder must not cost it.
        log.error("HEARTMULA_OUTPUT_PATH: %s was not written there: %s", path.name, error)
