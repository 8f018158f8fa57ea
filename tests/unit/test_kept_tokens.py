"""Songs that go on from another one: what they begin with, whatever was lost, and what their token files carry on."""

import msgspec
import numpy as np
import pytest

from services.gateway.background.reconciler import _from_the_beginning
from shared.errors import NewerRecord, SongError, Unavailable
from shared.jobs.continuing import kept_tokens
from shared.schema.base import RECORDING_SCHEMA
from shared.schema.job import Job, Parent, Recording
from shared.schema.request import GenerateRequest
from shared.storage.keys import kept_tokens_key
from shared.storage.token_file import EarlierWindow, TokenMeta, pack, unpack
from tests.unit.test_saved_tokens import CODES, SONG, WINDOWS, Saved

KEPT, KEY = 190, kept_tokens_key("song")  # two whole windows, and a part of the third
PARENT = Job(
    job_id="parent",
    tenant="local",
    request=msgspec.structs.replace(SONG.request, seed=3),
    created_at=1.0,
    status="completed",
    tokens_key="tokens/parent/2.safetensors",
)
TAKEN = kept_tokens(PARENT, CODES, (), KEPT, WINDOWS)
NEW = msgspec.structs.replace(
    SONG,
    tokens_key=None,
    saved_frames=None,
    parent=Parent(job_id="parent", frames=KEPT, least_frames=200, seeds=TAKEN.seeds),
)


class Continued(Saved):
    """A song that goes on from another one, on replaced servers: its own copy is there, and the other song."""

    def __init__(self, song: Job = NEW) -> None:
        super().__init__(song=song)
        self.jobs.parent = PARENT
        meta = TokenMeta(job_id="song", model="other", seed=3, ended=False, earlier=TAKEN.earlier)
        self.store.objects = {
            KEY: pack(TAKEN.codes, meta),
            str(PARENT.tokens_key): pack(CODES, TokenMeta(job_id="parent", model="other", seed=3)),
        }

    async def begins_with_what_it_keeps(self) -> None:
        """Check that the song begins with the frames that it keeps, and carries the window of the other song on."""
        codes, ended = await self.tokens.load()
        assert np.array_equal(codes, CODES[:, :KEPT])
        assert not ended
        for last in (False, True):
            await self.tokens.save(CODES[:, :250], ended=last)
            assert_equal(unpack(self.store.objects[self.tokens.key], "song")[1].earlier, TAKEN.earlier)


def assert_equal(found: tuple[EarlierWindow, ...], expected: tuple[EarlierWindow, ...]) -> None:
    assert [(one.window, one.frames, one.seed, one.codes.tolist()) for one in found] == [
        (one.window, one.frames, one.seed, one.codes.tolist()) for one in expected
    ]


async def test_a_song_begins_with_the_frames_that_it_keeps() -> None:
    song = Continued()
    song.jobs.parent = None  # the other song is not needed for it
    await song.begins_with_what_it_keeps()


DAMAGED: dict[str, bytes | None] = {
    "gone": None,
    "no file": b"nonsense",
    "another song's": pack(TAKEN.codes, TokenMeta(job_id="other", model="m", seed=3)),
    "too few": pack(CODES[:, : KEPT - 1], TokenMeta(job_id="song", model="m", seed=3)),
    "too many": pack(CODES[:, : KEPT + 1], TokenMeta(job_id="song", model="m", seed=3)),
}


def damage(song: Continued, how: str) -> None:
    """Damage the song's own copy."""
    if (data := DAMAGED[how]) is None:
        del song.store.objects[KEY]
    else:
        song.store.objects[KEY] = data


@pytest.mark.parametrize("how", DAMAGED)
async def test_a_copy_that_is_lost_is_made_again(how: str) -> None:
    song = Continued()
    damage(song, how)
    await song.begins_with_what_it_keeps()
    assert KEY in song.store.objects, "the next turn would have to copy it once more"
    codes, meta = unpack(song.store.objects[KEY], "song")
    assert np.array_equal(codes, TAKEN.codes)
    assert (meta.model, meta.seed, meta.ended) == ("other", 3, False)
    assert_equal(meta.earlier, TAKEN.earlier)


@pytest.mark.parametrize("how", ["gone", "no file"])
@pytest.mark.parametrize(
    ("parent", "tokens", "reason"),
    [
        (None, None, "the song that it goes on from, parent, was deleted or has expired"),
        (msgspec.structs.replace(PARENT, tokens_key=None), None, "parent, has no tokens any more"),
        (PARENT, b"nonsense", "parent, has no tokens any more, the token file is damaged: it cannot be read"),
        (PARENT, pack(CODES[:, :100], TokenMeta(job_id="parent", model="m", seed=3)), "parent, has 100 frames"),
    ],
    ids=["no record", "no tokens", "damaged", "too few"],
)
async def test_a_song_whose_beginning_is_lost_everywhere_fails_in_words(
    parent: Job | None, tokens: bytes | None, reason: str, how: str
) -> None:
    song = Continued()
    damage(song, how)
    song.jobs.parent = parent
    if tokens is not None:
        song.store.objects[str(PARENT.tokens_key)] = tokens
    with pytest.raises(SongError, match=f"the 190 frames that it keeps are lost.*{reason}$"):
        await song.tokens.load()


async def test_a_record_of_the_other_song_that_cannot_be_read_fails_the_song(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a conflict: that would end the work on the song in silence."""

    async def newer(*_: str) -> Job:
        raise NewerRecord("of schema 9")

    song = Continued()
    damage(song, "gone")
    monkeypatch.setattr(song.jobs, "get", newer)
    with pytest.raises(SongError, match="cannot be read, of schema 9"):
        await song.tokens.load()


async def test_a_store_that_does_not_answer_costs_the_song_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: str) -> bytes:
        raise Unavailable("s3", "away")

    song = Continued()
    monkeypatch.setattr(song.store, "get", away)
    with pytest.raises(Unavailable):
        await song.tokens.load()


RECORDING = msgspec.structs.replace(
    PARENT,
    schema=RECORDING_SCHEMA,
    request=GenerateRequest(lyrics="", seed=0),
    tokens_key="recordings/local/0/x.safetensors",
    recording=Recording(sha256="0" * 64, upload_bytes=9, upload_format="wav", channels=1),
)


def continued_recording() -> Continued:
    """A song that goes on from a recording, and of which the own copy is gone."""
    song = Continued(msgspec.structs.replace(NEW, parent=Parent(recording_id="parent", frames=KEPT, least_frames=200)))
    damage(song, "gone")
    song.jobs.parent = RECORDING
    data = pack(CODES, TokenMeta(job_id="parent", model="an encoder", seed=0))
    song.store.objects[str(RECORDING.tokens_key)] = data
    return song


async def test_of_a_recording_the_tokens_are_copied_again_too() -> None:
    song = continued_recording()
    codes, _ = await song.tokens.load()
    assert np.array_equal(codes, CODES[:, :KEPT])
    meta = unpack(song.store.objects[KEY], "song")[1]
    assert (meta.model, meta.seed, [one.seed for one in meta.earlier]) == ("an encoder", 0, [0])


async def test_of_a_song_that_goes_on_from_a_recording_the_reason_names_it() -> None:
    song = continued_recording()
    song.jobs.parent = None
    with pytest.raises(SongError, match="the recording that it goes on from, parent, was deleted or has expired"):
        await song.tokens.load()


def with_checkpoint(frames: int, model: str = "trivial") -> Continued:
    """A song of which an earlier turn saved so many frames."""
    song = Continued(msgspec.structs.replace(NEW, tokens_key="tokens/song/3.safetensors"))
    meta = TokenMeta(job_id="song", model=model, seed=7, ended=False, earlier=TAKEN.earlier)
    song.store.objects["tokens/song/3.safetensors"] = pack(CODES[:, :frames], meta)
    return song


async def test_what_an_earlier_turn_saved_comes_first() -> None:
    song = with_checkpoint(230)
    del song.store.objects[KEY]
    codes, _ = await song.tokens.load()
    assert np.array_equal(codes, CODES[:, :230])
    await song.tokens.save(CODES[:, :250], ended=True)
    assert_equal(unpack(song.store.objects[song.tokens.key], "song")[1].earlier, TAKEN.earlier)


@pytest.mark.parametrize("harm", ["damaged", "gone", "another model's", "fewer than it keeps"])
async def test_a_song_that_begins_again_begins_with_what_it_keeps(harm: str) -> None:
    model = "other" if harm == "another model's" else "trivial"
    song = with_checkpoint(KEPT - 1 if harm == "fewer than it keeps" else 230, model)
    if harm == "damaged":
        song.store.objects["tokens/song/3.safetensors"] = b"nonsense"
    elif harm == "gone":
        del song.store.objects["tokens/song/3.safetensors"]
    await song.begins_with_what_it_keeps()


async def test_a_song_that_is_sent_back_for_all_its_tokens_begins_with_what_it_keeps() -> None:
    """The reconciler begins such a song again: the record of a song in decoding does not name its tokens."""
    decoding = msgspec.structs.replace(NEW, status="decoding", saved_frames=250)
    sent_back = _from_the_beginning(decoding)
    assert (sent_back.status, sent_back.tokens_key, sent_back.parent) == ("queued", None, NEW.parent)
    song = Continued(msgspec.structs.replace(sent_back, status="generating", fencing_token=4))
    await song.begins_with_what_it_keeps()


async def test_an_attempt_counts_until_the_song_has_more_than_it_began_with() -> None:
    """Else a song that kills every worker would never fail, as its kept windows are saved in every turn."""
    song = Continued()
    codes, _ = await song.tokens.load()
    await song.tokens.save(codes, ended=False)
    assert (song.jobs.record.attempts, song.jobs.record.tokens_key) == (2, song.tokens.key)
    job = await song.tokens.note_windows() or song.jobs.record
    assert (job.attempts, job.saved_frames) == (2, KEPT)
    await song.save(KEPT + 1)
    assert song.jobs.record.attempts == 0
    writes = song.jobs.writes
    await song.save(KEPT + 2)
    assert song.jobs.writes == writes, "the record says so already"
