"""The plan for a device's memory: whether both models stay on it, the codec's precision, and how many songs fit.

Both workers of a device compute the plan by themselves and must find the same: it follows from the settings, the
checkpoint's dimensions and the device's capacity, and from nothing that is measured. docs/performance.md has a table.
"""

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from shared.device.info import Device, Hardware, choose_device
from shared.errors import ConfigError
from shared.model.checkpoint import Checkpoint
from shared.model.encoder_sizes import encoder_needs
from shared.model.sizes import CheckpointSizes, Sizes, TrivialSizes
from shared.schema.worker import MemoryPlan, Role
from shared.settings import Settings

log = logging.getLogger(__name__)

CONTEXT = 600 * 2**20  # bytes of a process on CUDA: context, kernels, workspaces, recorded frames; an estimate
KEPT_BACK = 20  # a twentieth of a GPU is kept back, but no more than
MOST_KEPT_BACK = 2**30  # bytes
PROMPT = 300  # positions of the prompt of the songs that are counted with
FRAMES = (750, 1500, 2250)  # of songs of one, two and three minutes
RESIDENT_SONGS = 4  # guided songs of two minutes beside which both models stay
TURNS = "models take turns on it"  # what a worker says of its way to use a device; others say nothing or more
BATCH, CPU_BATCH = 16, 8  # songs at once, where memory allows and HEARTMULA_BATCH is not set


@dataclass(frozen=True)
class Placement:
    """A worker's device, and the use that it makes of it."""

    device: Device
    dtype: str  # of this worker's model
    slots: int  # songs that are made at once
    stays: bool  # the model stays on the device between turns, and so does the other worker's
    share: int  # bytes that this worker's weights, caches and decodes may take in all
    plan: MemoryPlan | None = None

    @property
    def exclusive(self) -> bool:
        """Whether only one role at a time computes: where models take turns, and on a CPU, for each uses all cores."""
        return not self.stays or self.device.kind == "cpu"

    @property
    def way(self) -> str:
        """The way to use the device, for people and for comparison: all workers on a device need the same one.

        Where models stay, each relies on what the plan leaves to it; where they take turns, on being alone.
        """
        if not self.stays:
            return TURNS
        plan = "" if self.plan is None else hashlib.sha256(msgspec.json.encode(self.plan)).hexdigest()[:8]
        return f"models stay on it, plan {plan or 'of the settings'}"

    @property
    def overhead(self) -> int:
        """Bytes in use on the device that are in no account and yet are not other programs'; an upper estimate."""
        if self.device.kind == "cpu":
            return 0
        if self.plan is None:
            return 2 * CONTEXT + _kept_back(self.device)
        return self.plan.contexts + self.plan.kept_back + self.plan.language_model_work


def place(settings: Settings, checkpoint: Checkpoint, hardware: Hardware, role: Role) -> Placement:
    """Place a worker on the device that the settings ask for.

    Raises `ConfigError` when there is no such device, or when it does not hold what the settings ask for.
    """
    device = choose_device(settings, hardware, force_cpu=settings.hybrid_mode and role == "tokenizer")
    tokenizer = role == "tokenizer"
    if settings.hybrid_mode or settings.engine == "heartlib":  # one model on a device, or memory that is not known
        dtype = language_model_dtype(settings, device) if tokenizer else _codec_dtypes(settings, device)[-1]
        slots, stays = settings.batch or CPU_BATCH, settings.sequential_offload is False
        return Placement(device, dtype, slots, stays, device.capacity)
    sizes: Sizes = TrivialSizes()
    if settings.engine == "native":
        encoder = 0 if checkpoint.encoder is None else encoder_needs(checkpoint.encoder, checkpoint.codec)
        sizes = CheckpointSizes(checkpoint.lm, checkpoint.codec, encoder)
    plan = plan_memory(settings, device, sizes)
    log.info("%s: %s", device.name, describe(plan))
    slots = settings.batch or (CPU_BATCH if device.kind == "cpu" else max(1, min(BATCH, plan.songs[1])))
    dtype = plan.language_model_dtype if tokenizer else plan.codec_dtype
    return Placement(device, dtype, slots, plan.resident, share(plan, role), plan)


def share(plan: MemoryPlan, role: Role) -> int:
    """Bytes that a role's weights, caches and decodes may take: never what the other role is sure to need."""
    if role == "tokenizer":
        return plan.language_model + plan.for_songs
    return plan.codec + plan.codec_work if plan.resident else plan.capacity - plan.kept_back - plan.contexts


def language_model_dtype(settings: Settings, device: Device) -> str:
    """The language model's dtype: that of the settings, else by what the device does fast."""
    unset = "float32" if device.kind == "cpu" else "bfloat16" if device.fast_bf16 else "float16"
    return settings.model_dtype or unset


def _codec_dtypes(settings: Settings, device: Device) -> tuple[str, ...]:
    """The codec's possible dtypes, the best first. float16 never unasked: its range is narrower than that of weights.

    Where only one model uses a device, the last one is taken.
    """
    if settings.model_dtype:
        return (settings.model_dtype,)
    if settings.engine == "heartlib" or not device.fast_bf16:
        return ("float32",)
    return ("float32", "bfloat16") if device.kind == "cuda" else ("bfloat16",)


def plan_memory(settings: Settings, device: Device, sizes: Sizes) -> MemoryPlan:
    """Share out a device's memory.

    Both models stay where weights, work memory, contexts and `RESIDENT_SONGS` songs fit; in float32 where they fit with
    a codec of float32, else in bfloat16. Only then do they take turns: a codec in bfloat16 differs from one in float32
    by less than another noise would make it, while a turn moves all weights, twice, and a finished song waits for it.
    A codec that takes turns is alone on the device, and in float32 where it fits so.

    Where models stay, the codec's share holds the encoder too, which comes when the codec has left: that takes nothing
    more with the official models. Where it would keep models from staying, songs come first.

    Raises `ConfigError`, which says what to change, when the device does not hold a song of one minute.
    """
    choice = _choices(settings, device, sizes)
    if not choice:
        raise ConfigError(_refusal(settings, device, sizes))
    return choice[0]


def _choices(settings: Settings, device: Device, sizes: Sizes) -> list[MemoryPlan]:
    """The plans that the device has memory for, the best first."""
    dtypes = _codec_dtypes(settings, device)
    staying = [
        _plan(settings, device, sizes, dtype, resident=True, encoder=encoder)
        for encoder in (sizes.encoder(), 0)
        for dtype in dtypes
    ]
    turning = [_plan(settings, device, sizes, dtype, resident=False) for dtype in dtypes]
    enough = [plan for plan in staying if plan.songs[1] >= RESIDENT_SONGS]
    least = [plan for plan in staying if plan.songs[0]]
    alone = [plan for plan in turning if plan.songs[0] and _codec_fits(plan)]
    return {None: enough + alone, True: alone, False: enough + least}[settings.sequential_offload]


def _codec_fits(plan: MemoryPlan) -> bool:
    return plan.codec + plan.codec_work <= plan.capacity - plan.kept_back - plan.contexts


def _plan(
    settings: Settings, device: Device, sizes: Sizes, codec_dtype: str, *, resident: bool, encoder: int = 0
) -> MemoryPlan:
    """The plan with a codec of this dtype, whether it fits or not.

    What the codec works with is made large enough for so many bytes of the encoder when the codec has left.
    """
    dtype = language_model_dtype(settings, device)
    cuda = device.kind == "cuda"  # on the CPU neither a driver nor a desktop takes of an accounting device
    kept_back, contexts = (_kept_back(device), 2 * CONTEXT) if cuda else (0, 0)
    model, work = sizes.language_model(dtype, settings.int8), sizes.language_model_work(dtype, settings.int8)
    codec = sizes.codec(codec_dtype)
    codec_work = max(sizes.codec_work(), encoder - codec)
    left = device.capacity - kept_back - contexts - model - work
    if resident:
        left -= codec + codec_work
    songs = [max(0, left // sizes.song(dtype, frames, prompt=PROMPT, rows=2)) for frames in FRAMES]
    return MemoryPlan(
        resident=resident,
        capacity=device.capacity,
        kept_back=kept_back,
        contexts=contexts,
        language_model=model,
        language_model_work=work,
        language_model_dtype=dtype,
        int8=settings.int8,
        codec=codec,
        codec_work=codec_work,
        codec_dtype=codec_dtype,
        for_songs=max(0, left),
        songs=songs,
    )


def _kept_back(device: Device) -> int:
    return min(device.capacity // KEPT_BACK, MOST_KEPT_BACK)


def describe(plan: MemoryPlan) -> str:
    """A plan in words."""
    ways = "both models stay on the device" if plan.resident else "the models take turns on the device"
    parts = ", ".join([_language_model(plan), _codec(plan), *_overhead(plan)])
    counts = ", ".join(map(str, plan.songs))
    left = f"{_size(plan.for_songs)} hold {counts} guided songs of 1, 2, 3 minutes"
    return f"{ways} of {_size(plan.capacity)}: {parts}; {left}"


def _language_model(plan: MemoryPlan) -> str:
    small = "" if plan.int8 == "off" else f", int8 {plan.int8}"
    work = _size(plan.language_model_work)
    return f"language model {_size(plan.language_model)} ({plan.language_model_dtype}{small}) and {work} to work"


def _codec(plan: MemoryPlan) -> str:
    return f"codec {_size(plan.codec)} ({plan.codec_dtype}) and {_size(plan.codec_work)} to work"


def _overhead(plan: MemoryPlan) -> list[str]:
    return [f"CUDA {_size(plan.contexts)}", f"kept back {_size(plan.kept_back)}"] if plan.contexts else []


def _less_memory(device: Device) -> tuple[dict[str, dict[str, Any]], ...]:
    """Changes of settings that need less memory; the second kind is for where none of the first would do."""
    offload: dict[str, Any] = {"sequential_offload": None}
    int8: dict[str, Any] = {"int8": "all"}
    half = "bfloat16" if device.fast_bf16 or device.kind == "cpu" else "float16"
    dtype: dict[str, Any] = {"model_dtype": half}
    dtype_name = f"HEARTMULA_MODEL_DTYPE={half}"
    one = {"HEARTMULA_SEQUENTIAL_OFFLOAD=auto": offload, "HEARTMULA_INT8=all": int8, dtype_name: dtype}
    two = {
        "HEARTMULA_SEQUENTIAL_OFFLOAD=auto and HEARTMULA_INT8=all": offload | int8,
        f"{dtype_name} and HEARTMULA_INT8=all": dtype | int8,
    }
    return one, two


def _refusal(settings: Settings, device: Device, sizes: Sizes) -> str:
    """Why a device cannot be used with these settings, and the settings with which it can."""
    resident = settings.sequential_offload is False
    plan = _plan(settings, device, sizes, _codec_dtypes(settings, device)[-1], resident=resident)
    song = sizes.song(plan.language_model_dtype, FRAMES[0], prompt=PROMPT, rows=2)
    songs = [f"a guided song of one minute {_size(song)}"]
    if resident:
        what, parts = "both models at once", [_language_model(plan), _codec(plan), *songs]
    elif plan.songs[0]:
        what, parts = "the codec", [_codec(plan)]
    else:
        what, parts = "the language model", [_language_model(plan), *songs]
    needs = ", ".join([*parts, *_overhead(plan)])
    ways: list[str] = []
    for changes in _less_memory(device):
        ways = ways or [way for way, change in changes.items() if _choices(replace(settings, **change), device, sizes)]
    if device.kind == "cuda" and _codec_fits(plan) and not (resident and ways):
        ways.append("HEARTMULA_HYBRID_MODE=true, with which only the codec uses this device")
    advice = f"set {' or '.join(ways)}" if ways else "only a device with more memory will do"
    return f"{device.name} has {_size(device.capacity)}, too little for {what} ({needs}): {advice}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.0f} MiB"
