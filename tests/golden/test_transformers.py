"""Whisper's and WavLM's encoders beside those of transformers. They need it: `make test-reference` brings it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from services.codec_worker.encoder.chunks import RATE
from services.codec_worker.encoder.heartencoder import HeartEncoder
from services.codec_worker.encoder.layers import pairs
from services.codec_worker.encoder.loading import load_encoder
from services.codec_worker.encoder.mel import WHISPER_RATE, whisper_log_mel
from services.codec_worker.encoder.recording import Recording, signals
from shared.model.checkpoint import Checkpoint, tensors
from tests.golden.encoder_set import EncoderSet

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return EncoderSet.open().checkpoint


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> HeartEncoder:
    assert checkpoint.encoder is not None
    model = HeartEncoder(checkpoint.encoder, checkpoint.codec)
    load_encoder(model, checkpoint)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def audio() -> Tensor:
    """A chunk of two channels at 24 kHz, ``[2, 714480]``: sweeps and noise, then silence."""
    time = np.arange(20 * RATE) / RATE
    noise = np.random.default_rng(0).standard_normal((2, len(time)))
    tone = np.sin(2 * np.pi * (100 + 40 * time) * time)
    return Recording((0.3 * tone + 0.05 * noise).astype(np.float32), RATE).chunk(0)


def configuration(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    written = json.loads((checkpoint.encoder_path / "encoder_config.json").read_text())
    found: dict[str, Any] = written["feature_extractors"][name]
    return found


def load(theirs: torch.nn.Module, checkpoint: Checkpoint, part: str) -> torch.nn.Module:
    """Fill a network of transformers with the checkpoint's tensors."""
    prefix = f"encoder.feature_extractors.{part}."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors(checkpoint.encoder_path) if prefix in name}
    theirs.load_state_dict(state)
    return theirs.eval()


def test_whisper_hears_the_same_mel(audio: Tensor, model: HeartEncoder) -> None:
    lower = signals(audio, model.config).audio
    bands = model.config.whisper.num_mel_bins
    extractor = transformers.WhisperFeatureExtractor(feature_size=bands)
    theirs = extractor(list(lower.numpy()), sampling_rate=WHISPER_RATE, return_tensors="pt").input_features
    torch.testing.assert_close(whisper_log_mel(lower, bands).transpose(1, 2), theirs, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_whispers_stream_is_theirs(audio: Tensor, checkpoint: Checkpoint, model: HeartEncoder) -> None:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    theirs = WhisperEncoder(transformers.WhisperConfig(**configuration(checkpoint, "whisper_config")))
    load(theirs, checkpoint, "whisper_encoder")
    mel = signals(audio, model.config).whisper_mel
    wanted = theirs(mel.transpose(1, 2)).last_hidden_state[:, :1488]
    torch.testing.assert_close(model.whisper(mel), pairs(wanted), atol=2e-5, rtol=0)


@torch.inference_mode()
def test_wavlms_stream_is_theirs(audio: Tensor, checkpoint: Checkpoint, model: HeartEncoder) -> None:
    theirs = transformers.WavLMModel(transformers.WavLMConfig(**configuration(checkpoint, "wavlm_config")))
    load(theirs, checkpoint, "wavlm_encoder")
    lower = signals(audio, model.config).audio
    states = theirs(lower, output_hidden_states=True).hidden_states
    wanted = torch.stack(states[6:10]).mean(dim=0)
    torch.testing.assert_close(model.wavlm(lower), pairs(wanted), atol=2e-5, rtol=0)
