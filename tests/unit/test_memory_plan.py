"""The plan for a device's memory on cards of all sizes, with the official models, and its table in the documents."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from shared.device.info import Device, Hardware
from shared.device.memory_plan import Placement, describe, place, plan_memory, share
from shared.errors import ConfigError
from shared.model.checkpoint import Checkpoint, open_checkpoint
from shared.model.encoder_sizes import encoder_needs
from shared.model.sizes import CheckpointSizes, TrivialSizes
from shared.schema.worker import MemoryPlan
from shared.settings import Settings
from tests.bench.checkpoints import CODEC, ENCODER, OFFICIAL_LM

ROOT = Path(__file__).parents[2]
DEMO = open_checkpoint(ROOT / "ckpt/demo")
OFFICIAL = CheckpointSizes(
    OFFICIAL_LM,
    CODEC,
)
# Cards by the size on the box, and what such cards report, in GiB.
CARDS = {8: 7.8, 12: 11.7, 16: 15.7, 24: 23.6, 48: 44.4}


def card(gib: float, fast_bf16: bool = True) -> Device:
    return Device("cuda", "cuda:0", "GPU-1", "the card", round(gib * 2**30), fast_bf16)


def planned(gib: float, **settings: object) -> MemoryPlan:
    return plan_memory(Settings(**settings), card(gib), OFFICIAL)  # type: ignore[arg-type]


def refused(gib: float, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(gib, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("size", "int8", "resident", "codec_dtype", "songs"),
    [
        (8, "all", False, "bfloat16", [10, 6, 4]),
        (12, "off", False, "float32", [14, 8, 5]),
        (12, "all", True, "bfloat16", [9, 5, 3]),
        (16, "off", True, "bfloat16", [14, 8, 5]),
        (16, "all", True, "float32", [14, 8, 6]),
        (24, "off", True, "float32", [36, 21, 15]),
        (48, "off", True, "float32", [129, 75, 53]),
    ],
)
def test_each_card_has_its_plan(size: int, int8: str, resident: bool, codec_dtype: str, songs: list[int]) -> None:
    plan = planned(CARDS[size], int8=int8)
    assert (plan.resident, plan.codec_dtype, plan.songs) == (resident, codec_dtype, songs)
    assert plan.language_model_dtype == "bfloat16"
    # A card that reports a little less or more is used alike.
    for other in (0.985, 1.015):
        near = planned(CARDS[size] * other, int8=int8)
        assert (near.resident, near.codec_dtype) == (resident, codec_dtype)


def test_what_a_plan_gives_out_fits_the_card() -> None:
    for gib in CARDS.values():
        for offload in (None, True, False):
            for int8 in ("off", "decoder", "all"):
                try:
                    plan = planned(gib, sequential_offload=offload, int8=int8)
                except ConfigError:
                    continue
                usable = plan.capacity - plan.contexts - plan.kept_back
                tokenizer, codec = share(plan, "tokenizer") + plan.language_model_work, share(plan, "codec")
                assert tokenizer + codec <= usable if plan.resident else max(tokenizer, codec) <= usable
                assert codec >= plan.codec + plan.codec_work
                assert share(plan, "tokenizer") - plan.language_model == plan.for_songs > 0


def test_where_models_stay_the_codecs_share_holds_the_encoder_unless_songs_would_suffer() -> None:
    def with_encoder(nbytes: int) -> CheckpointSizes:
        return replace(OFFICIAL, encoder_bytes=nbytes)

    assert ENCODER is not None
    official = with_encoder(encoder_needs(ENCODER, CODEC))
    for gib in CARDS.values():
        if gib > CARDS[8]:
            assert plan_memory(Settings(), card(gib), official) == planned(gib), "it needs less than the codec"
    large = plan_memory(Settings(), card(23.6), with_encoder(10 * 2**30))
    assert share(large, "codec") == share(large, "encoder") == 10 * 2**30
    assert share(large, "tokenizer") < share(planned(23.6), "tokenizer")
    assert plan_memory(Settings(), card(15.7), with_encoder(10 * 2**30)) == planned(15.7), "songs come first"


def test_eight_gigabytes_are_refused_with_the_setting_that_helps() -> None:
    for offload in (None, True):
        said = refused(CARDS[8], sequential_offload=offload)
        assert said == (
            "the card has 7.8 GiB, too little for the language model (language model 6.6 GiB (bfloat16) and 0.1 GiB to "
            "work, a guided song of one minute 0.2 GiB, CUDA 1.2 GiB, kept back 0.4 GiB): set HEARTMULA_INT8=all or "
            "HEARTMULA_HYBRID_MODE=true, with which only the codec uses this device"
        )
    assert planned(CARDS[8], int8="all").songs[0] > 1


@pytest.mark.parametrize(
    ("gib", "settings", "what", "advice"),
    [
        (11.7, {"sequential_offload": False}, "both models at once", "_OFFLOAD=auto or HEARTMULA_INT8=all"),
        (7.8, {"sequential_offload": False}, "both models at once", "_OFFLOAD=auto and HEARTMULA_INT8=all"),
        (11.7, {"model_dtype": "float32"}, "the language model", "HEARTMULA_MODEL_DTYPE=bfloat16"),
        (7.8, {"model_dtype": "float32"}, "the language model", "HEARTMULA_MODEL_DTYPE=bfloat16 and HEARTMULA_INT8"),
        (5.4, {"int8": "all"}, "the language model", "set HEARTMULA_HYBRID_MODE=true, with which only the codec"),
        (3.9, {}, "the language model", "only a device with more memory"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(
    gib: float, settings: dict[str, object], what: str, advice: str
) -> None:
    said = refused(gib, **settings)
    assert f"too little for {what} (" in said
    assert advice in said


def test_only_a_card_before_ampere_is_advised_to_use_float16() -> None:
    for gib, advice in ((11.7, "or HEARTMULA_MODEL_DTYPE=float16 or"), (7.8, "HEARTMULA_MODEL_DTYPE=float16 and")):
        with pytest.raises(ConfigError, match=advice):
            plan_memory(Settings(model_dtype="float32"), card(gib, fast_bf16=False), OFFICIAL)
    with pytest.raises(ConfigError, match="HEARTMULA_MODEL_DTYPE=bfloat16"):
        plan_memory(Settings(), replace(card(9, fast_bf16=False), kind="cpu"), OFFICIAL)


def test_what_keeps_only_the_codec_on_a_card_is_advised_where_the_codec_fits() -> None:
    """For a codec on a card of its own too: its worker counts with both models otherwise."""
    hybrid = "HEARTMULA_HYBRID_MODE=true"
    assert hybrid in refused(7.8)
    assert hybrid not in refused(11.7, sequential_offload=False), "both models can use the card, in turns"
    assert hybrid not in refused(3.9), "it does not hold the codec"
    with pytest.raises(ConfigError, match="too little for the language model") as caught:
        plan_memory(Settings(int8="all"), replace(card(5), kind="cpu"), OFFICIAL)
    assert hybrid not in str(caught.value), "the language model would be on the same machine"


def test_a_codec_that_does_not_fit_is_named() -> None:
    class Large(TrivialSizes):
        def codec(self, dtype: str) -> int:
            return 2**40

    with pytest.raises(ConfigError, match="too little for the codec"):
        plan_memory(Settings(), card(8), Large())


@pytest.mark.parametrize("gib", [15.7, 23.6])
def test_models_take_turns_where_the_settings_say_so(gib: float) -> None:
    turns = planned(gib, sequential_offload=True)
    assert (turns.resident, turns.codec_dtype) == (False, "float32")
    assert turns.songs[1] > planned(gib).songs[1]
    assert planned(gib, sequential_offload=False) == planned(gib)


def test_a_dtype_of_the_settings_is_the_dtype_of_both() -> None:
    plan = planned(44.4, model_dtype="float16")
    assert (plan.language_model_dtype, plan.codec_dtype) == ("float16", "float16")


def test_cards_before_ampere_have_no_bfloat16() -> None:
    plan = plan_memory(Settings(), card(15.7, fast_bf16=False), OFFICIAL)
    assert (plan.resident, plan.language_model_dtype, plan.codec_dtype) == (False, "float16", "float32")


def placed(settings: Settings, role: str, checkpoint: Checkpoint = DEMO, *, amx: bool = False) -> Placement:
    return place(settings, checkpoint, Hardware(cpu_fast_bf16=amx), role)  # type: ignore[arg-type]


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("mb", [0, 104, 180, 100_000])
def test_both_workers_find_the_same_plan(mb: int, amx: bool) -> None:
    settings = Settings(device="cpu", cpu_device_mb=mb)
    tokenizer, codec = (placed(settings, role, amx=amx) for role in ("tokenizer", "codec"))
    assert tokenizer.plan is not None
    assert tokenizer.plan == codec.plan
    assert tokenizer.stays is codec.stays is (mb != 104)
    assert (tokenizer.dtype, codec.dtype) == ("float32", "bfloat16" if amx else "float32")
    assert tokenizer.plan.contexts == tokenizer.plan.kept_back == 0


def test_a_cpu_makes_eight_songs_at_once_and_a_card_up_to_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placed(Settings(device="cpu"), "tokenizer").slots == 8
    assert placed(Settings(device="cpu", batch=3), "tokenizer").slots == 3
    official = msgspec.structs.replace(DEMO, lm=OFFICIAL.lm, codec=OFFICIAL.codec_config)
    slots = {}
    for size, gib in CARDS.items():
        monkeypatch.setattr("shared.device.memory_plan.choose_device", lambda *_, gib=gib, **__: card(gib))
        slots[size] = placed(Settings(int8="all" if size == 8 else "off"), "tokenizer", official).slots
        assert placed(Settings(int8="all", batch=40), "tokenizer", official).slots == 40
    assert slots == {8: 6, 12: 8, 16: 8, 24: 16, 48: 16}


@pytest.mark.parametrize("changes", [{"hybrid_mode": True}, {"engine": "heartlib"}])
def test_one_model_alone_on_a_device_and_the_reference_are_as_the_settings_say(changes: dict[str, object]) -> None:
    for offload in (None, True, False):
        settings = replace(Settings(device="cpu", sequential_offload=offload), **changes)  # type: ignore[arg-type]
        for role in ("tokenizer", "codec"):
            found = placed(settings, role, amx=True)
            assert (found.plan, found.stays) == (None, offload is False)
            assert found.share == found.device.capacity
        assert found.dtype == ("float32" if "engine" in changes else "bfloat16")


def test_roles_compute_at_once_only_on_a_gpu_on_which_both_models_stay() -> None:
    on_cpu = placed(Settings(device="cpu"), "codec")
    assert (on_cpu.stays, on_cpu.exclusive) == (True, True)
    on_gpu = replace(on_cpu, device=card(23.6))
    assert (on_gpu.exclusive, replace(on_gpu, stays=False).exclusive) == (False, True)


def rows(size: int) -> list[str]:
    """The rows of the documentation's table for a card."""

    def row(int8: str) -> str:
        name = f"{size} GB ({CARDS[size]} GiB)"
        try:
            plan = planned(CARDS[size], int8=int8)
        except ConfigError:
            return f"| {name} | `{int8}` | refused at start: set `HEARTMULA_INT8=all` | | | | |"
        ways = "both stay" if plan.resident else "turns"
        batch = max(1, min(16, plan.songs[1]))
        return f"| {name} | `{int8}` | {ways} | {plan.codec_dtype} | {' / '.join(map(str, plan.songs))} | {batch} |"

    return [row("off"), row("all")]


def test_the_table_in_the_documentation_is_the_arithmetic() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    found = re.findall(r"^\| \d+ GB \(.*$", page, re.MULTILINE)
    assert found == [row for size in CARDS for row in rows(size)]


def test_a_plan_in_words() -> None:
    assert describe(planned(23.6)) == (
        "both models stay on the device of 23.6 GiB: language model 6.6 GiB (bfloat16) and 0.1 GiB to work, codec 5.5 "
        "GiB (float32) and 0.9 GiB to work, CUDA 1.2 GiB, kept back 1.0 GiB; 8.2 GiB hold 36, 21, 15 guided songs of "
        "1, 2, 3 minutes"
    )
    assert describe(planned(7.8, int8="all")).startswith("the models take turns on the device of 7.8 GiB: language ")
