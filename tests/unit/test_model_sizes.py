"""Sizes computed from configurations are those that the engines report."""

from functools import cache

import msgspec
import pytest
import torch

from services.codec_worker.engines.native import STRETCH, NativeCodec
from services.codec_worker.model.windows import WINDOW
from services.tokenizer_worker.engines import prefill
from services.tokenizer_worker.engines.base import Song
from services.tokenizer_worker.engines.native import NativeEngine
from services.tokenizer_worker.model import KVCache
from services.tokenizer_worker.model.frame import Places
from shared.model import sizes, weights
from shared.model.checkpoint import Checkpoint, LMConfig
from shared.model.prompt import Prompt
from shared.model.sizes import CheckpointSizes
from tests.bench.checkpoints import AUDIO_VOCAB, CODEC, LARGE, TEXT_VOCAB
from tests.unit.native_engines import DEMO, TINY

OFFICIAL = msgspec.structs.replace(
    TINY,
    codec=CODEC,
    lm=LMConfig(
        version="3B",
        backbone=LARGE[0],
        decoder=LARGE[1],
        text_vocab_size=TEXT_VOCAB,
        audio_vocab_size=AUDIO_VOCAB,
        num_codebooks=8,
        muq_dim=512,
    ),
)
CHECKPOINTS = {"golden": TINY, "demo": DEMO, "official": OFFICIAL}
INT8 = {"off": (), "decoder": ("decoder",), "all": ("backbone", "decoder")}


@cache
def engine(name: str, dtype: str, int8: str) -> NativeEngine:
    return NativeEngine(CHECKPOINTS[name], "cpu", dtype, 1, int8=INT8[int8])


def sizes_of(checkpoint: Checkpoint) -> CheckpointSizes:
    return CheckpointSizes(checkpoint.lm, checkpoint.codec)


@pytest.mark.parametrize("int8", INT8)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_language_model_and_its_songs(name: str, dtype: str, int8: str) -> None:
    found, made = sizes_of(CHECKPOINTS[name]), engine(name, dtype, int8)
    assert found.language_model(dtype, int8) == made.weight_bytes
    lm, places = CHECKPOINTS[name].lm, Places.bytes_per_place(made._model)
    for cfg_scale, rows in ((1.0, 1), (1.5, 2)):
        song = Song(prompt=Prompt((1,) * 11, (1,) * 20), max_frames=77, cfg_scale=cfg_scale)
        on_cuda = KVCache.size(lm.backbone, rows, song.prompt.length + 77, getattr(torch, dtype)) + places
        assert found.song(dtype, 77, prompt=song.prompt.length, rows=rows) == on_cuda
        assert on_cuda // 2 < made.song_bytes(song) <= on_cuda  # on the CPU


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_codec(name: str, dtype: str) -> None:
    found, made = sizes_of(CHECKPOINTS[name]), NativeCodec(CHECKPOINTS[name], "cpu", dtype)
    assert (found.codec(dtype), found.codec_work()) == (made.weight_bytes, made.work_bytes)


def test_what_is_known_without_torch_is_what_the_engines_use() -> None:
    assert sizes.ALIGNMENT == weights.ALIGNMENT
    assert sizes.PREFILL == prefill._PREFILL
    assert (sizes.WINDOW_LATENTS, sizes.STRETCH_LATENTS) == (2 * WINDOW, STRETCH)
