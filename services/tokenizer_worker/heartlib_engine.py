"""The reference implementation behind the `TokenEngine` interface, for comparison. It is an optional dependency."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.tokenizer_worker.engine import Song
from services.tokenizer_worker.model import HeartMuLa, frame_seed
from shared.checkpoint import Checkpoint, Flavor
from shared.errors import ConfigError, DeviceFull, PhaseError, SongError


@dataclass(kw_only=True)
class SongState:
    """The song in the reference's one and only set of caches."""

    song: Song
    prompt: Tensor  # int64 [rows, P, codebooks + 1]
    frames: int = 0
    last: Tensor | None = None  # int [rows, codebooks], the frame made last


class HeartlibEngine:
    """A `TokenEngine` that drives heartlib's ``HeartMuLa.generate_frame``, one song at a time.

    Frames are counted, ended and seeded as by `NativeEngine`; on the CPU in float32 both make the same songs. Faults of
    the reference are kept away from songs: its caches are built anew for each, because their batch size cannot
    change; temperature 0, where it returns token 0, becomes top-1; weights it would leave uninitialised are refused;
    and so are guidance below 1, which it ignores, and songs beyond its positions, where it fails at a late frame.

    Raises `ConfigError` when heartlib is not installed.
    """

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
        return 2 * _rows(song) * slots * self._dtype.itemsize + positions**2 + lm.num_codebooks**2

    def load(self) -> None:
        """Raises `ConfigError` for whatever heartlib stumbles over, and for tensors it would not miss."""
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
        """Raises `PhaseError` before `load`, and `DeviceFull` with the weights back on the host."""
        if self._model is None:
            raise PhaseError("the language model is not loaded")
        try:
            self._model.to(self._device)
        except torch.OutOfMemoryError as error:
            self.to_host()
            raise DeviceFull(f"the device's memory is full: {error}") from None
        self._on_device = True

    def to_host(self) -> None:
        """Forget the songs and move the weights to the host."""
        self._on_device = False
        self._songs.clear()
        if self._model is not None:
            self._free_caches()
            self._model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def admit(self, song_id: str, song: Song) -> None:
        """Build the caches; the reference prefills while it makes the first frame.

        Raises `SongError` for guidance below 1 and for more positions than the model has, `ValueError` when there is
        no free slot, `PhaseError` when the weights are not on the device.
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
        tags, lyrics = song.prompt.tags, song.prompt.lyrics
        prompt = torch.zeros(_rows(song), song.prompt.length, lm.num_codebooks + 1, dtype=torch.long)
        prompt[:, :, -1] = torch.tensor([*tags, self._checkpoint.gen.empty_id, *lyrics])
        try:
            self._model.setup_caches(_rows(song))
        except torch.OutOfMemoryError as error:
            self._free_caches()
            raise DeviceFull(f"the device's memory is full: {error}") from None
        self._songs[song_id] = SongState(song=song, prompt=prompt.to(self._device))

    @torch.inference_mode()
    def step(self) -> dict[str, np.ndarray | None]:
        """Frames are int16 ``[8]``. Raises `PhaseError` when the weights are not on the device."""
        if not self._on_device:
            raise PhaseError("the language model is not on the device")
        made: dict[str, np.ndarray | None] = {}
        for song_id, state in list(self._songs.items()):
            frame = self._next_frame(state) if state.frames < state.song.max_frames else None
            if frame is None:
                self.drop(song_id)
            made[song_id] = frame
        return made

    def drop(self, song_id: str) -> None:
        """Forget a song; the caches go with it."""
        if self._songs.pop(song_id, None) is not None:
            self._free_caches()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _next_frame(self, state: SongState) -> np.ndarray | None:
        song, lm = state.song, self._checkpoint.lm
        rows, length, _ = state.prompt.shape
        if state.last is None:
            tokens = state.prompt
            positions = torch.arange(length, device=self._device).expand(rows, -1)  # [rows, P]
            muq = torch.zeros(rows, lm.muq_dim, dtype=self._dtype, device=self._device)
        else:
            tokens = torch.zeros(rows, 1, lm.num_codebooks + 1, dtype=torch.long, device=self._device)
            tokens[:, 0, :-1] = state.last
            positions = torch.full((rows, 1), length + state.frames - 1, device=self._device)
            muq = None
        unmasked = torch.zeros_like(tokens, dtype=torch.bool)
        if state.last is None:
            unmasked[:, :, -1] = True
        else:
            unmasked[:, :, :-1] = True
        greedy = song.temperature == 0
        generators = [self._device] if self._device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=generators),
            torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32),
        ):
            torch.manual_seed(frame_seed(song.seed, state.frames))
            state.last = self._model.generate_frame(
                tokens=tokens,
                tokens_mask=unmasked,
                input_pos=positions,
                temperature=1.0 if greedy else song.temperature,
                topk=1 if greedy else min(song.topk, lm.audio_vocab_size),
                cfg_scale=song.cfg_scale,
                continuous_segments=muq,
                starts=None if muq is None else [len(song.prompt.tags)] * rows,
            )
        assert state.last is not None
        state.frames += 1
        codes: np.ndarray = state.last[0].to("cpu", torch.int16).numpy()
        return None if (codes >= self._checkpoint.gen.audio_eos_id).any() else codes

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


def _rows(song: Song) -> int:
    return 1 if song.cfg_scale == 1 else 2
