"""The native token engine: this project's own HeartMuLa behind the `TokenEngine` interface."""

import functools
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.tokenizer_worker.cuda_graph import Recording, cuda_graph
from services.tokenizer_worker.engines.base import Song, check_frames
from services.tokenizer_worker.engines.parked import ParkedCaches
from services.tokenizer_worker.engines.prefill import last_input, prefill, rows_of
from services.tokenizer_worker.model import BatchTensors, HeartMuLa, KVCache, Sampler, counter, load_weights
from shared.device.host_memory import spare_bytes
from shared.errors import PhaseError, SongError
from shared.model.checkpoint import Checkpoint
from shared.model.weights import Weights, device_memory

# Looked up in host memory, a prompt at a time; on a device they would be a tenth of the weights.
_HOST_ONLY = ("text_embeddings",)
# Attention looks at whole multiples of so many positions, so that frames can be recorded and played again.
_EXTENT = 256


@dataclass(kw_only=True, eq=False)
class SongState:
    """Everything that changes while a song is made, and all that its next frame needs.

    Tensors are on the device; once the song is in a batch they are views of the batch's tensors.
    """

    song: Song
    cache: KVCache  # of the backbone: positions 0 … prompt + max_frames − 1
    position: Tensor  # int64 [], the next one to be fed
    counter: Tensor  # int64 [], of the noise of the next frame
    embedded: Tensor  # [rows, D], what is fed next
    launched: int  # frames that the device has made or was asked to make
    received: int  # frames of these that have reached the host


@dataclass(kw_only=True, eq=False)
class PendingFrame:
    """A frame of every song in the batch that the device was asked for and the host has not received."""

    states: list[SongState]
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
    step before it started, so a song's first frame comes with its second step. Frames are recorded as CUDA graphs.

    `dtype` is float32, bfloat16 or float16; the stacks named in `int8` ("backbone", "decoder") keep their weights as
    int8. A song has at most `max_frames` frames in all, its first included; the reference makes one more. It ends
    before the first frame in which any code is `audio_eos_id` or above, even if that is its very first (the reference
    does not look at that one). Other codes outside the codec's codebooks pass.

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
        compiled: bool = False,
    ) -> None:
        self.slots = slots
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        with torch.device("meta"):
            self._model = HeartMuLa(checkpoint.lm, self._dtype, int8)
        self._next_frame = torch.compile(self._model.next_frame) if compiled else self._model.next_frame
        self._weights = Weights(self._model, self._device, host_only=_HOST_ONLY)
        self._parked = ParkedCaches(checkpoint.lm.backbone, self._dtype, self._device, spare_bytes)
        self.expire = self._parked.expire
        self._songs: dict[str, SongState] = {}
        self._going: list[SongState] = []  # the songs of the batch in the order of its rows: those with guidance first
        self._batch: BatchTensors | None = None  # until the first step after a song has left
        self._pending: deque[PendingFrame] = deque()
        self._ahead = 1 if self._device.type == "cuda" else 0  # frames that stay pending between two steps
        self._recording = Recording(cuda_graph if self._device.type == "cuda" else None)

    @property
    def weight_bytes(self) -> int:
        """Bytes that `to_device` moves: everything but the text embeddings, a little padding included."""
        return self._weights.nbytes

    def song_bytes(self, song: Song) -> int:
        """Bytes of a `SongState` and of its rows of the `BatchTensors`.

        Activations come on top: those of a frame of all songs, and 512 positions' worth at `admit`.
        """
        lm, rows = self._checkpoint.lm, rows_of(song)
        backbone = KVCache.size(lm.backbone, rows, song.prompt.length + song.max_frames, self._dtype)
        depth = KVCache.size(lm.decoder, rows, lm.num_codebooks, self._dtype)
        numbers = 8 * (2 + lm.num_codebooks)  # position, counter, codes
        return backbone + depth + rows * lm.backbone.embed_dim * self._dtype.itemsize + Sampler.BYTES + numbers

    def load(self) -> None:
        """Read the weights into host memory in the engine's dtype. Raises the `ConfigError`s of `load_weights`."""
        self._weights.load(lambda: load_weights(self._model, self._checkpoint.lm_path))

    def to_device(self) -> None:
        """Move the weights to the device.

        Raises `PhaseError` before `load`, and `DeviceFull` with the weights still on the host.
        """
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread, for events and graphs
        self._weights.to_device()

    def to_host(self) -> None:
        """Drop the songs and the device's copy of the weights; parked caches stay. May be called at any time."""
        self._songs.clear()
        self._pending.clear()
        self._dissolve_batch()
        self._weights.to_host()

    @device_memory()
    @torch.inference_mode()
    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        """Allocate the song's caches at their full size and fill all positions but the last: a step begins there.

        A parked song's caches are copied back, bit for bit; all others are prefilled. In float32 a resumed song gets
        the frames that it would have got either way. In bfloat16 a parked one does so in the same batch, while after a
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
        made = torch.from_numpy(frames[:, : song.max_frames].T.astype(np.int64)).to(self._device)  # [T, 8]
        cache = model.backbone_cache(rows_of(song), positions)
        if not self._parked.restore(song_id, song, frames, cache):
            prefill(model, song, made, cache)
        state = SongState(
            song=song,
            cache=cache,
            position=torch.tensor(song.prompt.length + len(made) - 1, device=self._device),
            counter=torch.tensor(counter(song.seed, len(made)), device=self._device),
            embedded=last_input(model, song, made),
            launched=len(made),
            received=len(made),
        )
        self._form_batch([*self._songs.values(), state])
        self._songs[song_id] = state
        self._parked.drop(song_id)

    @device_memory()
    @torch.inference_mode()
    def step(self) -> dict[str, np.ndarray | None]:
        """Make the next frame of every song, int16 ``[8]``. Raises `PhaseError` without the weights on the device."""
        self._ready()
        going = [state for state in self._songs.values() if state.launched < state.song.max_frames]
        if going:
            self._launch(going)
        names = {state: name for name, state in self._songs.items()}
        frames: dict[str, np.ndarray | None] = {
            name: None for name, state in self._songs.items() if state.received == state.song.max_frames
        }
        if len(self._pending) > self._ahead or (self._pending and not going):
            pending = self._pending.popleft()
            for state, codes in zip(pending.states, pending.receive(), strict=True):
                if state in names:  # it has not been dropped meanwhile
                    state.received += 1
                    frames[names[state]] = None if (codes >= self._checkpoint.gen.audio_eos_id).any() else codes
        for name, frame in frames.items():
            if frame is None:
                self.drop(name)
        return frames

    def drop(self, song_id: str) -> None:
        """Drop a song, whether the weights are on the device or not."""
        if self._songs.pop(song_id, None) is not None:
            self._dissolve_batch()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    @device_memory()
    @torch.inference_mode()
    def park(self, song_id: str, frames: np.ndarray) -> None:
        """Drop a song but keep its caches for `admit`; a frame that is still being made will be made again."""
        try:
            if (state := self._songs.get(song_id)) is not None:
                if frames.shape[1] != state.received:
                    raise ValueError(f"{song_id} has {state.received} frames, not {frames.shape[1]}")
                self._parked.park(song_id, state.song, frames, state.cache)
        finally:
            state = None  # it holds the caches
            self.drop(song_id)

    def _form_batch(self, states: list[SongState]) -> None:
        """Put these songs into one batch. They change only once everything has been allocated."""
        self._dissolve_batch()  # its memory first
        states = sorted(states, key=lambda state: -rows_of(state.song))
        guided = [state for state in states if rows_of(state.song) == 2]
        songs = [state.song for state in states]
        sampler = Sampler(
            [song.temperature for song in songs],
            [song.topk for song in songs],
            [song.cfg_scale for song in songs],
            self._device,
        )
        books = self._checkpoint.lm.num_codebooks
        batch = BatchTensors(
            caches=[state.cache for state in states],
            depth_cache=self._model.depth_cache(len(states) + len(guided)),
            sampler=sampler,
            positions=torch.stack([state.position for state in states]),
            counters=torch.stack([state.counter for state in states]),
            embedded=torch.stack([s.embedded[0] for s in states] + [s.embedded[1] for s in guided]),
            codes=torch.empty(len(states), books, dtype=torch.int64, device=self._device),
        )
        for index, state in enumerate(states):
            state.position, state.counter = batch.positions[index], batch.counters[index]
            state.embedded = batch.embedded[index :: len(states)]
        self._batch, self._going = batch, states

    def _dissolve_batch(self) -> None:
        self._recording.forget()
        self._batch, self._going = None, []

    def _launch(self, going: list[SongState]) -> None:
        """Start the next frame of these songs on the device. After an error they are as they were before."""
        if self._batch is None or len(self._going) != len(going):
            self._form_batch(going)
        batch, states = self._batch, self._going
        assert batch is not None
        furthest = max(state.song.prompt.length + state.launched for state in states)  # positions, the next included
        seen = -(-furthest // _EXTENT) * _EXTENT
        # No closure: the stack frame in an error's traceback would keep the batch alive.
        self._recording.run(functools.partial(self._next_frame, batch, seen), shapes=seen)
        copied = None
        if self._device.type == "cuda":
            codes = torch.empty(batch.codes.shape, dtype=torch.int64, pin_memory=True)
            codes.copy_(batch.codes, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        else:
            codes = batch.codes.clone()
        self._pending.append(PendingFrame(states=states, codes=codes, copied=copied))
        for state in states:
            state.launched += 1

    def _ready(self) -> HeartMuLa:
        if not self._weights.on_device:
            raise PhaseError("the language model is not on the device")
        return self._model
