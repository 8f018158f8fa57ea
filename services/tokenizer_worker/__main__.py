"""``python -m services.tokenizer_worker``: configured by the environment, see README.md."""

import sys

from services.tokenizer_worker.engine import TokenEngine
from services.tokenizer_worker.stage import TokenStage
from shared.checkpoint import Checkpoint, open_checkpoint
from shared.gpu import Device, choose_device
from shared.process import run
from shared.prompt import Prompter
from shared.settings import Settings
from shared.worker import Worker


def build_engine(settings: Settings, checkpoint: Checkpoint) -> tuple[TokenEngine, Device, str]:
    """The engine that the settings name, its device, and its model's name.

    Raises `ConfigError` when the engine is not installed or the device does not exist.
    """
    if settings.engine == "trivial":  # runs where torch would only cost time
        from services.tokenizer_worker.trivial import TrivialEngine

        device = choose_device(settings, cuda_available=False, force_cpu=settings.hybrid_mode)
        return TrivialEngine(settings.trivial_step_ms, settings.batch), device, "trivial"
    import torch

    device = choose_device(settings, cuda_available=torch.cuda.is_available(), force_cpu=settings.hybrid_mode)
    bf16 = device.kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = settings.model_dtype or ("float32" if device.kind == "cpu" else "bfloat16" if bf16 else "float16")
    name = f"HeartMuLa-oss-{checkpoint.lm.version}"
    if settings.engine == "heartlib":
        from services.tokenizer_worker.heartlib_engine import HeartlibEngine

        return HeartlibEngine(checkpoint, device.torch_name, dtype), device, name
    from services.tokenizer_worker.native import NativeEngine

    return NativeEngine(checkpoint, device.torch_name, dtype, settings.batch), device, name


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    engine, device, name = build_engine(settings, checkpoint)
    await Worker(settings, TokenStage(engine, Prompter(checkpoint), name, settings), device).run()


if __name__ == "__main__":
    sys.exit(run(serve))
