"""The native encoder engine, on the golden checkpoint: what it promises beside the right codes."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.codec_worker.encoder.heartencoder import HeartEncoder
from services.codec_worker.encoder.loading import load_encoder, stored_shapes
from services.codec_worker.encoder.muencoder import ConformerBlock, Stem
from services.codec_worker.encoder.recording import Recording, signals
from services.codec_worker.encoder.wavlm import WavLM
from services.codec_worker.engines.encoder import PARTS, NativeEncoder
from services.codec_worker.model.arithmetic import _precision, products
from shared.errors import ConfigError, DeviceFull, PhaseError
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.encoder_config import CHUNK, EncoderConfig
from shared.model.encoder_sizes import encoder_bytes, encoder_work
from tests.bench.checkpoints import CODEC
from tests.unit.fake_cuda import fake_cuda
from tests.unit.native_engines import live_tensors, one_thread
from tests.unit.peak import PeakBytes

__all__ = ["one_thread"]

FOLDER = Path(__file__).parents[1] / "golden" / "encoder" / "ckpt"
GOLDEN = open_checkpoint(FOLDER)
OFFICIAL = EncoderConfig(version="vqv12", chunk_samples=CHUNK)
RATE = 24_000
assert GOLDEN.encoder is not None
GOLDEN_CONFIG = GOLDEN.encoder
EXTRACTORS = "encoder.feature_extractors"


@pytest.fixture(scope="module")
def engine() -> NativeEncoder:
    engine = NativeEncoder(GOLDEN, "cpu")
    engine.load()
    engine.to_device()
    return engine


def audio(seconds: float, channels: int = 2) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((channels, int(seconds * RATE)), np.float32)
    return np.asarray(0.1 * noise)


def codes_of(engine: NativeEncoder, sound: np.ndarray, first: int = 0) -> np.ndarray:
    found = [step.codes for step in engine.encode(sound, RATE, first=first) if step.codes is not None]
    return np.concatenate(found, axis=1)


def test_a_recording_is_encoded_step_by_step_and_goes_on_at_any_chunk(engine: NativeEncoder) -> None:
    sound = audio(31)
    steps = list(engine.encode(sound, RATE))
    total = 2 * len(PARTS)
    assert [(step.done, step.total) for step in steps] == [(n, total) for n in range(1, total + 1)]
    with_codes = {step.done: step.codes for step in steps if step.codes is not None}
    assert {done: codes.shape for done, codes in with_codes.items()} == {len(PARTS): (8, 372), total: (8, 16)}
    assert {codes.dtype for codes in with_codes.values()} == {np.dtype(np.int16)}
    assert np.array_equal(codes_of(engine, sound, first=1), with_codes[total])
    assert not torch.is_inference_mode_enabled()
    with pytest.raises(ValueError, match="2 chunks has no chunk 2"):
        engine.encode(sound, RATE, first=2)


def test_mono_is_two_equal_channels_computed_once(engine: NativeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, forward = [], Stem.forward

    def counted(self: Stem, mel: torch.Tensor) -> torch.Tensor:
        rows.append(len(mel))
        return forward(self, mel)

    monkeypatch.setattr(Stem, "forward", counted)
    mono = audio(2, channels=1)
    wanted = codes_of(engine, mono)
    assert np.array_equal(codes_of(engine, np.repeat(mono, 2, axis=0)), wanted)
    assert rows == [1, 1]
    next(engine.encode(audio(2), RATE))
    assert rows[2:] == [2]


def test_nothing_is_encoded_unless_the_weights_are_on_the_device() -> None:
    engine = NativeEncoder(GOLDEN, "cpu")
    with pytest.raises(PhaseError):
        engine.to_device()
    engine.load()
    with pytest.raises(PhaseError):
        engine.encode(audio(1), RATE)
    engine.to_device()
    next(engine.encode(audio(1), RATE))
    engine.to_host()
    with pytest.raises(PhaseError):
        engine.encode(audio(1), RATE)


@pytest.mark.parametrize("how", ["ended", "given up", "failed"])
def test_nothing_of_a_recording_is_left(how: str, engine: NativeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    signals(Recording(audio(1), RATE).chunk(0), GOLDEN_CONFIG)  # filters are made once
    before = live_tensors()
    steps = engine.encode(audio(1), RATE)
    next(steps)
    assert live_tensors() > before
    if how == "ended":
        list(steps)
    elif how == "given up":
        steps.close()
    else:

        def full(*_: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(ConformerBlock, "forward", full)
        with pytest.raises(DeviceFull, match="no room") as kept:
            list(steps)
        assert kept.value.__traceback__ is not None, "the error is there still"
    assert live_tensors() == before


def test_a_checkpoint_without_an_encoder_or_with_another_codecs_is_refused() -> None:
    absent = msgspec.structs.replace(GOLDEN, encoder=None)
    with pytest.raises(ConfigError, match=r"HeartCodec-oss-encoder is missing: .*make models ENCODER=1"):
        NativeEncoder(absent, "cpu")
    other = msgspec.structs.replace(GOLDEN, codec=CODEC)
    with pytest.raises(ConfigError, match=r"vectors of 96 values, and .* quantises 512"):
        NativeEncoder(other, "cpu")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the checkpoint, for tampering."""
    return Path(shutil.copytree(FOLDER, tmp_path / "ckpt"))


def test_the_encoders_folder_is_optional_and_its_older_layout_is_read(copy: Path) -> None:
    folder = copy / "HeartCodec-oss-encoder"
    (folder / "config.json").unlink()
    assert open_checkpoint(copy).encoder == GOLDEN.encoder
    shutil.rmtree(folder)
    assert open_checkpoint(copy).encoder is None
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"encoder_config\.json is missing"):
        open_checkpoint(copy)


def test_its_identity_follows_from_the_networks_and_the_codebooks(copy: Path) -> None:
    def identity() -> str:
        return NativeEncoder(open_checkpoint(copy), "cpu").identity

    seen = [identity()]
    assert seen[0] == NativeEncoder(GOLDEN, "cpu").identity, "wherever they lie"
    (copy / "HeartCodec-oss-encoder" / "config.json").unlink()
    assert identity() == seen[0], "in the older layout too"
    for file in ("HeartCodec-oss-encoder/encoder.safetensors", "HeartCodec-oss/model.safetensors"):
        tensors = load_file(copy / file)
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, copy / file)
        seen.append(identity())
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), "vqv13", "vqv13"),
        (("chunk_samples",), 480_000, "chunk_samples"),
        (("query", "head_dim"), 40, "dim 96 is no multiple of head_dim 40"),
        (("query", "head_dim"), 24, "head_dim 24 must be at least 32"),
        (("feature_extractors", "wavlm_config", "num_hidden_layers"), 8, "must be at least 9"),
        (("feature_extractors", "wavlm_config", "conv_bias"), True, "conv_bias"),
        (("feature_extractors", "wavlm_config", "conv_dim"), [16], "as many entries"),
        (("feature_extractors", "wavlm_config", "feat_extract_norm"), "layer", "feat_extract_norm"),
        (("feature_extractors", "whisper_config", "encoder_attention_heads"), 5, "no multiple"),
        (("feature_extractors", "muencoder_config", "hop_length"), 320, "hop_length"),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused(
    copy: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    file = copy / "HeartCodec-oss-encoder" / "config.json"
    config = inner = msgspec.json.decode(file.read_bytes())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_bytes(msgspec.json.encode(config))
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(copy)


def test_what_a_configuration_leaves_out_is_as_in_the_official_one() -> None:
    assert msgspec.json.decode(b'{"version":"vqv12","chunk_samples":714240}', type=EncoderConfig) == OFFICIAL
    with torch.device("meta"):
        shapes = dict(stored_shapes(HeartEncoder(OFFICIAL, CODEC)))
    published = {f"{EXTRACTORS}.muencoder.conv.": 26.2, f"{EXTRACTORS}.whisper_encoder.": 88.2, "encoder.query.": 29.7}
    for part, millions in published.items():
        counts = [shape.numel() for name, shape in shapes.items() if name.startswith(part)]
        assert sum(counts) / 1e6 == pytest.approx(millions, abs=0.05), part


def loaded(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    assert checkpoint.encoder is not None
    model = HeartEncoder(checkpoint.encoder, checkpoint.codec)
    load_encoder(model, checkpoint)
    return {name: parameter.data for name, parameter in model.named_parameters()}


POSITIONS = f"{EXTRACTORS}.wavlm_encoder.encoder.pos_conv_embed.conv"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.query.cls_token", None, r"1 tensors are missing, among them encoder\.query\.cls_token"),
        (f"{POSITIONS}.parametrizations.weight.original0", None, r"original0 is missing"),
        (f"{POSITIONS}.parametrizations.weight.original0", (48, 1, 1), r"original0 is \[48, 1, 1\], expected \[1, 1"),
        (f"{EXTRACTORS}.whisper_encoder.conv1.weight", (32, 3, 80), r"conv1.weight is \[32, 3, 80\], expected"),
        (f"{EXTRACTORS}.whisper_encoder.surprise", (1,), r"unexpected tensor encoder\.feature_extractors\.whisper_enc"),
        (f"{EXTRACTORS}.muencoder.conformer.layers.12.x", (1,), "unexpected tensor"),
        ("encoder.query.cls_token.parametrizations.weight.original0", (1, 1), "unexpected tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    copy: Path, name: str, tensor: tuple[int, ...] | None, message: str
) -> None:
    file = copy / "HeartCodec-oss-encoder" / "encoder.safetensors"
    found = load_file(file)
    if tensor is None:
        del found[name]
    else:
        found[name] = torch.zeros(tensor)
    save_file(found, file)
    with pytest.raises(ConfigError, match=message):
        loaded(open_checkpoint(copy))


def test_codebooks_that_are_missing_from_the_codec_are_named(copy: Path) -> None:
    file = copy / "HeartCodec-oss" / "model.safetensors"
    found = load_file(file)
    del found["flow_matching.vq_embed.layers.3._codebook.embed"]
    save_file(found, file)
    with pytest.raises(ConfigError, match=r"HeartCodec-oss: 1 tensors are missing, among them .*layers\.3\._codebook"):
        loaded(open_checkpoint(copy))


def test_folded_weights_and_unused_layers_that_are_left_out_load_as_well(copy: Path) -> None:
    whole, file = loaded(open_checkpoint(copy)), copy / "HeartCodec-oss-encoder" / "encoder.safetensors"
    found = load_file(file)
    unused = ("conformer.layers.11.", "wavlm_encoder.encoder.layers.9.", "masked_spec_embed", "inv_freq", "mel_scale")
    found = {name: tensor for name, tensor in found.items() if not any(part in name for part in unused)}
    g, v = (found.pop(f"{POSITIONS}.parametrizations.weight.original{n}") for n in (0, 1))
    found[f"{POSITIONS}.weight"] = g * v / v.norm(dim=(0, 1), keepdim=True)
    save_file(found, file)
    again = loaded(open_checkpoint(copy))
    assert all(torch.allclose(whole[name], again[name], atol=1e-6) for name in whole)


def test_sizes_computed_from_the_configuration_are_the_engines(engine: NativeEncoder) -> None:
    assert encoder_bytes(GOLDEN_CONFIG, GOLDEN.codec) == engine.weight_bytes
    official = NativeEncoder(msgspec.structs.replace(GOLDEN, encoder=OFFICIAL, codec=CODEC), "cpu", batch=2)
    assert encoder_bytes(OFFICIAL, CODEC) == official.weight_bytes
    assert official.work_bytes == encoder_work(OFFICIAL, CODEC, 2) > encoder_work(OFFICIAL, CODEC, 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_official_size_on_a_pretended_device(batch: int) -> None:
    """On tensors without values: the memory that lives at once, copies, waits, and how attention is computed."""
    official = msgspec.structs.replace(GOLDEN, encoder=OFFICIAL, codec=CODEC)
    engine = NativeEncoder(official, "cuda:0", batch=batch)
    engine._weights.load(lambda: None)  # reserves memory of which no page is written
    sound = np.broadcast_to(np.array([[0.1], [0.2]], np.float32), (2, batch * CHUNK))
    signals(Recording(sound, RATE).chunk(0), OFFICIAL)  # filters are made once, with values
    with fake_cuda() as cuda:
        engine.to_device()
        assert engine._weights._on_device is not None
        peak = PeakBytes("cuda", beside=engine._weights._on_device)
        steps, peaks = engine.encode(sound, RATE), []
        for part in PARTS:
            peak.begin()
            with peak, cuda.counting() as counts:
                step = next(steps)
            peaks.append(peak.bytes)
            assert counts.to_device == {"stem": 1, "wavlm": 1, "whisper": 1}.get(part, 0)
            assert (counts.from_device, step.codes is not None) == ((1, True) if part == "query" else (0, False))
            fused = {"conformer": 11, "wavlm": 9 * 2 * batch, "whisper": 12, "query": 6}.get(part, 0)
            assert counts.matching("attention::efficient") == fused
            assert counts.matching("scaled_dot_product") == 0
    print(f"peaks of {batch} chunks in MB:", dict(zip(PARTS, (peak // 10**6 for peak in peaks), strict=True)))
    assert engine.work_bytes / 4 < max(peaks) < engine.work_bytes


def test_products_are_whole_float32_and_the_callers_precision_stays(
    engine: NativeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, forward = [], WavLM.forward

    def noted(self: WavLM, heard: torch.Tensor) -> torch.Tensor:
        seen.append(_precision())
        return forward(self, heard)

    monkeypatch.setattr(WavLM, "forward", noted)
    with products(tf32=True):
        for _ in engine.encode(audio(1), RATE):
            assert _precision() == ("tf32", "tf32")
    assert seen == [("ieee", "ieee")]
