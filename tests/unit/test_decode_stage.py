"""The codec's stage: what a song has booked on the device is booked out however its decoding ends."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from services.codec_worker import stage as module
from services.codec_worker.engines.trivial import TrivialCodec
from services.codec_worker.stage import DecodeStage
from shared.audio.files import AudioWriter
from shared.device.ledger import DeviceLedger
from shared.device.offload_phases import Phase, Turn
from shared.schema.job import DecodeJob, Job
from shared.schema.request import GenerateRequest
from shared.settings import Settings

JOB = Job(job_id="a", tenant="local", request=GenerateRequest(lyrics="la", format="wav"), created_at=1.0)
ORDER = DecodeJob(job_id="a", tenant="local", tokens_key="k", first_frame=0, frames=50, last=True)


class Held:
    """Replacement of a held lease."""

    fencing_token = 1

    def check(self) -> None:
        """The lease is alive."""

    async def enter(self, phase: Phase) -> None:
        """Every phase may be entered."""


@pytest.fixture
async def turn(tmp_path: Path) -> AsyncIterator[Turn]:
    """A turn of the codec that may compute."""
    ledger = DeviceLedger(tmp_path / "device", "codec.me", 10 * TrivialCodec.work_bytes)
    turn = Turn(Held(), "codec", ledger)  # type: ignore[arg-type]
    for phase in (Phase.SWAP, Phase.DECODE):
        await turn.enter(phase)
    yield turn
    ledger.close()


async def in_engine(call: Callable[[], Any]) -> Any:
    return call()


async def fetch_tokens(*_: object) -> np.ndarray:
    return np.zeros((8, 50), np.int16)


def nothing(*_: object, **__: object) -> None:
    pass


def full(*_: object) -> NoReturn:
    raise OSError("No space left on device")


@pytest.mark.parametrize("method", ["__init__", "write", "_write_tags"])
async def test_a_full_disk_leaves_nothing_booked(
    method: str, turn: Turn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fetch_tokens", fetch_tokens)
    monkeypatch.setattr(AudioWriter, method, full)
    stage = DecodeStage(TrivialCodec(0), "model", Settings(data_dir=tmp_path))
    booked = list[str]()

    def publish(_: object) -> None:
        booked.extend(resident.label for resident in turn._ledger.residents())

    context: Any = SimpleNamespace(
        job=JOB,
        order=ORDER,
        turn=turn,
        check=nothing,
        check_pause=nothing,
        progress=nothing,
        publish_from_engine=publish,
    )
    worker: Any = SimpleNamespace(
        store=None, jobs=None, in_engine=in_engine, memory_used=lambda: 0, draining=SimpleNamespace(active=False)
    )
    with pytest.raises(OSError, match="No space left"):
        await stage.run(context, worker)
    assert not turn._ledger.residents()
    assert booked == ["decode"] or method == "__init__"
