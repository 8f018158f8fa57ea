"""The structures that workers publish: heartbeats, the device's figures, and their place in the queue for it."""

from typing import Literal

import msgspec

from shared.schema.base import SCHEMA, Seconds

Role = Literal["tokenizer", "codec", "encoder"]  # the encoder is in the codec worker's process


class GpuFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A device as a worker sees it. Memory in bytes; None where there is nothing to read it from."""

    id: str
    name: str
    kind: Literal["cuda", "cpu"]
    memory_total: int
    memory_used: int
    utilization: int | None = None  # per cent
    temperature: int | None = None  # °C


class PhaseMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory at the two ends of a phase of a worker's latest turn, in bytes."""

    phase: int
    device_before: int
    device_after: int | None = None  # None while it lasts
    host: int  # resident set of the worker's process at its begin


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The use that both workers of a device make of its memory, decided at their start. Memory in bytes."""

    resident: bool  # both models stay on the device; else they take turns
    capacity: int
    kept_back: int  # for other programs, and for what allocators cannot use
    contexts: int  # of CUDA, of both workers
    language_model: int
    language_model_work: int
    language_model_dtype: str
    int8: str  # stacks of the language model that are int8 instead: off, decoder or all
    codec: int
    codec_work: int
    codec_dtype: str
    for_songs: int  # what is left for the caches of songs
    songs: list[int]  # guided songs of one, two and three minutes that fit at once


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's heartbeat; gone from the WORKERS bucket when the worker is."""

    schema: int = SCHEMA
    role: Role
    instance: str
    host: str
    pid: int
    engine: str
    model: str
    gpu: GpuFigures
    state: Literal["idle", "waiting", "working"]
    phase: int | None = None
    resident: list[str] = []  # everything on the device, of all workers
    jobs: list[str] = []  # songs that it works on
    slots: int = 1  # songs that it can work on at once
    rate: float | None = None  # frames a second recently, of all its songs together; for the codec frames decoded
    song_frames: float | None = None  # mean frames that it made, or decoded, of its latest songs
    memory: list[PhaseMemory] = []
    plan: MemoryPlan | None = None  # None: one model alone uses the device, or the engine is the reference
    notes: list[str] = []  # what its engine does without, for people
    problem: str | None = None  # why it cannot work, for people
    movement: int = 0  # grows with every step, model that loads and song that is handed on
    failed_writes: int = 0  # writes that a server refused or did not confirm, since its start
    since: Seconds  # of the state
    sent: Seconds  # of two workers on a device, the later heartbeat shows what is on it


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate's key in GPU_LOCK. `ticket` 0 means: the sequence of this very message."""

    schema: int = SCHEMA
    ticket: int
    state: Literal["waiting", "held"]
    role: str
    owner: str  # instance
    phase: int | None = None
    since: Seconds
