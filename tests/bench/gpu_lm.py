"""The language model on a card: moves of its weights, prefill, frames of many songs, parking."""

import time
from statistics import median

import numpy as np
import torch

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from shared.errors import DeviceFull
from shared.model.checkpoint import Checkpoint
from tests.bench.checkpoints import frame_weights, stack_weights
from tests.bench.gpu_device import Device, captures
from tests.bench.gpu_report import Report, Row
from tests.gpu.engines import Way, codes_of, prompt_of, take

SPARE = 96  # frames that a song could still have at the end of a measurement
PROFILED = 12  # kernels that a profile names, those that take longest


class LM:
    """An engine on the device and its measurements. Positions and songs are arguments: a test takes few."""

    def __init__(
        self,
        device: Device,
        report: Report,
        checkpoint: Checkpoint,
        dtype: str,
        slots: int,
        *,
        prompt: int,
        frames: int,
        warm: int,
        counted: int,
    ) -> None:
        self.device, self.report, self.checkpoint, self.dtype = device, report, checkpoint, dtype
        self.slots, self.prompt, self.frames = slots, prompt, frames
        self.warm, self.counted = warm, counted
        self.copy_gb_per_s = 0.0  # of the device's own copies; 0 until it was measured
        self.engine = NativeEngine(checkpoint, device.name, dtype, slots)
        self.int8 = "off"

    @property
    def common(self) -> Row:
        return {"dtype": self.dtype, "int8": self.int8}

    def load(self) -> None:
        """Read the checkpoint into host memory."""
        began = time.perf_counter()
        self.engine.load()
        seconds, gb = time.perf_counter() - began, self.engine.weight_bytes / 1e9
        row: Row = {"s": round(seconds, 2), "gb_per_s": round(gb / seconds, 2), "notes": self.engine.notes}
        self.report.emit("load", model="lm", **self.common, **row)

    def moves(self) -> None:
        """Move the weights to the device and away, twice: the first time their host memory is page-locked."""
        addresses, before = [], self.device.used()
        for turn in (1, 2, 3):
            ms = self.device.milliseconds(self.engine.to_device)
            gb = self.engine.weight_bytes / 1e9
            addresses.append(self.engine._model.head.weight.data_ptr())
            row: Row = {"to_device_ms": round(ms, 1), "gb": round(gb, 3), "gb_per_s": round(gb / ms * 1000, 2)}
            if turn < 3:  # after the last one they stay
                row["to_host_ms"] = round(self.device.milliseconds(self.engine.to_host), 1)
                row["left_mb"] = round((self.device.used() - before) / 1e6, 1)
            self.report.emit("move", model="lm", **self.common, turn=turn, **row, same_address=len(set(addresses)) == 1)

    def prefill(self) -> None:
        """Admit a song, twice: a fresh one, and one with so many frames that it is at the last position."""
        for frames in (0, self.frames):
            codes = codes_of(self.checkpoint, frames) if frames else None
            song = self._song(self.prompt + frames)

            def admit(song: Song = song, codes: np.ndarray | None = codes) -> None:
                self.engine.admit("song", song, codes)

            taken = []
            for _ in range(4):
                self.device.forget_peaks()
                taken.append(self.device.milliseconds(admit))
                self.engine.drop("song")
            rows = self.prompt + 2 * frames  # the unconditional row of a prompt is one position
            backbone = frame_weights(self.checkpoint.lm) - 7 * self._decoder_weights()
            self.report.emit(
                "prefill",
                **self.common,
                prompt=self.prompt,
                frames=frames,
                first_ms=round(taken[0], 1),
                ms=round(median(taken[1:]), 2),
                tflop_per_s=round(2 * rows * backbone / median(taken[1:]) / 1e9, 2),
                **self.device.peaks(),
            )

    def frame(self, songs: int, position: int, way: Way, timed: int = 24, *, profile: bool = False) -> float:
        """Measure frames of so many guided songs about a position; milliseconds of one, 0 when memory is short."""
        take(self.engine, way)
        self.device.forget_peaks()
        try:
            with captures() as graphs:
                try:
                    for number in range(songs):
                        codes = codes_of(self.checkpoint, position - self.prompt, number)
                        self.engine.admit(f"song {number}", self._song(position, number), codes)
                    first = [self.device.milliseconds(self.engine.step) for _ in range(self.warm)]
                    taken = [self._step() for _ in range(timed)]
                except DeviceFull as error:
                    what = f"frame of {songs} songs at {position}, {way}, int8 {self.int8}"
                    self.report.emit("skipped", what=what, why=str(error)[:160])
                    return 0.0
            peaks = self.device.peaks()
            kernels = self.device.kernels(lambda: [self.engine.step() for _ in range(self.counted)])
        finally:
            for number in range(songs):
                self.engine.drop(f"song {number}")
        ms, bytes_read = median(taken), self.frame_bytes(songs, position)
        reached = bytes_read / ms / 1e6
        self.report.emit(
            "frame",
            **self.common,
            way=way,
            songs=songs,
            position=position,
            ms=round(ms, 3),
            songs_per_s=round(80 * songs / ms, 2),
            launches=sum(count for count, _ in kernels.values()) // self.counted,
            kernels_ms=round(sum(us for _, us in kernels.values()) / self.counted / 1000, 3),
            gb=round(bytes_read / 1e9, 3),
            gb_per_s=round(reached, 1),
            of_copy=round(reached / self.copy_gb_per_s, 3) if self.copy_gb_per_s else 0.0,
            first_ms=round(max(first), 1),
            captures=len(graphs.ms),
            capture_ms=round(sum(graphs.ms), 1),
            **peaks,
        )
        if profile:
            longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:PROFILED]
            for name, (count, us) in longest:
                row: Row = {
                    "kernel": name[:90],
                    "a_frame": count // self.counted,
                    "us_a_frame": round(us / self.counted, 1),
                }
                self.report.emit("profile", way=way, songs=songs, position=position, **row)
        return ms

    def ratio(self, songs: int, position: int, timed: int) -> None:
        """Measure frames made in three ways, and the time of a plain loop relative to graphs and kernels."""
        ms = {way: self.frame(songs, position, way, timed) for way in ("graphs", "kernels", "loop")}
        if all(ms.values()):
            self.report.emit(
                "ratio",
                **self.common,
                songs=songs,
                position=position,
                **{f"{way}_ms": round(taken, 3) for way, taken in ms.items()},
                loop_by_graphs=round(ms["loop"] / ms["graphs"], 2),
                kernels_by_graphs=round(ms["kernels"] / ms["graphs"], 2),
            )

    def parking(self, position: int) -> None:
        """Park a song, bring it back, and prefill it instead; the second time its host memory is page-locked."""
        take(self.engine, "graphs")
        codes = codes_of(self.checkpoint, position - self.prompt)
        song = self._song(position)
        gb = self.engine.song_bytes(song) / 1e9
        for turn in (1, 2):
            try:
                prefill = self.device.milliseconds(lambda: self.engine.admit("song", song, codes))
                park = self.device.milliseconds(lambda: self.engine.park("song", codes))
                restore = self.device.milliseconds(lambda: self.engine.admit("song", song, codes))
            finally:
                self.engine.drop("song")
            self.report.emit(
                "parking",
                **self.common,
                turn=turn,
                position=position,
                gb=round(gb, 3),
                park_ms=round(park, 2),
                restore_ms=round(restore, 2),
                prefill_ms=round(prefill, 2),
            )

    def smaller(self, which: str) -> None:
        """Go on with int8 weights: of the decoder, or of all stacks."""
        self.engine.to_host()
        stacks = {"decoder": ("decoder",), "all": ("backbone", "decoder")}[which]
        self.engine = NativeEngine(self.checkpoint, self.device.name, self.dtype, self.slots, int8=stacks)
        self.int8 = which
        self.load()
        self.engine.to_device()

    def frame_bytes(self, songs: int, position: int) -> int:
        """Bytes of weights and of keys and values that a frame of guided songs at a position must read."""
        lm = self.checkpoint.lm
        itemsize: int = getattr(torch, self.dtype).itemsize
        weights = frame_weights(lm) * itemsize
        if self.int8 != "off":
            weights -= 7 * self._decoder_weights() * (itemsize - 1)
        if self.int8 == "all":
            d, books = lm.backbone.embed_dim, lm.num_codebooks - 1
            heads = lm.audio_vocab_size * (d + books * lm.decoder.embed_dim)
            weights -= (frame_weights(lm) - heads - 7 * self._decoder_weights()) * (itemsize - 1)
        backbone = lm.backbone
        entries = 2 * backbone.num_layers * backbone.num_kv_heads * backbone.head_dim * itemsize
        return weights + 2 * songs * position * entries

    def _decoder_weights(self) -> int:
        """Weights of the depth decoder's layers and of its projection."""
        lm = self.checkpoint.lm
        return stack_weights(lm.decoder) + lm.backbone.embed_dim * lm.decoder.embed_dim

    def _song(self, position: int, seed: int = 0) -> Song:
        return Song(prompt=prompt_of(self.prompt), max_frames=position - self.prompt + SPARE, seed=seed)

    def _step(self) -> float:
        """Milliseconds of a step: a frame of the device, as one is always in flight."""
        began = time.perf_counter()
        if any(frame is None for frame in self.engine.step().values()):
            raise RuntimeError("a song ended while it was measured")
        return (time.perf_counter() - began) * 1000
