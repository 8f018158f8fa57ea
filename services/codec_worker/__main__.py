"""``python -m services.codec_worker``: configured by environment variables, see docs/configuration.md."""

import sys

from services.codec_worker.engines.base import CodecEngine
from services.codec_worker.stage import DecodeStage
from shared.device.info import Hardware
from shared.device.memory_plan import Placement, place
from shared.entrypoint import run
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.codec_windows import CodecWindows
from shared.settings import Settings
from shared.worker.process import WorkerProcess


def build_engine(settings: Settings, checkpoint: Checkpoint) -> tuple[CodecEngine, Placement, str]:
    """Build the engine that the settings name. Returns it with its place on a device and the name of its model.

    Raises `ConfigError` when the engine is not installed, or the device does not exist or is too small.
    """
    if settings.engine == "trivial":  # runs where torch would only cost time
        from services.codec_worker.engines.trivial import TrivialCodec

        placement = place(settings, checkpoint, Hardware(), "codec")
        windows = CodecWindows(*settings.trivial_window)
        times = {"window_ms": settings.trivial_window_ms, "swap_ms": settings.trivial_swap_ms}
        return TrivialCodec(settings.trivial_step_ms, windows=windows, **times), placement, "trivial"
    from shared.device.torch_devices import hardware

    placement = place(settings, checkpoint, hardware(), "codec")
    device, dtype = placement.device.torch_name, placement.dtype
    steps, guidance = settings.codec_steps, settings.codec_guidance
    if settings.engine == "heartlib":
        from services.codec_worker.engines.heartlib import HeartlibCodec

        return HeartlibCodec(checkpoint, device, dtype, steps=steps, guidance=guidance), placement, "HeartCodec-oss"
    from services.codec_worker.engines.native import NativeCodec

    return NativeCodec(checkpoint, device, dtype, steps=steps, guidance=guidance), placement, "HeartCodec-oss"


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. Raises as `WorkerProcess.run` does."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    engine, placement, name = build_engine(settings, checkpoint)
    await WorkerProcess(settings, DecodeStage(engine, name, settings), placement).run()


if __name__ == "__main__":
    sys.exit(run(serve))
