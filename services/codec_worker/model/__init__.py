"""HeartCodec without its encoder: token frames → latents by flow matching → stereo waveform."""

from services.codec_worker.model.arithmetic import fused_attention, products
from services.codec_worker.model.estimator import Estimator
from services.codec_worker.model.flow_matching import EulerSolver, Schedule
from services.codec_worker.model.heartcodec import HeartCodec
from services.codec_worker.model.loading import load_weights
from services.codec_worker.model.waveform_decoder import ConvCache
from services.codec_worker.model.windows import Splicer, WindowPlan

__all__ = [
    "ConvCache",
    "Estimator",
    "EulerSolver",
    "HeartCodec",
    "Schedule",
    "Splicer",
    "WindowPlan",
    "fused_attention",
    "load_weights",
    "products",
]
