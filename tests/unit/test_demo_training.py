"""Training of the demo: what is composed, and how training continues after an interruption."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ckpt.training import codec, codes, composer, encoder, examples, export, language, listen, loop, synthesizer
from ckpt.training.music import GENRES, KEYS, TEMPI, TIMBRES, parts
from services.codec_worker.encoder.heartencoder import HeartEncoder, stereo
from services.codec_worker.encoder.loading import load_encoder
from services.codec_worker.encoder.quantizer import ResidualQuantizer
from services.codec_worker.encoder.recording import signals
from services.codec_worker.model.flow_matching import GUIDANCE
from services.codec_worker.model.heartcodec import HeartCodec
from services.codec_worker.model.loading import load_weights as load_codec
from services.tokenizer_worker.model.heartmula import HeartMuLa
from services.tokenizer_worker.model.loading import load_weights as load_language
from shared.model.checkpoint import open_checkpoint


def song(seed: int, tags: dict[str, str], *entries: str | int) -> np.ndarray:
    return examples.draw(np.random.default_rng(seed), tags, list(entries)).codes


def test_codes_say_what_was_composed() -> None:
    rng = np.random.default_rng(3)
    for number in range(20):
        tags, entries = examples.draw_tags(rng, 4), examples.draw_entries(rng, number)
        made = examples.draw(rng, tags, entries)
        fields = codes.unpack(made.codes)
        assert {tuple(GENRES)[n] for n in fields["phrase"][:, 1]} == {tags["genre"]}
        assert {TIMBRES[n] for n in fields["wheels"][:, 1]} == {tags["instrument"]}
        assert {KEYS[n][1] for n in fields["drums"][:, 3]} == {tags["mood"]}
        assert {tuple(TEMPI)[n] for n in codes.bar_of(fields["beat"][:, 0])[0]} == {tags["tempo"]}
        assert made.codes.max() < codes.CODES
        assert fields["place"][-1, 0] == len(parts(entries)) - 1


@pytest.mark.parametrize("syllables", range(1, 17))
def test_a_line_has_a_note_for_each_syllable(syllables: int) -> None:
    for genre in ("pop", "folk"):
        fields = codes.unpack(song(1, {"genre": genre}, syllables))
        line = fields["melody"][fields["place"][:, 0] == 0, 0]
        assert ((line != codes.SILENT_MELODY) & (line % codes.MELODY_AGES == 0)).sum() == syllables


def test_a_chorus_is_fuller_than_an_intro() -> None:
    made = song(2, {"genre": "rock", "instrument": "piano"}, "intro", "chorus", 8, 8)
    sound = synthesizer.waveform(synthesizer.latents(made)).numpy()
    chorus = np.flatnonzero(codes.unpack(made)["place"][:, 0] == 2)[0] * 1920
    assert sound[:, chorus:].std() > 1.5 * sound[:, : chorus // 3].std()


def test_chords_are_full_in_a_chorus_and_thin_in_a_verse() -> None:
    fields = codes.unpack(song(2, {"genre": "pop"}, "verse", 8, "chorus", 8))
    state, place = fields["chord"][:, 2], fields["place"][:, 0]
    assert state[place == 1].max() <= codes.BLOCK_AGES < state[place == 3].max()


@pytest.mark.parametrize("note", [codes.MELODY[0], 69, codes.MELODY[-1]])
def test_a_tone_has_its_pitch(note: int) -> None:
    long = song(1, {"genre": "classical", "instrument": "flute"}, 8, 8, 8)[:, :125]
    number = {stream: index for index, stream in enumerate(codes.STREAMS)}
    long[number["chord"]], long[number["bass"]] = 0, codes.SILENT_BASS
    long[number["melody"]] = (note - codes.MELODY[0]) * codes.MELODY_AGES + codes.MELODY_AGES - 1
    sound = synthesizer.waveform(synthesizer.latents(long))[0].numpy()
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    heard = power.argmax() * synthesizer.SAMPLE_RATE / len(sound)
    assert abs(69 + 12 * np.log2(heard / 440) - note) < 0.15


def test_the_scalar_decoder_is_the_synthesiser() -> None:
    latents = synthesizer.latents(song(4, {"genre": "pop"}, "chorus", 5))[:200]
    wanted = synthesizer.waveform(latents)
    with torch.inference_mode():
        sound = GUIDANCE * codec.untrained(0).scalar(latents)
    assert (sound - wanted).square().sum() < 1e-5 * wanted.square().sum()


def test_the_listener_distinguishes_tempi() -> None:
    for number, tempo in enumerate(3 * tuple(TEMPI)):
        made = song(number, {"tempo": tempo, "genre": "pop"}, "verse", 8, 7, "chorus", 6, 6)
        sound = synthesizer.waveform(synthesizer.latents(made)).numpy()
        assert listen.tempo(sound.mean(0), synthesizer.SAMPLE_RATE) == tempo


def test_style_without_tags_suits_the_genre() -> None:
    rng = np.random.default_rng(0)
    assert {composer.style_of({"genre": "electronic"}, rng).tempo for _ in range(20)} == {2}


def test_interrupted_training_ends_where_it_would_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVED_EVERY", 2)

    def trained(path: Path, loss: Callable[[torch.nn.Module, np.random.Generator], Tensor]) -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        loop.train(model, lambda rng: loss(model, rng), 6, path=path, seed=5, rate=0.1, muon=lambda name: True)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def loss(model: torch.nn.Module, rng: np.random.Generator) -> Tensor:
        x = torch.from_numpy(rng.standard_normal((8, 4), np.float32))
        error: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return error

    calls = []

    def interrupted(model: torch.nn.Module, rng: np.random.Generator) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(model, rng)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b.pt", interrupted)
    resumed = trained(tmp_path / "b.pt", interrupted)
    assert len(calls) == 4 + 4  # the two steps that were saved are not made again
    assert torch.equal(resumed, trained(tmp_path / "a.pt", loss))


def test_codes_can_be_read_from_the_sum_of_their_rows() -> None:
    with torch.device("meta"):
        quantizer = ResidualQuantizer(codec.CONFIG)
    quantizer.embed = torch.nn.Parameter(codec.codebooks())
    rng = np.random.default_rng(0)
    every = np.array([np.prod(sizes) for sizes in codes.STREAMS.values()])
    made = torch.from_numpy(rng.integers(every[:, None], size=(8, 500)))
    rows = [book[code] for book, code in zip(quantizer.embed, made, strict=True)]
    assert torch.equal(quantizer.nearest(torch.stack(rows).sum(0)), made)


def test_what_is_trained_is_what_reads_recordings() -> None:
    model = encoder.untrained(0, codec.codebooks())
    batch = encoder.chunk(np.random.default_rng(2))
    heard = signals(batch.audio, encoder.CONFIG)
    with torch.inference_mode():
        trained = encoder.predict(model, encoder.heard(batch))
        streams = *model.muencoder.conformer(model.muencoder.conv(heard.mel)), model.whisper(heard.whisper_mel)
        query = model.query(*(stereo(stream, [1]) for stream in (*streams, model.wavlm(heard.audio))))
        torch.testing.assert_close(trained, model.quantizer.project_in(query))


def test_gradients_reach_all_that_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "UNCONDITIONAL", 0.5)
    model, sound = language.untrained(0), codec.untrained(0)
    language.loss(model.requires_grad_(True), np.random.default_rng((1, 0))).backward()  # type: ignore[no-untyped-call]
    codec.loss(sound.requires_grad_(True), np.random.default_rng((1, 0))).backward()
    hearing = encoder.untrained(0, codec.codebooks())
    encoder.calibrate(hearing, np.random.default_rng(0))
    hearing.requires_grad_(True)
    for draw in (encoder.crops, encoder.chunk):
        encoder.loss(hearing, draw(np.random.default_rng(1))).backward()  # type: ignore[no-untyped-call]
    unlearnt = ("wavlm.", "query.cond_fusion_layer_phone.weight", "quantizer.embed")
    heard = [
        pair for pair in hearing.named_parameters() if not pair[0].startswith(unlearnt) and "running" not in pair[0]
    ]
    learnt = [*model.named_parameters(), *sound.estimator.named_parameters(), *heard]
    assert not [name for name, weight in learnt if weight.grad is None or not weight.grad.any()]


def test_what_is_exported_is_what_was_learnt(tmp_path: Path) -> None:
    model, sound = language.finished(language.untrained(0)), codec.untrained(0)
    export.write(tmp_path, model.requires_grad_(False), sound.requires_grad_(False))
    found = open_checkpoint(tmp_path)
    again, decoded = HeartMuLa(found.lm, torch.float32), HeartCodec(found.codec, torch.float32)
    load_language(again, found.lm_path)
    load_codec(decoded, found.codec_path)
    hearing = encoder.untrained(0, encoder.codebooks_of(tmp_path)).requires_grad_(False)
    export.write_encoder(tmp_path, hearing)
    found = open_checkpoint(tmp_path)
    assert found.encoder is not None
    read = HeartEncoder(found.encoder, found.codec)
    load_encoder(read, found)
    load_codec(decoded, found.codec_path)  # which has the encoder's projection now
    for before, after in ((model, again), (sound, decoded), (hearing, read)):
        was = dict(before.named_parameters())
        for name, weight in after.named_parameters():
            factor = export.SHARPNESS if "head" in name else 1
            torch.testing.assert_close(weight, factor * was[name], rtol=0.01, atol=1e-4, msg=name)


def test_folding_changes_the_scale_of_latents_alone() -> None:
    model = codec.untrained(0)
    estimator, mu = model.estimator, torch.randn(1, 20, codec.WIDTH)
    latents, context = torch.randn(2, 1, 20, 256)
    with torch.no_grad():
        time = estimator.modulation(torch.tensor([0.3]))
        before = estimator(torch.cat((codec.UNIT * latents, codec.UNIT * context, mu), -1), time, 0)
        codec.fold(model)
        after = estimator(torch.cat((latents, context, mu), -1), time, 0)
    torch.testing.assert_close(codec.UNIT * after, before, rtol=1e-3, atol=1e-4)
