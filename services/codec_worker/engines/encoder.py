"""The native encoder engine: this project's own encoder of HeartCodec, from recordings to codes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch

from services.codec_worker.encoder.heartencoder import HeartEncoder, stereo
from services.codec_worker.encoder.loading import load_encoder
from services.codec_worker.encoder.recording import Recording, signals
from services.codec_worker.engines.base import EncodeStep, EncodeSteps
from services.codec_worker.engines.identity import encoder_identity
from services.codec_worker.model import products
from shared.errors import ConfigError, PhaseError
from shared.model.checkpoint import Checkpoint
from shared.model.encoder_sizes import encoder_work
from shared.model.weights import Weights, device_memory, free_unused

PARTS = ("stem", "conformer", "wavlm", "whisper", "query")
"""What the steps of a chunk compute, one after another; signals before the first, codes with the last."""


class NativeEncoder:
    """Encodes recordings in chunks of 29.76 s on the CPU or one CUDA device, `batch` chunks at a time.

    Everything is float32, without TF32: in lower precision the codes of the deeper codebooks change. Chunks do not
    see each other: encoding may be left after any of them, and taken up there by another engine of this `identity`.
    """

    def __init__(self, checkpoint: Checkpoint, device: str, *, batch: int = 1) -> None:
        """Raises `ConfigError` for a checkpoint without an encoder, or with one that does not fit its codec."""
        if checkpoint.encoder is None:
            raise ConfigError(
                f"{checkpoint.encoder_path} is missing: recordings need it; `make models ENCODER=1` fetches it"
            )
        config, codec = checkpoint.encoder, checkpoint.codec
        if config.query.dim != codec.dim:
            raise ConfigError(
                f"{checkpoint.encoder_path} makes vectors of {config.query.dim} values, and {checkpoint.codec_path} "
                f"quantises {codec.dim}: the encoder and the codec must belong together"
            )
        self._checkpoint, self._batch = checkpoint, batch
        self._device = torch.device(device)
        with torch.device("meta"):
            self._model = HeartEncoder(config, codec)
        self._weights = Weights(self._model, self._device)

    @cached_property
    def identity(self) -> str:
        """What codes follow from beside the recording: the networks and the codebooks.

        Raises `OSError` when the checkpoint is gone.
        """
        return encoder_identity("native", self._checkpoint)

    @property
    def weight_bytes(self) -> int:
        """Bytes that `to_device` moves."""
        return self._weights.nbytes

    @property
    def work_bytes(self) -> int:
        """Bytes that encoding needs beside the weights; an upper estimate."""
        return encoder_work(self._model.config, self._checkpoint.codec, self._batch)

    def load(self) -> None:
        """Read the weights into host memory. Raises `ConfigError`."""
        self._weights.load(lambda: load_encoder(self._model, self._checkpoint))

    def to_device(self) -> None:
        """Move the weights to the device. Raises `PhaseError` before `load`, `DeviceFull` with nothing changed."""
        self._weights.to_device()

    def to_host(self) -> None:
        """Drop the device's copy of the weights, and give its memory back to the driver."""
        self._weights.to_host()

    def encode(self, audio: np.ndarray, sample_rate: int, *, first: int = 0) -> EncodeSteps:
        """Encode ``audio``, float32 ``[1 or 2, samples]`` at `sample_rate` Hz, from its chunk `first` on.

        Some chunks take a step for each of `PARTS`; with the last comes their codes, final as they are. The codes of
        all chunks together are the recording's: `Recording.frames`, of which the last may hold padding.
        Of the audio only the chunk in work is read, so an array that is mapped from a file never is in memory as a
        whole.

        Raises `ValueError` for audio of another shape or dtype, `PhaseError` when the weights are not on the device,
        `DeviceFull`.
        """
        recording = Recording(audio, sample_rate)
        if not 0 <= first < recording.chunks:
            raise ValueError(f"a recording of {recording.chunks} chunks has no chunk {first}")
        if not self._weights.on_device:
            raise PhaseError("the encoder is not on the device")
        return self._released(self._encode(recording, first))

    def _released(self, steps: EncodeSteps) -> EncodeSteps:
        """Steps after which the device's work memory goes back to the driver, however they end."""
        try:
            with device_memory():
                yield from steps
        finally:
            free_unused(self._device)

    def _encode(self, recording: Recording, first: int) -> EncodeSteps:
        starts = range(first, recording.chunks, self._batch)
        done, total = 0, len(PARTS) * len(starts)
        for start in starts:
            chunks = range(start, min(start + self._batch, recording.chunks))
            for codes in self._parts(recording, chunks):
                done += 1
                yield EncodeStep(done, total, codes)

    def _parts(self, recording: Recording, chunks: Sequence[int]) -> Iterator[np.ndarray | None]:
        """Compute the parts of some chunks, one for each ``next()``; the last one has their codes."""
        rows = [recording.chunk(index) for index in chunks]
        channels = [len(chunk) for chunk in rows]
        heard, model = signals(torch.cat(rows), self._model.config), self._model
        with _computing():
            x = model.muencoder.conv(heard.mel.to(self._device))
        yield None
        with _computing():
            acoustic, semantic = model.muencoder.conformer(x)
            del x
        yield None
        with _computing():
            wavlm = model.wavlm(heard.audio.to(self._device))
        yield None
        with _computing():
            whisper = model.whisper(heard.whisper_mel.to(self._device))
        yield None
        with _computing():
            streams = [stereo(stream, channels) for stream in (acoustic, semantic, whisper, wavlm)]
            codes = model.quantizer(model.query(*streams)).cpu()  # [8, chunks, 372]
        final = [codes[:, n, : recording.frames_of(index)] for n, index in enumerate(chunks)]
        yield torch.cat(final, dim=1).numpy().astype(np.int16)


@contextmanager
def _computing() -> Iterator[None]:
    """Entered within each step: around a generator, inference mode would leak into its caller."""
    with torch.inference_mode(), products(tf32=False):
        yield
