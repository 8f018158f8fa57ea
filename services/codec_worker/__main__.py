"""``python -m services.codec_worker``: configured by environment variables, see docs/configuration.md."""

import sys

from services.codec_worker.encode_stage import EncodeStage
from services.codec_worker.engines.base import CodecEngine
from services.codec_worker.stage import DecodeStage
from shared.device.info import Hardware
from shared.device.memory_plan import Placement, place
from shared.entrypoint import run
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.codec_windows import CodecWindows
from shared.model.encoder_sizes import chunks_at_once
from shared.settings import Settings
from shared.worker.process import WorkerProcess
from shared.worker.stage import JobStage

MOST_CHUNKS = 4  # of a recording at once on a GPU; on a CPU it is one, for there nothing is gained by more


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


def build_encoder(settings: Settings, checkpoint: Checkpoint, placement: Placement) -> EncodeStage | None:
    """Build the encoder's stage, on the codec's place; None where the checkpoint has no encoder.

    The reference engine has this project's encoder too: it makes the same codes in less memory.
    """
    if settings.engine == "trivial":
        from services.codec_worker.engines.trivial import TrivialEncoder

        engine = TrivialEncoder(settings.trivial_step_ms, swap_ms=settings.trivial_swap_ms)
        return EncodeStage(engine, "trivial", settings, placement, host_bytes=0)
    if checkpoint.encoder is None:
        return None
    from services.codec_worker.engines.encoder import NativeEncoder

    on_host = placement.device.kind == "cpu"
    most = 1 if on_host else MOST_CHUNKS
    batch = chunks_at_once(checkpoint.encoder, checkpoint.codec, placement.share, most=most)
    native = NativeEncoder(checkpoint, placement.device.torch_name, batch=batch)
    host_bytes = native.weight_bytes + (native.work_bytes if on_host else 0)
    return EncodeStage(native, checkpoint.encoder_path.name, settings, placement, host_bytes=host_bytes)


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. Raises as `WorkerProcess.run` does."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    engine, placement, name = build_engine(settings, checkpoint)
    stages: list[JobStage] = [DecodeStage(engine, name, settings)]
    if encoder := build_encoder(settings, checkpoint, placement):
        stages.append(encoder)
    await WorkerProcess(settings, stages, placement).run()


if __name__ == "__main__":
    sys.exit(run(serve))
