"""The native token engine: this project's own HeartMuLa behind the `TokenEngine` interface."""

import importlib
import logging
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.tokenizer_worker.cuda_graph import GraphRecorder
from services.tokenizer_worker.engines.base import Song, check_frames
from services.tokenizer_worker.engines.frames import BucketFrames, FrameMaker, LoopFrames, SongState
from services.tokenizer_worker.engines.parked import ParkedCaches
from services.tokenizer_worker.engines.prefill import begins_alike, last_input, prefill
from services.tokenizer_worker.model import HeartMuLa, KVCache, load_weights
from services.tokenizer_worker.model.frame import unsuitable
from services.tokenizer_worker.model.kernels.compiler import LEAST_CAPABILITY, missing_compiler
from shared.device.host_memory import spare_bytes
from shared.errors import PhaseError, SongError
from shared.model.checkpoint import Checkpoint
from shared.model.weights import Weights, device_memory, free_unused
from shared.worker.metrics import RESUMED

log = logging.getLogger(__name__)

# Looked up in host memory, a prompt at a time; on a device they would be a tenth of the weights.
_HOST_ONLY = ("text_embeddings",)


@dataclass(kw_only=True, eq=False)
class PendingFrame:
    """A frame of every song in the batch that the device was asked for and the host has not received."""

    states: list[SongState | None]  # None for a song that has been dropped since
    codes: Tensor  # int64 [songs, codebooks], on the host
    copied: torch.cuda.Event | None  # None: the codes are on the host already

    def receive(self) -> np.ndarray:
        """Wait for the device and return the codes, int16 ``[songs, codebooks]``."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.codes.numpy().astype(np.int16)


class NativeEngine:
    """A `TokenEngine` that runs the official weights on the CPU or one CUDA device.

    A step makes a frame of all songs at once. Rows of a batch share the weights and nothing else, so a song's frames do
    not depend on the others. In another batch sums may be added in another order, which in float32 changes a choice
    only between logits that agree to about six digits.

    On CUDA the device makes the next frame while the host handles the last one: a step returns the frame that the
    step before it started, so a song's first frame comes with its second step. Frames are made by `BucketFrames` and
    recorded as CUDA graphs; without a compiler for Triton's kernels, by `LoopFrames` as on the CPU: `notes` says so.

    `dtype` is float32, bfloat16 or float16; the stacks named in `int8` ("backbone", "decoder") keep their weights as
    int8. A song has at most `max_frames` frames in all, its first included; the reference makes one more. It ends
    before the first frame in which any code is `audio_eos_id` or above, even if that is its very first (the reference
    does not look at that one); until it has `min_frames` no such code is drawn. Other codes outside the codec's
    codebooks pass.

    Methods that allocate on the device raise `DeviceFull`. Errors hold no reference to a song's tensors.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str,
        dtype: str,
        slots: int = 1,
        *,
        int8: tuple[str, ...] = (),
    ) -> None:
        self.slots = slots
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        with torch.device("meta"):
            self._model = HeartMuLa(checkpoint.lm, self._dtype, int8)
        self._weights = Weights(self._model, self._device, host_only=_HOST_ONLY)
        self._parked = ParkedCaches(checkpoint.lm.backbone, self._dtype, self._device, spare_bytes)
        self.expire = self._parked.expire
        self._songs: dict[str, SongState] = {}
        self._frames: FrameMaker = LoopFrames(self._model, checkpoint.gen.audio_eos_id)
        self._pending: deque[PendingFrame] = deque()
        self._ahead = 0  # frames that stay pending between two steps
        self.notes: list[str] = []  # what is to be known of this engine
        if self._device.type == "cuda":
            self._ahead = 1
            self._choose_kernels()

    @property
    def weight_bytes(self) -> int:
        """Bytes that `to_device` moves: everything but the text embeddings, a little padding included."""
        return self._weights.nbytes

    def song_bytes(self, song: Song) -> int:
        """Bytes of a song's cache and of its place among the others.

        Activations come on top: those of a frame of all songs, and 512 positions' worth at `admit`.
        """
        rows, positions = song.rows, song.prompt.length + song.max_frames
        cache = KVCache.size(self._checkpoint.lm.backbone, rows, positions, self._dtype)
        return cache + self._frames.bytes_per_song(rows)

    def load(self) -> None:
        """Read the weights into host memory in the engine's dtype. Raises the `ConfigError`s of `load_weights`."""
        self._weights.load(lambda: load_weights(self._model, self._checkpoint.lm_path))
        if isinstance(self._frames, BucketFrames):
            importlib.import_module("torch._dynamo")  # for seconds; an operator's first call would, in the first frame

    def to_device(self) -> None:
        """Move the weights to the device.

        Raises `PhaseError` before `load`, and `DeviceFull` with the weights still on the host.
        """
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread, for events, graphs and kernels
            # Not asked before, because it opens a context on the device.
            if torch.cuda.get_device_capability(self._device) < LEAST_CAPABILITY:
                self._without_kernels("the card is older than those for which Triton compiles")
        self._weights.to_device()

    def to_host(self) -> None:
        """Drop the songs and the device's copy of the weights; parked caches stay. May be called at any time."""
        self._songs.clear()
        self._pending.clear()
        self._frames.release()
        self._weights.to_host()

    @device_memory()
    @torch.inference_mode()
    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        """Allocate the song's caches at their full size and fill all positions but the last: a step begins there.

        A parked song's caches are copied back, bit for bit, and those of a song that began alike are copied as they
        were then; all others are prefilled. In float32 a resumed song gets the frames that it would have got either
        way. In bfloat16 a parked one does so in the same batch, while after a
        prefill sums in another order may change a choice: on the two small checkpoints, songs stepped one at a time,
        logits differed by at most 2 % of the largest, and 12 of 105 songs came out different, from the 1st to the 127th
        frame after the interruption.

        Raises `SongError` when prompt and frames exceed the model's positions, `PhaseError` when the weights are not
        on the device.
        """
        model, lm = self._ready(), self._checkpoint.lm
        if song_id in self._songs or len(self._songs) == self.slots:
            raise ValueError(f"no slot for song {song_id}: {', '.join(self._songs)} of {self.slots} in the batch")
        positions, limit = song.prompt.length + song.max_frames, lm.backbone.max_seq_len
        if positions > limit:
            raise SongError(
                f"the prompt's {song.prompt.length} positions and {song.max_frames} frames exceed the model's {limit}"
            )
        if frames is None:
            frames = np.zeros((lm.num_codebooks, 0), np.int16)
        check_frames(frames, lm.num_codebooks, min(lm.audio_vocab_size, self._checkpoint.gen.audio_eos_id))
        frames = frames[:, : song.max_frames]
        made = torch.from_numpy(frames.T.astype(np.int64)).to(self._device)  # [T, 8]
        cache = model.backbone_cache(song.rows, positions)
        begun, source = self._parked.restore(song_id, song, frames, cache), "parked"
        if begun is None:
            begun, source = frames.copy(), "shared"
            if not self._share(song, frames, cache):
                prefill(model, song, made, cache)
                source = "prefilled"
        if len(made):
            RESUMED.labels(source).inc()
        state = SongState(
            song=song,
            begun=begun,
            cache=cache,
            embedded=last_input(model, song, made),
            launched=len(made),
            received=len(made),
        )
        self._frames.gather([*self._going(), state])  # now, because it may not fit
        self._songs[song_id] = state
        self._parked.drop(song_id)

    @device_memory()
    @torch.inference_mode()
    def step(self) -> dict[str, np.ndarray | None]:
        """Make the next frame of every song, int16 ``[8]``. Raises `PhaseError` without the weights on the device."""
        self._ready()
        going = self._going()
        if going:
            self._launch(going)
        names = {state: name for name, state in self._songs.items()}
        frames: dict[str, np.ndarray | None] = {
            name: None for name, state in self._songs.items() if state.received == state.song.max_frames
        }
        if len(self._pending) > self._ahead or (self._pending and not going):
            pending = self._pending.popleft()
            for state, codes in zip(pending.states, pending.receive(), strict=True):
                if state is not None:
                    state.received += 1
                    frames[names[state]] = None if (codes >= self._checkpoint.gen.audio_eos_id).any() else codes
        for name, frame in frames.items():
            if frame is None:
                self.drop(name)
        return frames

    def drop(self, song_id: str) -> None:
        """Drop a song, whether the weights are on the device or not; also one whose admission failed."""
        dropped = self._songs.pop(song_id, None)
        if dropped is not None:
            self._frames.part()
            for pending in self._pending:  # a frame of it may still be made, which must not keep its cache
                pending.states = [None if state is dropped else state for state in pending.states]
        dropped = None  # it holds the cache
        free_unused(self._device)

    def _share(self, song: Song, frames: np.ndarray, cache: KVCache) -> bool:
        """Copy what prefilling a song would leave from one that began alike; False where there is none."""
        for state in self._songs.values():
            if begins_alike(song, frames, state.song, state.begun):
                cache.copy_from(state.cache, song.prompt.length + frames.shape[1] - 1)
                return True
        return self._parked.share(song, frames, cache)

    def _going(self) -> list[SongState]:
        """Songs of which the device has more frames to make."""
        return [state for state in self._songs.values() if state.launched < state.song.max_frames]

    @device_memory()
    @torch.inference_mode()
    def park(self, song_id: str, frames: np.ndarray) -> None:
        """Drop a song but keep its caches for `admit`; a frame that is still being made will be made again."""
        try:
            if (state := self._songs.get(song_id)) is not None:
                if frames.shape[1] != state.received:
                    raise ValueError(f"{song_id} has {state.received} frames, not {frames.shape[1]}")
                self._parked.park(song_id, state.song, frames, state.begun, state.cache)
        finally:
            state = None  # it holds the caches
            self.drop(song_id)

    def _launch(self, going: list[SongState]) -> None:
        """Start the next frame of these songs on the device. After an error they are as they were before."""
        if set(self._frames.songs) != set(going):
            self._frames.gather(going)
        songs, on_cuda = self._frames.songs, self._device.type == "cuda"
        shape = (len(songs), self._checkpoint.lm.num_codebooks)
        # Whatever may fail comes before the frame: once that has been started, the songs are a frame further.
        codes = torch.empty(shape, dtype=torch.int64, pin_memory=on_cuda)
        copied = torch.cuda.Event(blocking=True) if on_cuda else None  # type: ignore[no-untyped-call]  # waits asleep
        codes.copy_(self._frames.make(), non_blocking=on_cuda)
        if copied is not None:
            copied.record()
        self._pending.append(PendingFrame(states=list(songs), codes=codes, copied=copied))
        for state in songs:
            state.launched += 1

    def _choose_kernels(self) -> None:
        """Decide how frames are made on CUDA, and how exact products of torch are."""
        # What float32 promises, and sums of 16-bit products in float32 to their end.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        obstacle = missing_compiler() or unsuitable(self._checkpoint.lm)
        self._frames = BucketFrames(self._model, self._checkpoint.gen.audio_eos_id, GraphRecorder)
        if obstacle is not None:
            self._without_kernels(obstacle)

    def _without_kernels(self, why: str) -> None:
        """Make frames in plain PyTorch from now on. There are no songs yet."""
        if isinstance(self._frames, BucketFrames):
            self._frames = LoopFrames(self._model, self._checkpoint.gen.audio_eos_id)
            self.notes.append(f"frames are made without this project's kernels, several times slower: {why}")
            log.warning("%s", self.notes[-1])

    def _ready(self) -> HeartMuLa:
        if not self._weights.on_device:
            raise PhaseError("the language model is not on the device")
        return self._model
