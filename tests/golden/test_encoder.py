"""The encoder's networks against the golden vectors: every stream, every state that was recorded, and all codes."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from services.codec_worker.encoder.heartencoder import HeartEncoder, stereo
from services.codec_worker.encoder.layers import rope_table
from services.codec_worker.encoder.loading import load_encoder
from services.codec_worker.encoder.recording import Recording, Signals, signals
from services.codec_worker.engines.encoder import PARTS, NativeEncoder
from shared.model.checkpoint import tensors
from tests.golden.encoder_set import EncoderSet

STREAMS = ("acoustic", "semantic", "whisper", "wavlm")


@dataclass
class Encoded:
    """What was computed of a case, chunk after chunk."""

    heard: list[Signals] = field(default_factory=list)
    seen: list[dict[str, Tensor]] = field(default_factory=list)  # streams and states, under the set's names
    query: Tensor = field(default_factory=lambda: torch.empty(0))  # [frames, dim]
    z: Tensor = field(default_factory=lambda: torch.empty(0))  # [frames, codebook_dim]
    codes: Tensor = field(default_factory=lambda: torch.empty(0))  # int64 [8, frames]


@pytest.fixture(scope="module")
def golden_set() -> EncoderSet:
    return EncoderSet.open()


@pytest.fixture(scope="module")
def model(golden_set: EncoderSet) -> HeartEncoder:
    checkpoint = golden_set.checkpoint
    assert checkpoint.encoder is not None
    model = HeartEncoder(checkpoint.encoder, checkpoint.codec)
    load_encoder(model, checkpoint)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def encoded(golden_set: EncoderSet, model: HeartEncoder) -> dict[str, Encoded]:
    return {name: encode(golden_set, model, name) for name in golden_set.facts["cases"]}


def encode(golden_set: EncoderSet, model: HeartEncoder, name: str, dtype: torch.dtype | None = None) -> Encoded:
    """Encode a case, with the three large networks in a `dtype` by autocast, as the reference can have them."""
    found, queries = Encoded(), []
    recording = Recording(golden_set.audio(name), golden_set.facts["cases"][name]["sample_rate"])
    states = {
        "subsampled": model.muencoder.conv,
        "wavlm_conv": model.wavlm.feature_extractor,
        "wavlm_h0": model.wavlm.layer_norm,
        "wavlm_h1": model.wavlm.layers[0],
        "wavlm_h9": model.wavlm.layers[8],
        "whisper_50hz": model.whisper.layer_norm,
        "fused": model.query.feature_proj,
        "block0": model.query.layers[0],
    }
    for index in range(recording.chunks):
        heard, seen = signals(recording.chunk(index), model.config), dict[str, Tensor]()
        channels = [len(heard.mel)]
        hooks = [module.register_forward_hook(keep(seen, state)) for state, module in states.items()]
        # With gradients allowed, though none is computed, linear layers are F.linear, which autocast knows.
        with torch.inference_mode() if dtype is None else torch.autocast("cpu", dtype):
            acoustic, semantic = model.muencoder.conformer(model.muencoder.conv(heard.mel))
            wavlm, whisper = model.wavlm(heard.audio), model.whisper(heard.whisper_mel)
        with torch.inference_mode() if dtype is None else nullcontext():
            streams = [stereo(stream.float(), channels) for stream in (acoustic, semantic, whisper, wavlm)]
            queries.append(model.query(*streams)[0])
        for hook in hooks:
            hook.remove()
        seen |= {stream: tensor[0] for stream, tensor in zip(STREAMS, streams, strict=True)}
        found.heard.append(heard)
        found.seen.append(seen)
    found.query = torch.cat(queries)[: recording.frames]
    with torch.inference_mode():
        found.z = model.quantizer.project_in(found.query)
        found.codes = model.quantizer(found.query)
    return found


def keep(seen: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    """A hook that keeps what a module gives."""

    def hook(_: nn.Module, __: object, output: Tensor) -> None:
        seen[name] = output

    return hook


def near(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0, msg=lambda text: f"{what}: {text}")


def each_chunk(
    golden_set: EncoderSet, encoded: dict[str, Encoded]
) -> Iterator[tuple[str, dict[str, list[int]], Encoded, int]]:
    for name, case in golden_set.facts["cases"].items():
        for index in range(case["chunks"]):
            yield f"{name}.c{index}", case[f"c{index}"], encoded[name], index


def test_the_streams_are_the_references(golden_set: EncoderSet, encoded: dict[str, Encoded]) -> None:
    for stem, rows, case, index in each_chunk(golden_set, encoded):
        for stream in STREAMS:
            got = case.seen[index][stream][rows["frames_25hz"]]
            near(got, golden_set.vectors[f"{stem}.{stream}"], golden_set.tolerance("streams"), f"{stem}.{stream}")


def test_the_states_on_the_way_are_the_references(golden_set: EncoderSet, encoded: dict[str, Encoded]) -> None:
    rates = {"subsampled": "frames_25hz", "wavlm_conv": "frames_50hz", "wavlm_h0": "frames_50hz"}
    rates |= {"wavlm_h1": "frames_50hz", "wavlm_h9": "frames_50hz", "whisper_50hz": "frames_50hz"}
    for stem, rows, case, index in each_chunk(golden_set, encoded):
        for state, rate in rates.items():
            got, wanted = case.seen[index][state][:, rows[rate]], golden_set.vectors[f"{stem}.{state}"]
            wanted = wanted.transpose(1, 2) if state == "wavlm_conv" else wanted
            near(got.expand(2, -1, -1), wanted, golden_set.tolerance("streams"), f"{stem}.{state}")
        seen = case.seen[index]
        for state, at in (("fused", rows["frames_25hz"]), ("block0", rows["sequence_rows"])):
            wanted = golden_set.vectors[f"{stem}.{state}"]
            near(seen[state][0, at], wanted, golden_set.tolerance("query"), f"{stem}.{state}")


def test_queries_are_the_references(golden_set: EncoderSet, encoded: dict[str, Encoded]) -> None:
    for name, case in encoded.items():
        near(case.query, golden_set.vectors[f"{name}.query"], golden_set.tolerance("query"), name)
        near(case.z, golden_set.vectors[f"{name}.z"], golden_set.tolerance("z"), name)


def test_codes_are_the_references_wherever_the_margin_decides(
    golden_set: EncoderSet, encoded: dict[str, Encoded]
) -> None:
    """A vector that is off by d changes a distance by at most d, so two of them by 2d."""
    for name, case in encoded.items():
        wanted, margin = golden_set.vectors[f"{name}.codes"].long(), golden_set.vectors[f"{name}.margin"]
        assert case.codes.shape == wanted.shape
        off = (case.z - golden_set.vectors[f"{name}.z"]).norm(dim=1)  # [frames]
        decided = (margin > 2 * off).cummin(dim=0).values  # an undecided level leaves another residual to the next
        assert bool(decided.float().mean() > 0.99)
        assert torch.equal(case.codes[decided], wanted[decided]), name


def test_the_engine_gives_these_codes_of_several_chunks_at_once(
    golden_set: EncoderSet, encoded: dict[str, Encoded]
) -> None:
    name, case = max(golden_set.facts["cases"].items(), key=lambda item: item[1]["chunks"])
    engine = NativeEncoder(golden_set.checkpoint, "cpu", batch=case["chunks"])
    engine.load()
    engine.to_device()
    steps = [*engine.encode(golden_set.audio(name), case["sample_rate"])]
    assert len(steps) == len(PARTS)
    assert steps[-1].codes is not None
    assert np.array_equal(steps[-1].codes, encoded[name].codes)


def test_buckets_and_rotations_are_the_references(golden_set: EncoderSet, model: HeartEncoder) -> None:
    assert torch.equal(model.wavlm.buckets, golden_set.vectors["wavlm.buckets"].long())
    stored = {name: tensor for name, tensor in tensors(golden_set.checkpoint.encoder_path) if "inv_freq" in name}
    assert len(stored) > 1
    for name, frequency in stored.items():
        got = model.muencoder.conformer.table if "conformer" in name else model.query.table
        angles = torch.arange(got.shape[1], dtype=torch.float32)[:, None] * frequency
        near(got[:, :, 0], torch.stack((angles.cos(), angles.sin())), 1e-6, name)
    assert torch.equal(rope_table(8, 10_000.0, 3)[0, :, 0, 0], torch.arange(3.0).cos())


@pytest.mark.slow
def test_in_bfloat16_codes_of_the_first_levels_stay_and_deeper_ones_move(
    golden_set: EncoderSet, model: HeartEncoder, encoded: dict[str, Encoded]
) -> None:
    """Why the engine computes in float32. The shares of equal codes, a level each, are printed (`pytest -s`)."""
    name = max(golden_set.facts["cases"], key=lambda name: golden_set.facts["cases"][name]["frames"])
    lower = encode(golden_set, model, name, torch.bfloat16)
    equal = (lower.codes == encoded[name].codes).float().mean(dim=1)
    print("equal codes in bfloat16, by level:", " ".join(f"{share:.1%}" for share in equal.tolist()))
    apart = (lower.z - encoded[name].z).norm() / encoded[name].z.norm()
    print(f"z is off by {float(apart):.2%}")
    assert equal[0] > 0.9
    assert equal[-1] < equal[0]
    assert 1e-4 < float(apart) < 0.1
