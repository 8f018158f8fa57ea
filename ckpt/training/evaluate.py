"""Evaluation of a checkpoint: its codec against the synthesiser, and songs against their tags and lyrics.

No song here was learnt from.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ckpt.training import codes, composer, examples, synthesizer
from ckpt.training.listen import Distance, Listener
from ckpt.training.music import parts
from ckpt.training.play import Player
from services.codec_worker.model.flow_matching import GUIDANCE
from services.codec_worker.model.heartcodec import HeartCodec
from services.codec_worker.model.loading import load_weights
from shared.frames import milliseconds_of
from shared.model.checkpoint import open_checkpoint

HEARD = 375  # frames of a song that are listened to: a window of the codec (372) and a little of the next
LONGEST = 1800  # frames
KINDS = ("tempo", "mood", "instrument", "genre")


def text(entries: list[str | int]) -> str:
    """Write lyrics that have these entries."""
    return "\n".join(f"[{entry}]" if isinstance(entry, str) else " ".join(["la"] * entry) for entry in entries)


def notes(song: np.ndarray) -> list[tuple[int, int, int]]:
    """Parts of a song, int16 ``[8, T]``: for each its kind, the notes of its melody and its frames."""
    fields = codes.unpack(song)
    melody, place = fields["melody"][:, 0], fields["place"][:, 0]
    begins = (melody != codes.SILENT_MELODY) & (melody % codes.MELODY_AGES == 0)
    cuts = np.flatnonzero(np.diff(place)) + 1
    parted = zip(np.split(place, cuts), np.split(begins, cuts), strict=True)
    return [(int(at[0]), int(new.sum()), len(new)) for at, new in parted]


def phrased(song: np.ndarray, asked: examples.Example) -> bool:
    """Whether a song, int16 ``[8, T]``, has all parts in order, each as long as it should be and with its notes."""
    style = asked.style
    return notes(song) == [
        (part.entry, len(composer.onsets(part, style.grammar.slots)), part.bars * style.bar)
        for part in parts(asked.entries)
    ]


def synthesised(song: np.ndarray) -> np.ndarray:
    """Audio of a song as the synthesiser makes it, ``[2, samples]``."""
    return synthesizer.waveform(synthesizer.latents(song)).numpy()


def codec_table(folder: Path, songs: list[np.ndarray]) -> Table:
    """Table of how near codec (from codes) and scalar decoder (from latents) come to the synthesiser."""
    checkpoint = open_checkpoint(folder)
    model = HeartCodec(checkpoint.codec, torch.float32)
    load_weights(model, checkpoint.codec_path)
    noise = np.random.default_rng(0)

    def decoded(song: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(model.scalar(GUIDANCE * synthesizer.latents(song)))

    def hiss(song: np.ndarray) -> np.ndarray:
        wanted = synthesised(song)
        return np.asarray(noise.standard_normal(wanted.shape) * wanted.std())

    makers: dict[str, Callable[[np.ndarray], np.ndarray]] = {"scalar decoder alone": decoded}
    makers |= {f"{steps} Euler steps": Player(folder, steps).sound for steps in (10, 4, 2)}
    makers["white noise"] = hiss
    table = Table("codec from codes", "log-mel dB", "chroma corr.", "SNR dB", "× real time")
    wanted = [synthesised(song) for song in songs]
    seconds = milliseconds_of(sum(song.shape[1] for song in songs)) / 1000
    for name, make in makers.items():
        begun = time.perf_counter()
        sounds = [make(song) for song in songs]
        speed = f"{seconds / (time.perf_counter() - begun):.1f}" if "steps" in name else ""
        far = [
            Distance.between(sound, right, checkpoint.codec.sample_rate)
            for sound, right in zip(sounds, wanted, strict=True)
        ]
        mel, chroma, snr = (np.mean([getattr(one, part) for one in far]) for part in ("log_mel", "chroma", "snr"))
        table.add_row(name, f"{mel:.1f}", f"{chroma:.3f}", f"{snr:.1f}", speed)
    return table


def evaluate(folder: Path, *, count: int, learnt: int, seed: int) -> None:
    """Print all tables for `count` songs, judged by a listener that has learnt from `learnt` others."""
    console, player = Console(), Player(folder)

    def drawn(kind: int, number: int) -> examples.Example:
        rng = np.random.default_rng((seed, kind, number))
        return examples.draw(rng, examples.draw_tags(rng, 4), examples.draw_entries(rng, int(rng.integers(3, 9))))

    asked = [drawn(0, number) for number in range(count)]
    console.print(codec_table(folder, [one.codes[:, :HEARD] for one in asked[:12]]))

    known = [drawn(1, number) for number in range(learnt)]
    heard = track((synthesised(one.codes[:, :HEARD]) for one in known), "The listener learns", learnt, transient=True)
    listener = Listener(heard, [one.tags for one in known], player.rate)

    begun = time.perf_counter()
    songs = player.write([(", ".join(one.tags.values()), text(one.entries)) for one in asked], seed, LONGEST)
    seconds = time.perf_counter() - begun
    table = Table(f"of {count} songs", *KINDS)
    for name, found in (
        ("heard in what the networks made", [listener.hear(player.sound(song[:, :HEARD])) for song in songs]),
        ("heard in what the synthesiser made", [listener.hear(synthesised(one.codes[:, :HEARD])) for one in asked]),
    ):
        right = [
            np.mean([tags[kind] == one.tags[kind] for tags, one in zip(found, asked, strict=True)]) for kind in KINDS
        ]
        table.add_row(name, *(f"{share:.2f}" for share in right))
    console.print(table)
    share = np.mean([phrased(song, one) for song, one in zip(songs, asked, strict=True)])
    console.print(f"every phrase right: {share:.2f} of {count} songs")
    console.print(f"language model, eight songs at once: {sum(song.shape[1] for song in songs) / seconds:.0f} frames/s")
