"""``python -m services.tokenizer_worker``: configured by environment variables, see docs/configuration.md."""

import sys

from services.tokenizer_worker.engines.base import TokenEngine
from services.tokenizer_worker.stage import TokenStage
from shared.device.info import Device, choose_device
from shared.entrypoint import run
from shared.errors import ConfigError
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.prompt import Prompter
from shared.settings import Settings
from shared.worker.process import WorkerProcess


def build_engine(settings: Settings, checkpoint: Checkpoint) -> tuple[TokenEngine, Device, str]:
    """Build the engine that the settings name. Returns it with its device and the name of its model.

    Raises `ConfigError` when the engine is not installed or the device does not exist.
    """
    if settings.engine == "trivial":  # runs where torch would only cost time
        from services.tokenizer_worker.engines.trivial import TrivialEngine

        device = choose_device(settings, cuda_available=False, force_cpu=settings.hybrid_mode)
        return TrivialEngine(settings.trivial_step_ms, settings.batch), device, "trivial"
    import torch

    device = choose_device(settings, cuda_available=torch.cuda.is_available(), force_cpu=settings.hybrid_mode)
    bf16 = device.kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = settings.model_dtype or ("float32" if device.kind == "cpu" else "bfloat16" if bf16 else "float16")
    name = f"HeartMuLa-oss-{checkpoint.lm.version}"
    if settings.engine == "heartlib":
        if settings.int8 != "off" or settings.compile:
            raise ConfigError("HEARTMULA_INT8 and HEARTMULA_COMPILE are the native engine's: unset them")
        from services.tokenizer_worker.engines.heartlib import HeartlibEngine

        return HeartlibEngine(checkpoint, device.torch_name, dtype), device, name
    from services.tokenizer_worker.engines.native import NativeEngine

    int8 = {"off": (), "decoder": ("decoder",), "all": ("backbone", "decoder")}[settings.int8]
    engine = NativeEngine(checkpoint, device.torch_name, dtype, settings.batch, int8=int8)
    return engine, device, name if settings.int8 == "off" else f"{name}-int8-{settings.int8}"


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. Raises as `WorkerProcess.run` does."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    engine, device, name = build_engine(settings, checkpoint)
    await WorkerProcess(settings, TokenStage(engine, Prompter(checkpoint), name, settings), device).run()


if __name__ == "__main__":
    sys.exit(run(serve))
