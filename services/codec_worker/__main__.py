"""``python -m services.codec_worker``: configured by environment variables, see docs/configuration.md."""

import sys

from services.codec_worker.engines.base import CodecEngine
from services.codec_worker.stage import DecodeStage
from shared.device.info import Device, choose_device
from shared.entrypoint import run
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.settings import Settings
from shared.worker.process import WorkerProcess


def build_engine(settings: Settings, checkpoint: Checkpoint) -> tuple[CodecEngine, Device, str]:
    """Build the engine that the settings name. Returns it with its device and the name of its model.

    Raises `ConfigError` when the engine is not installed or the device does not exist.
    """
    if settings.engine == "trivial":  # runs where torch would only cost time
        from services.codec_worker.engines.trivial import TrivialCodec

        return TrivialCodec(settings.trivial_step_ms), choose_device(settings, cuda_available=False), "trivial"
    import torch

    device = choose_device(settings, cuda_available=torch.cuda.is_available())
    steps, guidance = settings.codec_steps, settings.codec_guidance
    if settings.engine == "heartlib":
        from services.codec_worker.engines.heartlib import HeartlibCodec

        dtype = settings.model_dtype or "float32"  # as the reference runs it
        reference = HeartlibCodec(checkpoint, device.torch_name, dtype, steps=steps, guidance=guidance)
        return reference, device, "HeartCodec-oss"
    from services.codec_worker.engines.native import NativeCodec

    # bfloat16 where it is faster. float16 never unasked: its range is narrower than that of the weights.
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.kind == "cuda"
        else torch.cpu._is_amx_tile_supported()
    )
    dtype = settings.model_dtype or ("bfloat16" if fast else "float32")
    return NativeCodec(checkpoint, device.torch_name, dtype, steps=steps, guidance=guidance), device, "HeartCodec-oss"


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. Raises as `WorkerProcess.run` does."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    engine, device, name = build_engine(settings, checkpoint)
    await WorkerProcess(settings, DecodeStage(engine, name, settings), device).run()


if __name__ == "__main__":
    sys.exit(run(serve))
