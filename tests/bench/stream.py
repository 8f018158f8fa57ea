"""``make bench-stream``: how soon a song can be heard, whether it goes on without a gap, and what that costs.

JSON lines. `stream`: songs submitted at once, each with a listener from the start, on real servers: with the trivial
engine, which is given the codec's windows and the times of a card, both models resident or offloaded, and with the demo
checkpoint. A simulated player plays in real time from its first sound on. `stream_songs`: songs a second without
listeners, in alternation with another checkout (``BASE=<its folder>``). See docs/performance.md.
"""

import argparse
import asyncio
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import nats
import soundfile

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.trivial import TrivialEngine
from shared.model.prompt import Prompt
from shared.settings import Settings
from tests.bench.checkpoints import long_songs
from tests.bench.flow import Bench
from tests.bench.listening import Heard, Play, listen, play
from tests.bench.sides import ROOT
from tests.bench.stream_pairs import compare
from tests.chaos.observer import journals
from tests.chaos.stack import open_stack

CODEC_BATCH = 1  # windows that the codec decodes at once
MOVES = 3  # that no offloaded song avoids before its first window: one model to the device, back, the other to it
MODELS = ("heartmula", "heartcodec")  # labels of their weights on the device
PATIENCE = 900.0  # seconds
FRAME_S = 0.08
CARD = Settings(
    engine="trivial",
    batch=8,
    gpu_id="card",
    trivial_step_ms=15,
    trivial_window=(372, 320),
    trivial_window_ms=1000,
    trivial_swap_ms=750,  # a swap is two moves
)
# As long as a song: the demo checkpoint ends songs where their lyrics end.
LYRICS = "\n".join(f"[{part}]\nla la la la\nla la la la\nla la la la\nla la la la" for part in ("Verse", "Chorus") * 6)
QUICK = replace(CARD, trivial_step_ms=2, trivial_window=(50, 25), trivial_window_ms=20, trivial_swap_ms=10)


@dataclass(frozen=True)
class Case:
    """Songs that are made at once, each with a listener."""

    settings: Settings
    listeners: tuple[int, ...]
    seconds: int  # of each song

    @property
    def models(self) -> str:
        return "offloaded" if self.settings.sequential_offload else "resident"


@dataclass(frozen=True)
class HeardSong:
    """A song with one listener. Times in seconds."""

    submitted: float  # monotonic
    completed: float
    length: float
    play: Play


CASES = {
    "resident": Case(replace(CARD, sequential_offload=False), (1, 4, 8), 180),
    "offloaded": Case(replace(CARD, sequential_offload=True), (1, 4, 8), 180),
    "demo": Case(Settings(batch=8, gpu_id="card", sequential_offload=False), (1, 4), 90),
}
SMOKE = {"offloaded": Case(replace(QUICK, sequential_offload=True), (2,), 8)}


def aim(settings: Settings, listeners: int, frame_ms: float) -> float:
    """Seconds to the first sound of the last listener, where nothing but frames, windows and moves is waited for."""
    windows, moves = -(-listeners // CODEC_BATCH), MOVES if settings.sequential_offload else 0
    frames = settings.trivial_window[0] * frame_ms
    return (frames + windows * settings.trivial_window_ms + moves * settings.trivial_swap_ms) / 1000


def load(settings: Settings, listeners: int) -> float:
    """Share of the time between two windows for which a card works on them; with more than 1 no player could go on."""
    _, hop = settings.trivial_window
    moves = 4 if settings.sequential_offload else 0
    times = (settings.trivial_step_ms, settings.trivial_window_ms, settings.trivial_swap_ms)
    return sum(count * ms for count, ms in zip((hop, listeners, moves), times, strict=True)) / 1000 / (hop * FRAME_S)


def frame_ms(settings: Settings, songs: int, frames: int = 100) -> float:
    """Milliseconds that the trivial engine really takes for a frame of so many songs."""
    engine = TrivialEngine(settings.trivial_step_ms, songs)
    for number in range(songs):
        engine.admit(str(number), Song(prompt=Prompt(tags=(), lyrics=()), max_frames=2 * frames, seed=number))
    began = time.perf_counter()
    for _ in range(frames):
        engine.step()
    return (time.perf_counter() - began) * 1000 / frames


def moved(data_dir: Path) -> Counter[str]:
    """How often each model was moved to the device so far."""
    moves = [move for journal in journals(data_dir).values() for move in journal]
    return Counter(move["label"] for move in moves if move["move"] == "place" and move["label"] in MODELS)


async def heard_song(bench: Bench, seed: int, seconds: int) -> HeardSong:
    """Make a song and listen to it from the start. Raises `RuntimeError` if less than the song was heard."""
    job_id, submitted = await bench.song(seed, lyrics=LYRICS, max_duration_ms=1000 * seconds)
    heard: Heard = await listen(bench.http, job_id)
    await bench.until_ended([job_id], PATIENCE)
    file = (await bench.http.get(f"/generate/{job_id}/result")).content
    if len(file) != len(heard.data):
        raise RuntimeError(f"a listener got {len(heard.data)} bytes of {len(file)} of {job_id}")
    return HeardSong(submitted, bench.ends[job_id], soundfile.info(io.BytesIO(file)).duration, play(heard))


async def measure(bench: Bench, case: Case, listeners: int) -> dict[str, object]:
    """Make songs at once, each with a listener."""
    before = moved(bench.stack.settings.data_dir)
    songs = await asyncio.gather(*(heard_song(bench, 100 + seed, case.seconds) for seed in range(listeners)))
    moves = moved(bench.stack.settings.data_dir) - before
    first = [song.play.first_sound - song.submitted for song in songs]
    whole = [song.completed - song.submitted for song in songs]
    gaps = [gap for song in songs for gap in song.play.underruns]
    took = max(song.completed for song in songs) - min(song.submitted for song in songs)
    row: dict[str, object] = {
        "bench": "stream",
        "engine": case.settings.engine,
        "models": case.models,
        "listeners": listeners,
        "song_s": round(statistics.median(song.length for song in songs), 1),
        "first_sound_s": round(statistics.median(first), 2),
        "first_sound_s_worst": round(max(first), 2),
        "whole_file_s": round(statistics.median(whole), 2),
        "whole_file_s_worst": round(max(whole), 2),
        "underruns": len(gaps),
        "underrun_s_longest": round(max(gaps, default=0.0), 2),
        "songs_per_s": round(listeners / took, 3),
        "moves": {label: moves[label] for label in MODELS},
        "cpu_load": round(os.getloadavg()[0], 1),
    }
    if case.settings.engine == "trivial":
        pace = frame_ms(case.settings, listeners)
        wanted = aim(case.settings, listeners, case.settings.trivial_step_ms)
        row |= {
            "aim_s": round(wanted, 2),
            "of_aim": round(max(first) / wanted, 3),
            "frame_ms": round(pace, 2),  # as this machine makes them now
            "of_aim_at_pace": round(max(first) / aim(case.settings, listeners, pace), 3),
            "device_load": round(load(case.settings, listeners), 2),
        }
    return row


async def run(case: Case) -> None:
    """Run a case on a stack of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as name:
        folder, settings = Path(name), case.settings
        # A connection that is kept may be closed by the gateway just before it is used again.
        timeout, limits = httpx.Timeout(30, read=120), httpx.Limits(max_keepalive_connections=0)
        if settings.engine == "trivial":
            settings = replace(settings, model_path=long_songs(folder))
        async with (
            open_stack(folder, settings) as stack,
            httpx.AsyncClient(base_url=stack.urls[0], timeout=timeout, limits=limits, trust_env=False) as http,
            await nats.connect(stack.settings.nats_url) as nc,
        ):
            bench = Bench(stack, http, nc)
            await bench.listen()
            job_id, _ = await bench.song(0)  # what is done only once
            await bench.until_ended([job_id])
            for listeners in case.listeners:
                await asyncio.sleep(1)  # the songs before are cleaned up
                print(json.dumps(await measure(bench, case, listeners)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.stream", description=__doc__)
    parser.add_argument("case", nargs="*", choices=[[], *CASES, "songs"], help="all of them when none is named")
    parser.add_argument("--base", type=Path, help="the checkout to compare songs a second with")
    parser.add_argument(
        "--cpu-time", action="store_true", help="songs a second of CPU time, on machines with other load"
    )
    parser.add_argument("--smoke", action="store_true", help="very short songs, to see that the bench runs")
    options = parser.parse_args()
    cases = SMOKE if options.smoke else CASES
    for name in options.case or cases:
        if name in cases:
            asyncio.run(run(cases[name]))
    if "songs" in (options.case or ["songs"]):
        if options.base is None:
            print("songs a second are not compared: BASE names no other checkout", file=sys.stderr)
        elif not (options.base / "services").is_dir():
            parser.error(f"{options.base} is no checkout of this project")
        else:
            compare(ROOT, options.base.resolve(), cpu_time=options.cpu_time, quick=options.smoke)


if __name__ == "__main__":
    main()
