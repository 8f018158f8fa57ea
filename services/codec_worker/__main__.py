"""``python -m services.codec_worker``: configured by the environment, see README.md."""

import sys

from services.codec_worker.engine import CodecEngine
from services.codec_worker.stage import DecodeStage
from shared.checkpoint import Checkpoint, open_checkpoint
from shared.gpu import Device, choose_device
from shared.process import run
from shared.settings import Settings
from shared.worker import Worker


def build_engine(settings: Settings, checkpoint: Checkpoint) -> tuple[CodecEngine, Device, str]:
    """The engine that the settings name, its device, and its model's name.

    Raises `ConfigError` when the engine is not installed or the device does not exist.
    """
    if settings.engine == "trivial":  # runs where torch would only cost time
        from services.codec_worker.trivial import TrivialCodec

        return TrivialCodec(settings.trivial_step_ms), choose_device(settings, cuda_available=False), "trivial"
    import torch

    device = choose_device(settings, cuda_available=torch.cuda.is_available())
    # float32 unless asked for: half precision costs quality here before it gains speed.
    dtype = settings.model_dtype or "float32"
    if settings.engine == "heartlib":
        from services.codec_worker.heartlib_codec import HeartlibCodec

        return HeartlibCodec(checkpoint, device.torch_name, dtype), device, "HeartCodec-oss"
    from services.codec_worker.native import NativeCodec

    return NativeCodec(checkpoint, device.torch_name, dtype), device, "HeartCodec-oss"


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    engine, device, name = build_engine(settings, checkpoint)
    await Worker(settings, DecodeStage(engine, name, settings), device).run()


if __name__ == "__main__":
    sys.exit(run(serve))
