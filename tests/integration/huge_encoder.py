"""``python -m tests.integration.huge_encoder``: a codec worker whose encoder is larger than its share of the device."""

import sys

from services.codec_worker.__main__ import build_engine
from services.codec_worker.encode_stage import EncodeStage
from services.codec_worker.engines.trivial import TrivialEncoder
from services.codec_worker.stage import DecodeStage
from shared.entrypoint import run
from shared.model.checkpoint import open_checkpoint
from shared.settings import Settings
from shared.worker.process import WorkerProcess


class HugeEncoder(TrivialEncoder):
    """Never fits."""

    weight_bytes = 10**12


async def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT."""
    checkpoint = open_checkpoint(settings.model_path, settings.model_version)
    engine, placement, name = build_engine(settings, checkpoint)
    encoder = EncodeStage(HugeEncoder(0), "huge", settings, placement, host_bytes=0)
    await WorkerProcess(settings, [DecodeStage(engine, name, settings), encoder], placement).run()


if __name__ == "__main__":
    sys.exit(run(serve))
