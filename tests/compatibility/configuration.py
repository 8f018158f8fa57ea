"""What is configured: settings, and what lies where in NATS and in the object store."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from shared.device.lease_queue import PREFIX as LEASE_PREFIX
from shared.errors import ConfigError
from shared.jobs.store import ALLOWED
from shared.nats.connection import inbox_prefix
from shared.nats.streams import ack_wait, consumers, streams
from shared.nats.subjects import (
    HOOKS_DELIVERY,
    HOOKS_GROUP,
    PROBE_SUBJECT,
    SERVICES,
    TENANT,
    cancel_subject,
    dead_subject,
    decode_subject,
    event_subject,
    job_subject,
    listen_subject,
    lock_key,
    record_subject,
    submit_subject,
    token_subject,
    work_subject,
)
from shared.settings import Settings
from shared.storage.keys import (
    audio_key,
    converted_key,
    kept_tokens_key,
    keys_with_renditions,
    part_key,
    part_peaks_key,
    peaks_key,
    state_key,
    tokens_key,
)
from shared.storage.objects import PROBES
from tests.compatibility.stored import JOB

ROOT = Path(__file__).parents[2]

_NUMBERS = (
    "-1 0 0.07 0.08 0.99 1 1.25 2 5 5.1 6 60 61 100 101 256 257 3600 3601 10000 10001 55527 55528 65535 65536 86400 "
    "86401 100000 100001 10000000 10000001 nan inf"
)
_WORDS = (
    "true TRUE 1 yes on false no off maybe auto cpu cuda cuda:1 cuda:x float16 bfloat16 float32 int8 decoder all "
    "native heartlib trivial text json debug DEBUG info warning error gpu-0_x a.b"
)
_ADDRESSES = (
    "nats://h tls://u:p@h:4222 nats://a:1,nats://b:2 nats://h:0 http://h:9000 https://h/ http://u:p@h "
    "https://songs.example,http://b:1 https://songs.example/ Songs.Example.,b _INBOX_a,_x INBOX _a.b * "
    f"whsec_{'QUFB' * 8} whsec_QUFB {'QUFB' * 8}"
)
SAMPLES = list(dict.fromkeys([*_NUMBERS.split(), *_WORDS.split(), *_ADDRESSES.split(), "a b"]))
_OTHER_HALF = {"HEARTMULA_S3_ACCESS_KEY": "a", "HEARTMULA_S3_SECRET_KEY": "b"}  # which HEARTMULA_S3_ENDPOINT needs
ELSEWHERE = ["HEARTMULA_API_KEY", "HEARTMULA_API_KEY_FILE", "HEARTMULA_GOLDEN", "HEARTMULA_URL"]


async def settings() -> Any:
    """Every variable: its type, its default, and what it makes of a set of samples, which shows its limits."""
    return {
        item.metadata["variable"]: {
            "type": getattr(item.type, "__name__", str(item.type)),
            "default": _text_of(item.default),
            "shown": item.repr,
            "takes": _taken(item.name, item.metadata["variable"]),
        }
        for item in dataclasses.fields(Settings)
    }


def _taken(field: str, variable: str) -> Any:
    found = {}
    for sample in SAMPLES:
        try:
            found[sample] = _text_of(getattr(Settings.load(_OTHER_HALF | {variable: sample}), field))
        except ConfigError:
            continue
    changed = {sample: value for sample, value in found.items() if value != sample}
    unchanged = [sample for sample in found if sample not in changed]
    return {"as it is": "everything else" if len(found) == len(SAMPLES) else unchanged, "as another value": changed}


def _text_of(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def documented_variables() -> set[str]:
    """Every variable that a row of a table in README.md or a document explains."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    rows = [line for page in pages for line in page.read_text().splitlines() if line.startswith("|")]
    return {name for row in rows for name in re.findall(r"`(HEARTMULA_[A-Z0-9_]+)`", row.split("|")[1])}


async def nats() -> Any:
    """Subjects, streams, buckets, consumers and keys, with default settings; the states that a song may go through."""
    defaults = Settings()
    return {
        "subjects": {
            "job, high": token_subject("high", JOB),
            "job, normal": token_subject("normal", JOB),
            "decode": decode_subject(JOB),
            "decode, with listeners": decode_subject(JOB, "high"),
            "listeners": listen_subject(JOB),
            "dead": dead_subject("tokenizer", JOB),
            "event": event_subject("alice", JOB, "progress"),
            "events": event_subject("alice", JOB, "*"),
            "cancel": cancel_subject(JOB),
            "work": work_subject("codec"),
            "submit": submit_subject("alice"),
            "record of a client": record_subject("alice", JOB),
            "record": job_subject("alice", JOB),
            "record of any tenant": job_subject("*", JOB),
            "lease": LEASE_PREFIX + lock_key("cpu-host", "codec", "codec-1"),
            "probe": PROBE_SUBJECT,
            "webhooks": [HOOKS_DELIVERY, HOOKS_GROUP],
        },
        "refused in a subject": [name for name in ("", "*", ">", "a.b", "a b", "a-b_C1") if not _fits(name)],
        "inboxes": {
            url: inbox_prefix(url).decode()
            for url in ("nats://h:4222", "nats://codec:x@h:4222", "nats://a:x@h:1,nats://b:x@h:2", "nats://a.b:x@h:1")
        },
        "users": SERVICES,
        "tenant without keys": TENANT,
        "streams": {str(found.name): found.as_dict() for found in streams(defaults.queue_limit)},
        "replicated streams": {
            str(found.name): {
                "num_replicas": found.num_replicas,
                "max_bytes": found.max_bytes,
                "persist_mode": found.persist_mode,
            }
            for found in streams(defaults.queue_limit, 3, 1 << 30)
        },
        "consumers": {
            f"{stream} {found.durable_name}": found.as_dict() for stream, found in consumers(ack_wait(defaults))
        },
        "states after a state": {state: sorted(after) for state, after in ALLOWED.items()},
        "objects": {
            "tokens": tokens_key(JOB, 12),
            "tokens of another song that it begins with": kept_tokens_key(JOB),
            "audio": audio_key(JOB, 12, "flac"),
            "converted": converted_key(audio_key(JOB, 12, "flac"), "mp3"),
            "peaks": peaks_key(audio_key(JOB, 12, "flac")),
            "part": part_key(JOB, 12, 3),
            "state after a part": state_key(part_key(JOB, 12, 3)),
            "peaks up to a part": part_peaks_key(part_key(JOB, 12, 3)),
            "all of a song": sorted(keys_with_renditions(audio_key(JOB, 12, "wav"))),
            "probes": PROBES,
        },
    }


def _fits(name: str) -> bool:
    try:
        submit_subject(name)
    except ValueError:
        return False
    return True
