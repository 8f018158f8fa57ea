"""Precision of the codec: how far a song in other arithmetic is from the same song in float32.

TF32 is emulated: the factors of every product and convolution are rounded to 10 bits of mantissa, as the tensor cores
of a GPU do, and products are added up in float32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from services.codec_worker.engines.native import noise
from services.codec_worker.model import EulerSolver, HeartCodec, Schedule, WindowPlan, load_weights
from services.codec_worker.model.flow_matching import GUIDANCE
from shared.model.checkpoint import Checkpoint, open_checkpoint
from tests.bench import checkpoints
from tests.bench.rows import emit

DEMO = Path(__file__).parents[2] / "ckpt/demo"
CODES = 63  # five seconds
SEED = 1


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The arithmetic of the codec's two large parts, and what else differs."""

    dtype: torch.dtype = torch.float32  # of the estimator's matrices
    estimator_tf32: bool = False
    waveform_tf32: bool = False
    noise: float = 0.0  # part of the noise that is replaced by other noise
    seed: int = SEED


ARITHMETIC = {
    "float32": Arithmetic(),
    "TF32 estimator": Arithmetic(estimator_tf32=True),
    "TF32 waveform decoder": Arithmetic(waveform_tf32=True),
    "TF32 both": Arithmetic(estimator_tf32=True, waveform_tf32=True),
    "bfloat16": Arithmetic(dtype=torch.bfloat16),
    "bfloat16, TF32 waveform decoder": Arithmetic(dtype=torch.bfloat16, waveform_tf32=True),
    "float32, noise + 1e-3": Arithmetic(noise=1e-3),
    "float32, another seed": Arithmetic(seed=SEED + 1),
}


class EmulatedTF32(TorchFunctionMode):
    """Computes float32 products and convolutions as TF32 tensor cores do, apart from the order of their sums."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.conv2d):
            factors = [rounded(factor) for factor in args[:2]]
            return func(*factors, *args[2:], **kwargs)
        if func is F.scaled_dot_product_attention:
            q, k, v = map(rounded, args)
            seen = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
            return rounded(seen) @ v
        return func(*args, **kwargs)


def rounded(x: Tensor) -> Tensor:
    """Round float32 to 10 bits of mantissa, the nearest, ties away from zero (`cvt.rna.tf32`); others stay."""
    if x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Decoder:
    """Decodes one short song in any arithmetic; its models stay loaded."""

    def __init__(self, checkpoint: Checkpoint, steps: int) -> None:
        self._checkpoint, self._steps = checkpoint, steps
        self._plan = WindowPlan(CODES, checkpoint.codec.sample_rate)
        random = np.random.default_rng(0)
        self._codes = random.integers(0, checkpoint.codec.codebook_size, (8, CODES), dtype=np.int16)
        self._dtype, self._model = torch.float32, self._load(torch.float32)

    def _load(self, dtype: torch.dtype) -> HeartCodec:
        model = HeartCodec(self._checkpoint.codec, dtype).requires_grad_(False)
        load_weights(model, self._checkpoint.codec_path)
        return model

    def decode(self, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        """Latents fp32 ``[744, 256]`` of the song's only window, and waveform fp32 ``[2, samples]``."""
        if arithmetic.dtype != self._dtype:
            del self._model  # two of the default size take 10 GB
            self._dtype, self._model = arithmetic.dtype, self._load(arithmetic.dtype)
        model, plan, channels = self._model, self._plan, self._checkpoint.codec.out_channels
        start = noise(arithmetic.seed, 0, plan, channels)
        start = start + arithmetic.noise * noise(SEED + 2, 0, plan, channels)
        mu = model.quantizer(torch.from_numpy(plan.cut(self._codes, 0)).long())
        schedule = Schedule(model.estimator, self._steps)
        solver = EulerSolver(model.estimator, schedule, mu, start, torch.zeros(0, channels), GUIDANCE)
        with emulation(arithmetic.estimator_tf32):
            while not solver.finished:
                solver.step()
        with emulation(arithmetic.waveform_tf32):
            waveform = model.scalar(solver.latents, 0, plan.needed(0))
        return solver.latents, waveform


def emulation(tf32: bool) -> AbstractContextManager[object]:
    """The mode in which a part computes."""
    return EmulatedTF32() if tf32 else nullcontext()


def precision_all(folder: Path) -> None:
    """Measure both small checkpoints, and in two steps one of the default size with random weights."""
    precision_rows("golden", checkpoints.golden(folder / "golden"), 10)
    precision_rows("demo", open_checkpoint(DEMO), 10)
    precision_rows("default", checkpoints.codec(folder / "default"), 2)


def precision_rows(config: str, checkpoint: Checkpoint, steps: int) -> None:
    """Print the rows of a checkpoint."""
    for row in precision(checkpoint, steps):
        emit({"bench": "codec_precision", "config": config, **row})


@torch.inference_mode()
def precision(checkpoint: Checkpoint, steps: int) -> Iterator[dict[str, object]]:
    """For each arithmetic, how far latents and waveform are from those of float32."""
    decoder = Decoder(checkpoint, steps)
    latents, waveform = decoder.decode(ARITHMETIC["float32"])
    for name in sorted(ARITHMETIC, key=lambda name: ARITHMETIC[name].dtype == torch.bfloat16):  # two loads, not three
        if name == "float32":
            continue
        other_latents, other = decoder.decode(ARITHMETIC[name])
        convergence, magnitudes = spectral_distance(other, waveform)
        yield {
            "arithmetic": name,
            "steps": steps,
            "latents_apart": round(float((other_latents - latents).norm() / latents.norm()), 6),
            "snr_db": round(snr(other, waveform), 1),
            "spectral_convergence": round(convergence, 5),
            "log_magnitude_db": round(magnitudes, 3),
        }


def snr(other: Tensor, wanted: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    return float(10 * torch.log10(wanted.double().square().sum() / (other - wanted).double().square().sum()))


def spectral_distance(other: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Spectral convergence and mean difference of log magnitudes in dB, down to 80 dB below the peak: the means of
    three resolutions."""
    convergence, magnitudes = [], []
    for size in (512, 1024, 2048):
        a, b = (spectra(audio, size) for audio in (other, wanted))
        convergence.append(float((a - b).norm() / b.norm()))
        magnitudes.append(float((20 * (a / b).log10()).abs().mean()))
    return float(np.mean(convergence)), float(np.mean(magnitudes))


def spectra(audio: Tensor, size: int) -> Tensor:
    """Magnitudes of a short-time Fourier transform, floored 80 dB below their peak."""
    magnitudes = torch.stft(audio, size, size // 4, window=torch.hann_window(size), return_complex=True).abs()
    return magnitudes.clamp_min(1e-4 * magnitudes.max())
