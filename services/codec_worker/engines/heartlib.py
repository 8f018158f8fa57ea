"""The reference implementation behind the `CodecEngine` interface, for comparison. It is an optional dependency."""

import importlib
from functools import cached_property
from typing import Any

import numpy as np
import torch

from services.codec_worker.engines.base import NOTHING_KEPT, DecodeState, DecodeStep, DecodeSteps, KeptWindows
from services.codec_worker.engines.identity import identity_of
from services.codec_worker.model import HeartCodec
from services.codec_worker.model.flow_matching import GUIDANCE, STEPS
from shared.errors import ConfigError, DeviceFull, PhaseError
from shared.model.checkpoint import Checkpoint
from shared.model.sizes import WINDOW_LATENTS, codec_work
from shared.model.weights import device_memory, free_unused


class HeartlibCodec:
    """A `CodecEngine` that drives heartlib's ``HeartCodec.detokenize``: a whole song in one step, so that neither
    cancellation nor progress comes before its end.

    What the reference does to songs of some lengths, losing their last sample or their last seconds, and to codes
    beyond the codebooks, it does here too. Raises `ConfigError` when heartlib is not installed.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, checkpoint: Checkpoint, device: str, dtype: str, *, steps: int = STEPS, guidance: float = GUIDANCE
    ) -> None:
        try:
            self._reference: Any = importlib.import_module("heartlib.heartcodec.modeling_heartcodec")
        except ImportError as error:
            raise ConfigError("HEARTMULA_ENGINE=heartlib needs heartlib: pip install '.[heartlib]'") from error
        self.sample_rate = checkpoint.codec.sample_rate
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._options: dict[str, Any] = {"num_steps": steps, "guidance_scale": guidance, "disable_progress": True}
        self._model: Any = None
        self._on_device = False
        with torch.device("meta"):
            self._blank = HeartCodec(checkpoint.codec, torch.float32)

    @cached_property
    def identity(self) -> str:
        """The weights and the settings. Raises `OSError` when the checkpoint is gone."""
        options = self._options
        return identity_of("heartlib", self._checkpoint, options["num_steps"], options["guidance_scale"])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, the encoder's included; before `load`, of those that decoding needs."""
        if self._model is None:
            return self._blank.weight_bytes
        return sum(int(p.nbytes) for p in self._model.parameters())

    @property
    def work_bytes(self) -> int:
        """Upper estimate of the memory for decoding: the reference makes the whole waveform of a window at once."""
        return codec_work(self._checkpoint.codec, WINDOW_LATENTS)

    def load(self) -> None:
        """Load the checkpoint. Raises `ConfigError` for any error of heartlib."""
        folder = self._checkpoint.codec_path
        try:
            model = self._reference.HeartCodec.from_pretrained(str(folder), dtype=self._dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"heartlib cannot load {folder}: {error}") from None
        self._model = model.eval()

    def to_device(self) -> None:
        """Move the weights to the device.

        Raises `PhaseError` before `load`, and `DeviceFull` with the weights back on the host.
        """
        if self._model is None:
            raise PhaseError("the codec is not loaded")
        try:
            with device_memory():
                self._model.to(self._device)
        except DeviceFull:
            self.to_host()
            raise
        self._on_device = True

    def to_host(self) -> None:
        """Move the weights to the host."""
        self._on_device = False
        if self._model is not None:
            self._model.to("cpu")
        free_unused(self._device)

    def decode(self, codes: np.ndarray, *, seed: int) -> DecodeSteps:
        """Decode the whole song in one step. Raises `PhaseError` or `DeviceFull`."""
        if not self._on_device:
            raise PhaseError("the codec is not on the device")
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with device_memory(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                waveform = self._model.detokenize(torch.from_numpy(codes.astype(np.int64)), **self._options)
                audio = np.ascontiguousarray(waveform.float().cpu().numpy().T)
        finally:
            waveform = None
            free_unused(self._device)
        yield DecodeStep(1, 1, audio)

    def advance(
        self, state: DecodeState, codes: np.ndarray, *, ended: bool, kept: KeptWindows = NOTHING_KEPT
    ) -> DecodeSteps:
        """Decode the song once it has ended: the reference decodes whole songs only, and keeps nothing of others."""
        if ended:
            yield from self.decode(codes, seed=state.seed)
