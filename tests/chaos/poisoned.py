"""``python -m tests.chaos.poisoned``: a tokenizer worker, on the trivial engine, that cannot make some songs."""

import sys

import numpy as np

from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.trivial import TrivialEngine
from services.tokenizer_worker.stage import TokenStage
from shared.device.info import Hardware
from shared.device.memory_plan import place
from shared.entrypoint import run
from shared.model.checkpoint import open_checkpoint
from shared.model.prompt import Prompter
from shared.settings import Settings
from shared.worker.process import WorkerProcess

POISON_SEED = 666


class PoisonedEngine(TrivialEngine):
    """Raises for songs whose seed is `POISON_SEED`, to show what happens to a song that fails, and to the others."""

    def admit(self, song_id: str, song: Song, frames: np.ndarray | None = None) -> None:
        """Begin a song. Raises `RuntimeError` for a poisoned one."""
        if song.seed == POISON_SEED:
            raise RuntimeError("poison")
        super().admit(song_id, song, frames)


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    placement = place(settings, checkpoint, Hardware(), "tokenizer")
    engine = PoisonedEngine(settings.trivial_step_ms, placement.slots, swap_ms=settings.trivial_swap_ms)
    stage = TokenStage(engine, Prompter(checkpoint), "trivial", settings)
    await WorkerProcess(settings, [stage], placement).run()


if __name__ == "__main__":
    sys.exit(run(serve))
