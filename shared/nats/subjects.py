"""The names of streams, buckets, consumers and subjects. What each subject carries: docs/topology.md."""

from shared.schema.request import Priority

TENANT = "local"  # the tenant while no API keys are configured
SERVICES = ("operator", "bootstrap", "gateway", "tokenizer", "codec")  # NATS users that are no clients
TOK, DEC, EVENTS, FAULTS = "TOK", "DEC", "EVENTS", "FAULTS"
JOBS, GPU_LOCK, WORKERS = "JOBS", "GPU_LOCK", "WORKERS"
TOK_CONSUMERS: dict[Priority, str] = {"high": "tok-high", "normal": "tok-normal"}
DEC_CONSUMER = "dec"
HOOKS_CONSUMER, HOOKS_DELIVERY, HOOKS_GROUP = "hooks", "ctl.hooks", "gateways"
PROBE_SUBJECT = f"$KV.{JOBS}.probe"  # a key like no record's, which a gateway writes to see whether it can


def subject_token(name: str) -> str:
    """A name on its way into a subject, where a wildcard would mean everybody's. Raises `ValueError`."""
    if not name or any(c in ".*>" or c.isspace() for c in name):
        raise ValueError(f"{name[:80]!r} cannot be a part of a NATS subject")
    return name


def token_subject(priority: Priority, job_id: str) -> str:
    """Where a `TokenJob` is published."""
    return f"jobs.tok.{priority}.{subject_token(job_id)}"


def decode_subject(job_id: str) -> str:
    """Where a `DecodeJob` is published."""
    return f"jobs.dec.{subject_token(job_id)}"


def dead_subject(stage: str, job_id: str) -> str:
    """Where a message goes that failed for good."""
    return f"dead.{stage}.{subject_token(job_id)}"


def event_subject(tenant: str, job_id: str, kind: str) -> str:
    """Where an event is published; where all kinds are, with `*`."""
    return f"events.{subject_token(tenant)}.{subject_token(job_id)}.{kind}"


def cancel_subject(job_id: str) -> str:
    """Tells the worker that runs a job to stop; not kept."""
    return f"ctl.cancel.{subject_token(job_id)}"


def work_subject(stage: str) -> str:
    """Tells workers that a song waits for them, new or given back. Not kept."""
    return f"ctl.work.{stage}"


def submit_subject(tenant: str) -> str:
    """Where NATS clients ask for a song."""
    return f"submit.{subject_token(tenant)}"


def record_subject(tenant: str, job_id: str) -> str:
    """Where NATS clients ask for a song's record."""
    return f"record.{subject_token(tenant)}.{subject_token(job_id)}"


def job_subject(tenant: str, job_id: str) -> str:
    """A song's key in JOBS, as a subject; with the tenant `*` that of whichever has it."""
    return f"$KV.{JOBS}.{tenant if tenant == '*' else subject_token(tenant)}.{subject_token(job_id)}"


def lock_key(gpu: str, role: str, instance: str) -> str:
    """A contender's key in GPU_LOCK."""
    return f"{gpu}.{role}.{instance}"
