"""The reference implementation behind the `TokenEngine` interface, for comparison. It is an optional dependency."""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from services.tokenizer_worker.engines.base import Song, check_frames
from services.tokenizer_worker.model import HeartMuLa, counter
from shared.errors import ConfigError, DeviceFull, PhaseError, SongError
from shared.model.checkpoint import Checkpoint, Flavor
from shared.model.weights import device_memory, free_unused


@dataclass(kw_only=True)
class SongState:
    """The song in the reference's one and only set of caches."""

    song: Song
    tokens: Tensor  # int64 [P + frames, codebooks + 1], the prompt and all frames so far
    cached: int = 0  # of these positions, how many are in the caches

    @property
    def frames(self) -> int:
        return len(self.tokens) - self.song.prompt.length


class HeartlibEngine:
    """A `TokenEngine` that drives heartlib's ``HeartMuLa.generate_frame``, one song at a time.

    Frames are counted and ended as by `NativeEngine`. On the CPU in float32 both make the same greedy songs; sampled
    songs differ, because noise comes from torch's generator, which is seeded for each frame, unless the reference is
    given the noise that `NativeEngine` counts. Faults of the reference are kept away from songs: its caches are built
    anew for each, because their batch size cannot change; temperature 0, where it returns token 0, becomes top-1;
    weights it would leave uninitialised are refused; and so are guidance below 1, which it ignores, and songs beyond
    its positions, where it fails at a late frame. A song that goes on prefills prompt and frames in one go, as its
    next frame is made. Codes that end a song are kept from it before `min_frames`.

    Raises `ConfigError` when heartlib is not installed.
    """

    notes: tuple[str, ...] = ()
    slots = 1

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: str) -> None:
        try:
            self._reference: Any = importlib.import_module("heartlib.heartmula.modeling_heartmula")
        except ImportError as error:
            raise ConfigError("HEARTMULA_ENGINE=heartlib needs heartlib: pip install '.[heartlib]'") from error
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._model: Any = None
        self._on_device = False
        self._songs: dict[str, SongState] = {}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        lm = self._checkpoint.lm
        with torch.device("meta"):
            parameters = sum(p.numel() for p in HeartMuLa(lm, self._dtype).parameters())
        return (parameters + lm.muq_dim * lm.backbone.embed_dim) * self._dtype.itemsize

    def song_bytes(self, song: Song) -> int:
        """Bytes of its caches, which hold every query head at every position, and of its causal mask."""
        lm = self._checkpoint.lm
        positions = lm.backbone.max_seq_len
        slots = lm.backbone.num_layers * lm.backbone.embed_dim * positions
        slots += lm.decoder.num_layers * lm.decoder.embed_dim * lm.num_codebooks
        return 2 * song.rows * slots * self._dtype.itemsize + positions**2 + lm.num_codebooks**2

    def load(self) -> None:
        """Load the checkpoint. Raises `ConfigError` for any error of heartlib, and for missing tensors."""
        folder, lm = self._checkpoint.lm_path, self._checkpoint.lm
        try:
            config = self._reference.HeartMuLaConfig.from_pretrained(str(folder))
            # It only knows the flavors of the published sizes.
            self._reference.FLAVORS[config.backbone_flavor] = functools.partial(self._stack, lm.backbone)
            self._reference.FLAVORS[config.decoder_flavor] = functools.partial(self._stack, lm.decoder)
            model, report = self._reference.HeartMuLa.from_pretrained(
                str(folder), config=config, dtype=self._dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"heartlib cannot load {folder}: {error}") from None
        if report["missing_keys"]:
            raise ConfigError(f"{folder}: tensor {min(report['missing_keys'])} missing")
        self._model = model.eval()

    def to_device(self) -> None:
        """Move the weights to the device.

        Raises `PhaseError` before `load`, and `DeviceFull` with the weights back on the host.
        """
        if self._model is None:
            raise PhaseError("the language model is not loaded")
        try:
            with device_memory():
                self._model.to(self._device)
        except DeviceFull:
            self.to_host()
            raise
        self._on_device = True

    def to_host(self) -> None:
        """Forget the songs and move the weights to the host."""
        self._on_device = False
        self._songs.clear()
        if self._model is not None:
            self._free_caches()
            self._model.to("cpu")
        free_unused(self._device)

    @torch.inference_mode()
    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        """Build the caches; the reference prefills while it makes the next frame.

        Raises `SongError` for guidance below 1 and for more positions than the model has, `PhaseError` when the weights
        are not on the device.
        """
        if not self._on_device:
            raise PhaseError("the language model is not on the device")
        if self._songs:
            raise ValueError(f"no slot for song {song_id}: {', '.join(self._songs)} of {self.slots} in the batch")
        lm = self._checkpoint.lm
        if song.cfg_scale < 1:
            raise SongError("heartlib has no guidance below 1")
        if song.prompt.length + song.max_frames > lm.backbone.max_seq_len:
            raise SongError(
                f"the prompt's {song.prompt.length} positions and {song.max_frames} frames "
                f"exceed the model's {lm.backbone.max_seq_len}"
            )
        if frames is None:
            frames = np.zeros((lm.num_codebooks, 0), np.int16)
        check_frames(frames, lm.num_codebooks, min(lm.audio_vocab_size, self._checkpoint.gen.audio_eos_id))
        tags, length = song.prompt.tags, song.prompt.length
        frames = frames[:, : song.max_frames]
        tokens = torch.zeros(length + frames.shape[1], lm.num_codebooks + 1, dtype=torch.long)
        tokens[:length, -1] = torch.tensor([*tags, self._checkpoint.gen.empty_id, *song.prompt.lyrics])
        tokens[length:, :-1] = torch.from_numpy(frames.T.astype(np.int64))
        try:
            with device_memory():
                self._model.setup_caches(song.rows)
        except DeviceFull:
            self._free_caches()
            raise
        self._songs[song_id] = SongState(song=song, tokens=tokens.to(self._device))

    @torch.inference_mode()
    def step(self) -> dict[str, np.ndarray | None]:
        """Make the next frame, int16 ``[8]``. Raises `PhaseError` when the weights are not on the device."""
        if not self._on_device:
            raise PhaseError("the language model is not on the device")
        made: dict[str, np.ndarray | None] = {}
        for song_id, state in list(self._songs.items()):
            try:
                with device_memory():
                    frame = self._next_frame(state) if state.frames < state.song.max_frames else None
            except DeviceFull:
                # Its caches count for themselves what was written to them, and some may have one position more.
                self._model.reset_caches()
                state.cached = 0
                raise
            if frame is None:
                self.drop(song_id)
            made[song_id] = frame
        return made

    def drop(self, song_id: str) -> None:
        """Forget a song; the caches go with it."""
        if self._songs.pop(song_id, None) is not None:
            self._free_caches()
            free_unused(self._device)

    def park(self, song_id: str, frames: np.ndarray) -> None:
        """Forget a song: the reference's caches are for the longest song, too large to be kept."""
        self.drop(song_id)

    def expire(self) -> None:
        """Keep nothing, so free nothing."""

    def _next_frame(self, state: SongState) -> np.ndarray | None:
        song, lm, rows = state.song, self._checkpoint.lm, state.song.rows
        positions = torch.arange(state.cached, len(state.tokens), device=self._device)  # [S], those not yet fed
        tokens = state.tokens[state.cached :]  # [S, codebooks + 1]
        unmasked = torch.zeros_like(tokens, dtype=torch.bool)
        unmasked[:, -1] = positions < song.prompt.length  # text in the prompt, then audio
        unmasked[:, :-1] = (positions >= song.prompt.length)[:, None]
        muq = None
        if state.cached == 0:
            muq = torch.zeros(rows, lm.muq_dim, dtype=self._dtype, device=self._device)
        greedy = song.temperature == 0
        generators = [self._device] if self._device.type == "cuda" else []
        with (
            self._without_end() if state.frames < song.min_frames else contextlib.nullcontext(),
            torch.random.fork_rng(devices=generators),
            torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32),
        ):
            torch.manual_seed(counter(song.seed, state.frames))
            chosen = self._model.generate_frame(
                tokens=tokens.expand(rows, -1, -1),
                tokens_mask=unmasked.expand(rows, -1, -1),
                input_pos=positions.expand(rows, -1),
                temperature=1.0 if greedy else song.temperature,
                topk=1 if greedy else min(song.topk, lm.audio_vocab_size),
                cfg_scale=song.cfg_scale,
                continuous_segments=muq,
                starts=None if muq is None else [len(song.prompt.tags)] * rows,
            )
        frame = F.pad(chosen[:1].long(), (0, 1))  # [1, codebooks + 1]
        codes: np.ndarray = chosen[0].to("cpu", torch.int16).numpy()
        state.tokens, state.cached = torch.cat((state.tokens, frame)), len(state.tokens)
        return None if (codes >= self._checkpoint.gen.audio_eos_id).any() else codes

    @contextlib.contextmanager
    def _without_end(self) -> Iterator[None]:
        """Keep the reference, which has no such option, from drawing codes that end a song."""
        reference, end = self._reference, self._checkpoint.gen.audio_eos_id
        draw = reference.sample_topk

        def draw_others(logits: Tensor, topk: int, temperature: float) -> Tensor:
            others = logits.clone()
            others[..., end:] = -torch.inf
            drawn: Tensor = draw(others, topk, temperature)
            return drawn

        reference.sample_topk = draw_others
        try:
            yield
        finally:
            reference.sample_topk = draw

    def _stack(self, flavor: Flavor) -> Any:
        return self._reference.llama3_2.llama3_2(
            vocab_size=1,  # its embedding is thrown away
            num_layers=flavor.num_layers,
            num_heads=flavor.num_heads,
            num_kv_heads=flavor.num_kv_heads,
            embed_dim=flavor.embed_dim,
            max_seq_len=flavor.max_seq_len,
            intermediate_dim=flavor.intermediate_dim,
            rope_base=500_000,
            scale_factor=32,
        )

    def _free_caches(self) -> None:
        for layer in [*self._model.backbone.layers, *self._model.decoder.layers]:
            layer.attn.kv_cache = None
