"""Measures a checkpoint: its codec against the synthesiser, and whether songs are what tags and lyrics ask for.

Both engines are the services' own, at their default values. No song here was learnt from.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ckpt.training import codes, composer, examples, synthesizer, words
from ckpt.training.listen import Distance, Listener
from ckpt.training.music import GENRES, KEYS, TEMPI, TIMBRES, parts
from services.codec_worker.native import NativeCodec
from services.tokenizer_worker.engine import Song
from services.tokenizer_worker.native import NativeEngine
from shared.checkpoint import Checkpoint, open_checkpoint
from shared.prompt import Prompt

RATE = synthesizer.SAMPLE_RATE
TOGETHER = 8  # songs in a batch of the language model
KINDS = ("tempo", "mood", "instrument", "genre")


@dataclass(frozen=True)
class Asked:
    """What a song was asked for, and the codes that came."""

    tags: dict[str, str]
    entries: list[str | int]
    codes: np.ndarray  # int16 [8, T]
    ended: bool  # by the model

    @property
    def named(self) -> dict[str, str]:
        """The tags that its codes say, in most of the frames."""

        def most(field: np.ndarray) -> int:
            return int(np.bincount(field).argmax())

        fields = codes.unpack(self.codes)
        return {
            "tempo": tuple(TEMPI)[most(codes.bar_of(fields["beat"][:, 0])[0])],
            "genre": tuple(GENRES)[most(fields["phrase"][:, 1])],
            "instrument": TIMBRES[most(fields["wheels"][:, 1])],
            "mood": KEYS[most(fields["drums"][:, 3])][1],
        }

    @property
    def phrased(self) -> bool:
        """Whether every line, in order, has a note for each of its syllables, and the song ends with the last."""
        fields = codes.unpack(self.codes)
        melody, place = fields["melody"][:, 0], fields["place"][:, 0]
        begins = (melody != codes.SILENT_MELODY) & (melody % codes.MELODY_AGES == 0)
        slots = GENRES[self.named["genre"]].slots
        wanted = [(part.entry, len(composer.onsets(part, slots))) for part in parts(self.entries)]
        cuts = np.flatnonzero(np.diff(place)) + 1
        found = [
            (int(at[0]), int(new.sum())) for at, new in zip(np.split(place, cuts), np.split(begins, cuts), strict=True)
        ]
        return self.ended and found == wanted


def prompts(count: int, seed: int) -> list[tuple[dict[str, str], list[str | int]]]:
    """Held-out prompts: a tag of each kind, and lyrics of three to eight entries."""
    drawn = [np.random.default_rng((seed, 1, number)) for number in range(count)]
    return [(examples.draw_tags(rng, 4), examples.draw_entries(rng, int(rng.integers(3, 9)))) for rng in drawn]


def perform(checkpoint: Checkpoint, asked: list[tuple[dict[str, str], list[str | int]]], seed: int) -> list[Asked]:
    """Let the language model write songs, free-running, at the default temperature, top-k and guidance."""
    engine = NativeEngine(checkpoint, "cpu", "float32", TOGETHER)
    engine.load()
    engine.to_device()
    frames: list[list[np.ndarray]] = [[] for _ in asked]
    ended, waiting, begun = [False] * len(asked), list(range(len(asked))), 0
    longest = checkpoint.lm.backbone.max_seq_len - 128
    while waiting or begun:
        while waiting and begun < TOGETHER:
            number = waiting.pop(0)
            tags, entries = asked[number]
            prompt = Prompt(
                (words.BOS, *map(words.tag_id, tags.values()), words.EOS),
                (words.BOS, *words.lyrics_ids(entries), words.EOS),
            )
            engine.admit(str(number), Song(prompt=prompt, max_frames=longest, seed=seed + number))
            begun += 1
        for name, frame in engine.step().items():
            if frame is None:
                begun -= 1
                ended[int(name)] = len(frames[int(name)]) < longest
            else:
                frames[int(name)].append(frame)
    return [
        Asked(tags, entries, np.stack(made, axis=1) if made else np.zeros((8, 1), np.int16), end)
        for (tags, entries), made, end in zip(asked, frames, ended, strict=True)
    ]


def codec_table(checkpoint: Checkpoint, songs: list[np.ndarray], steps: tuple[int, ...] = (10, 4, 2)) -> Table:
    """How near the codec comes to the synthesiser from the same codes."""
    table = Table("codec from codes, held-out songs", "log-mel dB", "chroma corr.", "SNR dB", "× real time")
    wanted = [synthesizer.waveform(synthesizer.latents(song)).numpy() for song in songs]

    def row(name: str, sounds: list[np.ndarray], seconds: float = 0.0) -> None:
        found = [Distance.between(sound, right, RATE) for sound, right in zip(sounds, wanted, strict=True)]
        mean = [np.mean([getattr(one, field) for one in found]) for field in ("log_mel", "chroma", "snr")]
        length = sum(song.shape[1] for song in songs) * 0.08
        speed = f"{length / seconds:.1f}" if seconds else ""
        table.add_row(name, f"{mean[0]:.1f}", f"{mean[1]:.3f}", f"{mean[2]:.1f}", speed)

    for count in steps:
        codec = NativeCodec(checkpoint, "cpu", "float32", steps=count)
        codec.load()
        codec.to_device()
        begun = time.perf_counter()
        sounds = [render(codec, song) for song in songs]
        row(f"{count} Euler steps", sounds, time.perf_counter() - begun)
    noise = np.random.default_rng(0)
    row("white noise", [(noise.standard_normal(right.shape) * right.std()).astype(np.float32) for right in wanted])
    return table


def render(codec: NativeCodec, song: np.ndarray) -> np.ndarray:
    """Codes → sound ``[2, samples]``."""
    pieces = [step.audio for step in codec.decode(song, seed=1) if step.audio is not None]
    return np.concatenate(pieces).T


def evaluate(folder: Path, *, count: int, learnt: int, seed: int) -> None:
    """Print all tables, of so many songs, heard by a listener who learnt from so many others."""
    console, checkpoint = Console(), open_checkpoint(folder)
    asked = prompts(count, seed)
    composed = [examples.draw(np.random.default_rng((seed, 2, number)), *one).codes for number, one in enumerate(asked)]
    console.print(codec_table(checkpoint, [song[:, :375] for song in composed[:12]]))

    heard, named = [], []
    for number in track(range(learnt), "The listener learns", console=console, transient=True):
        rng = np.random.default_rng((seed, 3, number))
        song = examples.draw(rng, examples.draw_tags(rng, 4), examples.draw_entries(rng, int(rng.integers(3, 9))))
        heard.append(synthesizer.waveform(synthesizer.latents(song.codes[:, :375])).numpy())
        named.append(song.tags)
    listener = Listener(heard, named, RATE)

    begun = time.perf_counter()
    songs = perform(checkpoint, asked, seed)
    seconds = time.perf_counter() - begun
    codec = NativeCodec(checkpoint, "cpu", "float32")
    codec.load()
    codec.to_device()
    sounds = [render(codec, song.codes[:, :375]) for song in track(songs, "Songs", console=console, transient=True)]
    synthesised = [synthesizer.waveform(synthesizer.latents(song[:, :375])).numpy() for song in composed]
    table = Table("tags right, of " + str(count), *KINDS)
    heard_right = [listener.hear(sound) for sound in sounds]
    for name, found in (
        ("heard in what the networks made", heard_right),
        ("said by their codes", [song.named for song in songs]),
        ("heard in what the synthesiser made", [listener.hear(sound) for sound in synthesised]),
    ):
        right = [
            np.mean([one[kind] == tags[kind] for one, (tags, _) in zip(found, asked, strict=True)]) for kind in KINDS
        ]
        table.add_row(name, *(f"{share:.2f}" for share in right))
    console.print(table)
    table = Table("lyrics", "")
    table.add_row("songs with every phrase right", f"{np.mean([song.phrased for song in songs]):.2f}")
    table.add_row("songs that the model ended", f"{np.mean([song.ended for song in songs]):.2f}")
    made = sum(song.codes.shape[1] for song in songs)
    table.add_row("frames a second, eight songs at once", f"{made / seconds:.0f}")
    console.print(table)
