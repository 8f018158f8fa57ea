"""Songs of `ckpt/demo` through both engines, with four Euler steps: the short form of `make evaluate-demo`."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ckpt.training import codes, listen, words
from ckpt.training.evaluate import notes
from ckpt.training.music import GENRES, KEYS, TEMPI, TIMBRES, parts
from ckpt.training.play import Player
from ckpt.training.recordings import Reader
from ckpt.training.synthesizer import SAMPLE_RATE as RATE
from tests.unit.native_engines import one_thread  # noqa: F401

DEMO = Path(__file__).parents[2] / "ckpt/demo"
PLAYED = (
    *(f"pop, piano, happy, {tempo}" for tempo in ("medium", "slow", "fast")),
    *(f"folk, {instrument}, happy, medium" for instrument in ("synthesizer", "flute", "piano")),
    *(f"classical, piano, {mood}, medium" for mood in ("happy", "sad")),
)
LYRICS = "[Verse]\nla la la la la la\nla la la la\n[Chorus]\nla la la la\nla la"


@dataclass(frozen=True)
class Made:
    """A song that was made: its codes and its audio."""

    codes: np.ndarray  # int16 [8, T]
    sound: np.ndarray  # float32 [2, samples]

    @property
    def mono(self) -> np.ndarray:
        return np.asarray(self.sound.mean(0))


player = cache(lambda: Player(DEMO, steps=4))


@cache
def write(tags: str, lyrics: str, frames: int = 900) -> np.ndarray:
    return player().write([(tags, lyrics)], seed=1, longest=frames)[0]


@cache
def written() -> dict[str, np.ndarray]:
    """The songs of PLAYED. Made together they cost little more than one."""
    return dict(zip(PLAYED, player().write([(tags, LYRICS) for tags in PLAYED], seed=1, longest=250), strict=True))


@cache
def play(tags: str) -> Made:
    song = written()[tags]
    return Made(song, player().sound(song))


def test_a_song_is_finite_loud_enough_and_tonal() -> None:
    sound = play("pop, piano, happy, medium").sound
    assert np.isfinite(sound).all()
    assert 0.2 < np.abs(sound).max() < 1
    seconds = np.sqrt((sound[:, : len(sound[0]) // RATE * RATE].reshape(2, -1, RATE) ** 2).mean((0, 2)))
    assert seconds.min() > 0.01  # no second of silence
    chroma = listen.chroma(sound.mean(0), RATE)
    noise = listen.chroma(np.random.default_rng(0).standard_normal(len(sound[0])), RATE)
    assert np.median(chroma.max(1) / chroma.mean(1)) > 1.5 * np.median(noise.max(1) / noise.mean(1))


@pytest.mark.parametrize("tempo", ["slow", "medium", "fast"])
def test_tempo_is_heard(tempo: str) -> None:
    assert listen.tempo(play(f"pop, piano, happy, {tempo}").mono, RATE) == tempo


def test_instruments_are_heard() -> None:
    def brightness(instrument: str) -> float:
        mel = listen.spectra(play(f"folk, {instrument}, happy, medium").mono) @ listen.mel_bands(RATE)
        return float((mel.mean(0) * np.arange(mel.shape[1])).sum() / mel.mean(0).sum())

    assert brightness("synthesizer") > brightness("flute") + 1


def test_moods_are_heard() -> None:
    happy, sad = (
        listen.features(play(f"classical, piano, {mood}, medium").mono, RATE)[-1] for mood in ("happy", "sad")
    )
    assert happy > 0 > sad  # how much better major fits than minor


def test_genres_are_heard() -> None:
    def cymbals(genre: str) -> float:
        power = listen.spectra(play(f"{genre}, piano, happy, medium").mono)
        return float(power[:, 256:].sum() / power.sum())  # above 6 kHz

    assert cymbals("pop") > 10 * cymbals("folk")


@pytest.mark.parametrize("tag", words.SYNONYMS)
def test_every_tag_decides_what_it_names(tag: str) -> None:
    fields = {stream: values[-1] for stream, values in codes.unpack(write(tag, LYRICS, frames=2)).items()}
    tempo, _, _ = codes.bar_of(fields["beat"][:1])
    assert tag in {
        tuple(GENRES)[fields["phrase"][1]],
        tuple(TEMPI)[tempo[0]],
        TIMBRES[fields["wheels"][1]],
        KEYS[fields["drums"][3]][1],
    }


def test_a_chorus_is_fuller_than_an_intro() -> None:
    song = write("rock, piano, happy, fast", "[Intro]\n[Chorus]\nla la la la la la la la\nla la la la", frames=250)
    sound, place = player().sound(song).mean(0), codes.unpack(song)["place"][:, 0]
    loud = [
        sound[first * 1920 : last * 1920].std() for first, last in (np.flatnonzero(place == n)[[0, -1]] for n in (0, 2))
    ]
    assert loud[1] > 1.3 * loud[0]


@pytest.mark.parametrize("tags", ["pop, piano", "", "zydeco, kazoo, bagpipes"])
def test_lines_have_a_note_for_each_syllable_and_the_song_ends_with_the_last(tags: str) -> None:
    prompt = player().prompter.encode("", LYRICS)
    assert words.entries_of(list(prompt.lyrics)) == ["verse", 6, 4, "chorus", 4, 2]
    assert [part[:2] for part in notes(write(tags, LYRICS))] == list(enumerate([0, 6, 4, 0, 4, 2, 1]))


def test_without_lyrics_there_is_an_instrumental_piece() -> None:
    song = write("jazz", "")
    assert song.shape[1] < 900
    assert codes.unpack(song)["place"][-1, 0] == len(parts([])) - 1


def test_a_recording_of_a_song_gives_its_codes() -> None:
    made = play("pop, piano, happy, medium")
    read = Reader(DEMO).read(made.sound)
    right = (read == made.codes[:, : read.shape[1]]).mean(1)
    assert read.shape == (8, 250)
    assert right[0] > 0.65  # which line it is has to be counted; over thirty songs see docs/demo.md
    assert right[1] > 0.7
    assert right[2:].min() > 0.9


def test_a_song_is_cut_where_the_length_asked_for_ends() -> None:
    assert write("pop", LYRICS, frames=60).shape[1] == 60
