"""The native codec engine, on the demo checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.codec_worker.engines.native import NativeCodec
from services.codec_worker.model import HeartCodec, load_weights
from services.codec_worker.model.waveform_decoder import WaveformDecoder
from shared.errors import ConfigError, DeviceFull, PhaseError
from shared.model.checkpoint import Checkpoint, open_checkpoint
from tests.unit.native_engines import live_tensors, resident_bytes

TINY = Path(__file__).parents[1] / "golden" / "data" / "ckpt"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(TINY)


@pytest.fixture
def engine(checkpoint: Checkpoint) -> NativeCodec:
    engine = NativeCodec(checkpoint, "cpu", "float32")
    engine.load()
    engine.to_device()
    return engine


def codes(frames: int, checkpoint: Checkpoint) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, checkpoint.codec.codebook_size, (8, frames), dtype=np.int16)


@pytest.mark.parametrize(("frames", "stretches"), [(1, [1]), (41, [2]), (63, [3]), (372, [12]), (424, [12, 4])])
def test_a_song_is_decoded_step_by_step(
    engine: NativeCodec, checkpoint: Checkpoint, frames: int, stretches: list[int]
) -> None:
    steps = list(engine.decode(codes(frames, checkpoint), seed=1))
    total = sum(10 + n for n in stretches)
    assert [step.done for step in steps] == list(range(1, total + 1))
    assert {step.total for step in steps} == {total}
    assert max(len(step.audio) for step in steps if step.audio is not None) <= 62 * 24, "handed out piece by piece"
    audio = np.concatenate([step.audio for step in steps if step.audio is not None])
    assert audio.shape == (frames * 48, 2)  # 600 Hz
    assert audio.dtype == np.float32
    assert np.isfinite(audio).all()
    assert audio.std() > 0.01
    assert not torch.is_inference_mode_enabled()


def test_the_same_seed_gives_the_same_audio(engine: NativeCodec, checkpoint: Checkpoint) -> None:
    def audio(seed: int) -> np.ndarray:
        steps = engine.decode(codes(20, checkpoint), seed=seed)
        return np.concatenate([step.audio for step in steps if step.audio is not None])

    first = audio(2**53 - 1)
    assert np.array_equal(first, audio(2**53 - 1))
    assert not np.array_equal(first, audio(3))


def test_nothing_is_decoded_unless_the_weights_are_on_the_device(engine: NativeCodec, checkpoint: Checkpoint) -> None:
    engine.to_host()
    with pytest.raises(PhaseError):
        engine.decode(codes(20, checkpoint), seed=1)
    engine.to_device()
    next(engine.decode(codes(20, checkpoint), seed=1))


def test_what_is_not_a_song_is_refused(engine: NativeCodec) -> None:
    for shape in ((8, 0), (7, 20), (20,)):
        with pytest.raises(ValueError, match="not a song"):
            engine.decode(np.zeros(shape, np.int16), seed=1)


def test_twenty_songs_leave_nothing_behind(engine: NativeCodec, checkpoint: Checkpoint) -> None:
    """Songs that are abandoned leave nothing either. Resident memory is printed (`pytest -s`), not asserted."""
    first, resident = (0, 0), 0
    engine._weights._copies = True  # as to a GPU
    for song in range(20):
        engine.to_device()
        steps = engine.decode(codes(30 + song if song % 5 else 400, checkpoint), seed=song)
        for step in steps:
            if song % 3 == 2 and step.done == 7:
                break
        del steps
        engine.to_host()
        if song == 1:
            first, resident = live_tensors(), resident_bytes()
    assert live_tensors() == first
    print(f"RSS grew by {(resident_bytes() - resident) / 2**20:.1f} MB over 18 songs")


@pytest.mark.parametrize(("raised", "seen"), [(torch.OutOfMemoryError, DeviceFull), (RuntimeError, RuntimeError)])
def test_a_song_that_fails_is_gone_while_its_error_is_kept(
    raised: type[Exception],
    seen: type[Exception],
    engine: NativeCodec,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise raised("here")

    song, before = codes(400, checkpoint), live_tensors()
    steps = engine.decode(song, seed=1)
    for step in steps:
        if step.done == 11:  # of 10 for the latents
            break
    assert live_tensors() > before
    monkeypatch.setattr(WaveformDecoder, "forward", fail)
    with pytest.raises(seen, match="here") as kept:
        list(steps)
    assert live_tensors() == before
    assert kept.value.__traceback__ is not None, "the error is there still"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the codec's folder, for tampering."""
    return Path(shutil.copytree(TINY / "HeartCodec-oss", tmp_path / "codec"))


def loaded(folder: Path, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    model = HeartCodec(checkpoint.codec, torch.float32)
    load_weights(model, folder)
    return {name: p.data for name, p in model.named_parameters()}


def test_shards_with_an_index_give_the_same_weights_and_strays_beside_them_are_ignored(
    copy: Path, checkpoint: Checkpoint
) -> None:
    whole = loaded(copy, checkpoint)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}  # weight-norm pairs are torn apart
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, copy / shard)
    save_file({"stray": torch.zeros(1)}, copy / "stray.safetensors")
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = loaded(copy, checkpoint)
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_folded_weights_load_as_well(copy: Path, checkpoint: Checkpoint) -> None:
    tensors = load_file(copy / "model.safetensors")
    stem = "scalar_model.decoder.5"
    g, v = (tensors.pop(f"{stem}.parametrizations.weight.original{n}").float() for n in (0, 1))
    tensors[f"{stem}.weight"] = g * v / v.norm()
    tensors["flow_matching.vq_embed.layers.0._codebook.initted"] = torch.tensor([True])  # published so
    whole = loaded(copy, checkpoint)
    save_file(tensors, copy / "model.safetensors")
    again = loaded(copy, checkpoint)
    assert all(torch.allclose(whole[name], again[name], atol=1e-6) for name in whole)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("flow_matching.estimator.proj_in.ffn_1.weight", "missing"),
        ("flow_matching.vq_embed.layers.3._codebook.embed", "missing"),
        ("scalar_model.decoder.0.parametrizations.weight.original0", "missing"),
        ("flow_matching.estimator.surprise", "unexpected"),
        ("flow_matching.estimator.scale_shift_table", "shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    copy: Path, checkpoint: Checkpoint, name: str, what: str
) -> None:
    tensors = load_file(copy / "model.safetensors")
    if what == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(1, 1)
    save_file(tensors, copy / "model.safetensors")
    hint = {"missing": "missing", "unexpected": name, "shape": rf"{name} is \[1, 1\]"}[what]
    with pytest.raises(ConfigError, match=hint):
        loaded(copy, checkpoint)
