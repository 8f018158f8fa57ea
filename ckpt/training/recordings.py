"""Evaluation of the encoder: what it reads in songs of the networks, and how the language model goes on from that."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ckpt.training import codes, examples
from ckpt.training.evaluate import synthesised, text
from ckpt.training.listen import Discriminant, Distance, harmony, tempo
from ckpt.training.music import TEMPI
from ckpt.training.play import Player
from services.codec_worker.encoder.chunks import FRAMES, RATE
from services.codec_worker.engines.encoder import NativeEncoder
from shared.model.checkpoint import open_checkpoint

KEPT, LONGEST = 250, 500  # frames of a recording that is gone on from, and of it and what comes after
LEAST = 125  # frames that come after at least
SAMPLES = 1920  # a frame
STEPS = 2  # of Euler, which sound as ten do


def recorded(sound: np.ndarray) -> np.ndarray:
    """A sound ``[2, samples]`` as a WAV file of 16 bits holds it."""
    return np.asarray(np.round(sound.clip(-1, 1) * 32767) / 32768, np.float32)


class Reader:
    """The encoder of a checkpoint, loaded."""

    def __init__(self, folder: Path) -> None:
        self._encoder = NativeEncoder(open_checkpoint(folder), "cpu")
        self._encoder.load()
        self._encoder.to_device()

    def read(self, sound: np.ndarray) -> np.ndarray:
        """Codes int16 ``[8, T]`` of the whole frames of a sound ``[2, samples]``."""
        steps = self._encoder.encode(recorded(sound), RATE)
        found = [step.codes for step in steps if step.codes is not None]
        return np.concatenate(found, axis=1)[:, : sound.shape[1] // SAMPLES]


def shares(read: np.ndarray, song: np.ndarray) -> list[float]:
    """Share of right codes in each codebook, and of right lines and sections in the first."""
    place, right = codes.unpack(read)["place"], codes.unpack(song)["place"]
    return [*(read == song).mean(1), *(place == right).mean(0)]


def evaluate(folder: Path, *, count: int, learnt: int, seed: int) -> None:
    """Print what is read in `count` songs, and how they go on; keys are judged by what `learnt` others taught."""
    console, player, reader = Console(), Player(folder, STEPS), Reader(folder)

    def drawn(kind: int, number: int, entries: int) -> examples.Example:
        rng = np.random.default_rng((seed, kind, number))
        return examples.draw(rng, examples.draw_tags(rng, 4), examples.draw_entries(rng, entries))

    def written(asked: Sequence[examples.Example], longest: int) -> list[np.ndarray]:
        return player.write([(", ".join(one.tags.values()), text(one.entries)) for one in asked], seed, longest)

    short = written([drawn(2, number, 3 + number % 6) for number in range(count)], FRAMES)
    long = written([drawn(3, number, 20) for number in range(count // 3)], 2 * FRAMES)
    for table in read_tables(player, reader, short, long):
        console.print(table)

    asked = [drawn(4, number, 12) for number in range(count)]
    taught = [drawn(1, number, 8) for number in range(learnt)]
    heard = np.stack([harmony(synthesised(one.codes[:, :KEPT]).mean(0), RATE) for one in taught])
    key = Discriminant(heard, np.array([one.style.key for one in taught]))
    console.print(continued_table(player, reader, key, asked, seed))


def read_tables(player: Player, reader: Reader, short: list[np.ndarray], long: list[np.ndarray]) -> tuple[Table, Table]:
    """Tables of the codes that are right in first chunks of songs and in second ones of others, and how they sound."""
    sounds = Table("codes read, decoded", "log-mel dB", "chroma corr.", "SNR dB")
    found = {}
    for name, songs, skipped in (("first chunk", short, 0), ("second chunk", long, FRAMES)):
        rows, distances, cut = [], [], skipped * SAMPLES
        for song in songs:
            sound = player.sound(song)
            read = reader.read(sound)
            rows.append(shares(read[:, skipped:], song[:, skipped:]))
            distances.append(Distance.between(player.sound(read)[:, cut:], sound[:, cut:], RATE))
        mel, chroma, snr = (np.mean([getattr(one, part) for one in distances]) for part in ("log_mel", "chroma", "snr"))
        found[f"{name}, {len(rows)} songs"] = np.mean(rows, axis=0)
        sounds.add_row(name, f"{mel:.1f}", f"{chroma:.3f}", f"{snr:.1f}")
    right = Table("of codes read, right", *found)
    for part, *values in zip((*codes.STREAMS, "place: line", "place: section"), *found.values(), strict=True):
        right.add_row(part, *(f"{share:.2f}" for share in values))
    return right, sounds


def continued_table(
    player: Player, reader: Reader, key: Discriminant, asked: Sequence[examples.Example], seed: int
) -> Table:
    """Table of how often what comes after the first 20 s of a song is in its key and tempo."""
    prompts = [(", ".join(one.tags.values()), text(one.entries)) for one in asked]
    untagged = [("", lyrics) for _, lyrics in prompts]
    songs = player.write(prompts, seed, LONGEST, new=LONGEST - 1)
    begun = [song[:, :KEPT] for song in songs]
    read = [reader.read(player.sound(song)) for song in begun]
    after: dict[str, Callable[[], list[np.ndarray]]] = {
        "the song itself": lambda: songs,
        "after the codes read": lambda: player.write(prompts, seed + 1, LONGEST, read, LEAST),
        "after the codes read, without tags": lambda: player.write(untagged, seed + 1, LONGEST, read, LEAST),
        "after the true codes, without tags": lambda: player.write(untagged, seed + 1, LONGEST, begun, LEAST),
        "nothing before": lambda: [
            np.concatenate((old, new), axis=1)
            for old, new in zip(begun, player.write(prompts, seed + 1, KEPT), strict=True)
        ],
    }
    table = Table(f"of {len(asked)} songs", "key", "tempo", "both")
    for name, make in after.items():
        right = []
        for song, made in zip(songs, make(), strict=True):
            sound = player.sound(made)[:, KEPT * SAMPLES :].mean(0)
            fields = codes.unpack(song[:, :1])
            beat, tonic = codes.bar_of(fields["beat"][0])[0][0], fields["drums"][0, -1]
            right.append((key(harmony(sound, RATE)) == tonic, tempo(sound, RATE) == tuple(TEMPI)[beat]))
        found = np.array(right)
        table.add_row(name, *(f"{share:.2f}" for share in (*found.mean(0), found.all(1).mean())))
    return table
