"""Songs that go on from another one: how the kept part sounds in the window where the two part, and how the join does.

A song is decoded, then others that begin with its first frames and go on otherwise. Of the kept part in the window
where they part, the signal-to-noise ratio is measured against the first song; at the join, the largest step from one
sample to the next and the jump of energy, as ranks among those at all other limits of frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.codec_worker.engines.base import DecodeState, KeptWindows
from services.codec_worker.engines.native import NativeCodec
from services.codec_worker.model.flow_matching import STEPS
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from shared.frames import samples_of
from shared.jobs.continuing import KeptTokens, kept_tokens
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.codec_windows import CodecWindows
from shared.model.prompt import Prompter
from shared.schema.job import Job
from shared.schema.request import GenerateRequest
from tests.bench import checkpoints
from tests.bench.rows import emit

DEMO = Path(__file__).parents[2] / "ckpt/demo"
SHARES = (0.1, 0.5, 0.9)  # of the stretch of a window in which songs can part
SONGS = 3
FRAMES = 875  # 70 s
EQUAL = 999.0  # dB, said of samples that are equal bit for bit
_WINDOWS = CodecWindows()
_LYRICS = "\n".join(f"[{part}]\n" + "over the hills and far away\nthe river runs to the sea\n" * 2 for part in (
    "Verse", "Chorus", "Verse", "Chorus", "Bridge", "Chorus", "Outro"
))  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A song, and one that goes on after its first frames."""

    parent: np.ndarray  # int16 [8, T]
    child: np.ndarray
    frames: int  # kept
    window: int  # in which they part
    share: float  # of the stretch in which songs part in it


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How a kept part and a join sound. Ranks are the parts of all other limits of frames at which there is less."""

    snr: float  # dB, of the kept part in the window where the songs part
    step_rank: float  # of the largest step from a sample to the next
    step: float  # the same as a part of the largest at any limit of frames
    jump_rank: float  # of the jump of energy


def joins(folder: Path) -> None:
    """Print the rows of the demo checkpoint, on songs that it made, and of the golden one, on random codes."""
    demo, golden = open_checkpoint(DEMO), checkpoints.golden(folder)
    for row in measure(demo, demo_pairs(demo, SONGS)):
        emit({"bench": "joins", "config": "demo", **row})
    for row in measure(golden, random_pairs(golden, SONGS)):
        emit({"bench": "joins", "config": "golden", **row})


def joins_smoke(checkpoint: Checkpoint) -> None:
    """Print the rows of one pair of short songs, in one Euler step."""
    pair = next(random_pairs(checkpoint, 1))
    short = Pair(pair.parent[:, :60], pair.child[:, :60], pair.frames, pair.window, pair.share)
    for row in measure(checkpoint, iter([short]), steps=1):
        emit({"bench": "joins", "config": "golden", **row})


def places() -> Iterator[tuple[int, float, int]]:
    """Windows, shares of the stretch in which songs part in them, and frames that are kept then."""
    overlap = _WINDOWS.length - _WINDOWS.hop
    for window in (0, 1):
        first = window * _WINDOWS.hop + (overlap if window else 0)  # fewer are kept of the window before
        last = window * _WINDOWS.hop + _WINDOWS.length
        for share in SHARES:
            yield window, share, first + round(share * (last - first))


def demo_pairs(checkpoint: Checkpoint, songs: int) -> Iterator[Pair]:
    """Songs of the demo checkpoint that go on with another seed."""
    engine = NativeEngine(checkpoint, "cpu", "float32", 1)
    engine.load()
    engine.to_device()
    prompt = Prompter(checkpoint).encode("piano,drums", _LYRICS)

    def made(seed: int, before: np.ndarray) -> np.ndarray:
        song = Song(prompt=prompt, max_frames=FRAMES, temperature=1.0, topk=50, cfg_scale=1.5, seed=seed)
        engine.admit("song", song, before)
        found = [before]
        while (frame := engine.step()["song"]) is not None:
            found.append(frame[:, None])
        return np.concatenate(found, axis=1)

    for seed in range(songs):
        parent = made(seed, np.zeros((8, 0), np.int16))
        for window, share, frames in places():
            yield Pair(parent, made(100 + seed, parent[:, :frames]), frames, window, share)


def random_pairs(checkpoint: Checkpoint, songs: int) -> Iterator[Pair]:
    """Random codes that go on as other random codes."""
    for seed in range(songs):
        random = np.random.default_rng(seed)
        size = (8, FRAMES)
        parent, other = (random.integers(0, checkpoint.codec.codebook_size, size, dtype=np.int16) for _ in range(2))
        for window, share, frames in places():
            yield Pair(parent, np.concatenate((parent[:, :frames], other[:, frames:]), 1), frames, window, share)


def ways(kept: KeptTokens) -> dict[str, KeptWindows]:
    """What may be taken over, from nothing to all."""
    seeds = (*kept.seeds, kept.earlier[-1].seed)
    return {
        "own noise": KeptWindows(),
        "same noise": KeptWindows(seeds=seeds),
        "latents taken over": KeptWindows(seeds=kept.seeds, earlier=kept.earlier),
    }


def measure(checkpoint: Checkpoint, pairs: Iterator[Pair], steps: int = STEPS) -> Iterator[dict[str, object]]:
    """Rows: for each place of a join and each way of going on, the least and the mean of several songs."""
    engine = NativeCodec(checkpoint, "cpu", "float32", steps=steps)
    engine.load()
    engine.to_device()
    request = GenerateRequest(lyrics="la", seed=1)
    parent = Job(job_id="parent", tenant="local", request=request, created_at=0)
    originals: dict[bytes, np.ndarray] = {}
    found: dict[tuple[int, float, str], list[Judged]] = {}
    for pair in pairs:
        kept = kept_tokens(parent, pair.parent, (), pair.frames, _WINDOWS)
        song = pair.parent.tobytes()
        if song not in originals:
            originals[song] = decoded(engine, 1, pair.parent, KeptWindows())
        for way, windows in ways(kept).items():
            audio = decoded(engine, 2, pair.child, windows)
            place = (pair.window, pair.share, way)
            found.setdefault(place, []).append(judged(pair, originals[song], audio, engine.sample_rate))
    for (window, share, way), values in found.items():
        yield {
            "window": window,
            "join_at": f"{share:.0%}",
            "way": way,
            "least_snr_db": round(min(value.snr for value in values), 1),
            "mean_snr_db": round(float(np.mean([value.snr for value in values])), 1),
            "step_rank": round(float(np.mean([value.step_rank for value in values])), 2),
            "largest_step": round(max(value.step for value in values), 2),
            "jump_rank": round(float(np.mean([value.jump_rank for value in values])), 2),
        }


def decoded(engine: NativeCodec, seed: int, codes: np.ndarray, kept: KeptWindows) -> np.ndarray:
    """The audio of a song, float32 ``[samples, 2]``."""
    steps = engine.advance(DecodeState(seed=seed), codes, ended=True, kept=kept)
    return np.concatenate([step.audio for step in steps if step.audio is not None])


def judged(pair: Pair, original: np.ndarray, audio: np.ndarray, rate: int) -> Judged:
    """Compare a song with the one that it goes on from, whose audio is `original`."""
    start, join = (samples_of(at, rate) for at in (pair.window * _WINDOWS.hop, pair.frames))
    wanted, got = original[start:join].astype(np.float64), audio[start:join]
    noise = np.square(got - wanted).sum()
    limits = [samples_of(at, rate) for at in range(2, pair.child.shape[1] - 1)]
    steps = {at: step_at(audio, at, rate) for at in limits}
    jumps = {at: jump_at(audio, at, rate) for at in limits}
    return Judged(
        snr=float(10 * np.log10(np.square(wanted).sum() / noise)) if noise else EQUAL,
        step_rank=rank(steps, join),
        step=steps[join] / max(steps.values()),
        jump_rank=rank(jumps, join),
    )


def step_at(audio: np.ndarray, at: int, rate: int) -> float:
    """The largest step from a sample to the next within a millisecond on either side."""
    reach = max(1, rate // 1000)
    near = audio[at - reach : at + reach]
    return float(np.abs(np.diff(near, axis=0)).max())


def jump_at(audio: np.ndarray, at: int, rate: int) -> float:
    """The ratio of the energies of five milliseconds after and before, in dB without its sign."""
    part = max(4, rate // 200)
    before, after = (float(np.square(piece).mean()) + 1e-8 for piece in (audio[at - part : at], audio[at : at + part]))
    return float(abs(10 * np.log10(after / before)))


def rank(values: dict[int, float], at: int) -> float:
    """The part of the other values that is smaller."""
    others = [value for place, value in values.items() if place != at]
    return float(np.mean([value < values[at] for value in others]))
