"""``python -m services.tokenizer_worker``: configured by environment variables, see docs/configuration.md."""

import logging
import sys

from services.tokenizer_worker.engines.base import TokenEngine
from services.tokenizer_worker.stage import TokenStage
from shared.device.info import Hardware
from shared.device.memory_plan import Placement, place
from shared.entrypoint import run
from shared.errors import ConfigError
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.prompt import Prompter
from shared.settings import Settings
from shared.worker.process import WorkerProcess

log = logging.getLogger(__name__)


def build_engine(settings: Settings, checkpoint: Checkpoint) -> tuple[TokenEngine, Placement, str]:
    """Build the engine that the settings name. Returns it with its place on a device and the name of its model.

    Raises `ConfigError` when the engine is not installed, or the device does not exist or is too small.
    """
    if settings.engine == "trivial":  # runs where torch would only cost time
        from services.tokenizer_worker.engines.trivial import TrivialEngine

        placement = place(settings, checkpoint, Hardware(), "tokenizer")
        engine: TokenEngine = TrivialEngine(settings.trivial_step_ms, placement.slots, swap_ms=settings.trivial_swap_ms)
        return engine, placement, "trivial"
    from shared.device.torch_devices import hardware

    if settings.compile:
        log.warning("HEARTMULA_COMPILE has no effect: frames on CUDA are kernels of this project's in a graph")
    placement = place(settings, checkpoint, hardware(), "tokenizer")
    device, dtype = placement.device.torch_name, placement.dtype
    name = f"HeartMuLa-oss-{checkpoint.lm.version}"
    if settings.engine == "heartlib":
        if settings.int8 != "off":
            raise ConfigError("HEARTMULA_INT8 is the native engine's: unset it")
        from services.tokenizer_worker.engines.heartlib import HeartlibEngine

        return HeartlibEngine(checkpoint, device, dtype), placement, name
    from services.tokenizer_worker.engines.native import NativeEngine

    int8 = {"off": (), "decoder": ("decoder",), "all": ("backbone", "decoder")}[settings.int8]
    engine = NativeEngine(checkpoint, device, dtype, placement.slots, int8=int8)
    return engine, placement, name if settings.int8 == "off" else f"{name}-int8-{settings.int8}"


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. Raises as `WorkerProcess.run` does."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    engine, placement, name = build_engine(settings, checkpoint)
    stage = TokenStage(engine, Prompter(checkpoint), name, settings)
    await WorkerProcess(settings, [stage], placement).run()


if __name__ == "__main__":
    sys.exit(run(serve))
