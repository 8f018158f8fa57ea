"""The names of streams, buckets, consumers and subjects. What each subject carries: docs/topology.md."""

from shared.schema.request import Priority

TENANT = "local"  # the tenant while no API keys are configured
SERVICES = ("operator", "bootstrap", "gateway", "tokenizer", "codec")  # NATS users that are not clients
TOK, DEC, EVENTS, FAULTS, INTAKE = "TOK", "DEC", "EVENTS", "FAULTS", "INTAKE"
JOBS, GPU_LOCK, WORKERS = "JOBS", "GPU_LOCK", "WORKERS"
TOK_CONSUMERS: dict[Priority, str] = {"high": "tok-high", "normal": "tok-normal"}
DEC_CONSUMERS: dict[Priority, str] = {"high": "dec-live", "normal": "dec"}  # songs with listeners, and the others
DEC_SUBJECTS: dict[Priority, str] = {"normal": "jobs.dec.*", "high": "jobs.live.*"}  # of their messages
ENC_SUBJECT = "jobs.enc.*"
ENC_CONSUMERS: dict[Priority, str] = {"normal": "enc"}  # recordings, in the stream DEC: the codec worker has both
HOOKS_CONSUMER, HOOKS_DELIVERY, HOOKS_GROUP = "hooks", "ctl.hooks", "gateways"
INTAKE_CONSUMER = "intake"  # of the gateways, which submit what waits there
PROBE_SUBJECT = f"$KV.{JOBS}.probe"  # a key that no record has; a gateway writes it to see whether it can


def subject_token(name: str) -> str:
    """Check a name that becomes a part of a subject: no wildcard, separator or space. Raises `ValueError`."""
    if not name or any(c in ".*>" or c.isspace() for c in name):
        raise ValueError(f"{name[:80]!r} cannot be a part of a NATS subject")
    return name


def token_subject(priority: Priority, job_id: str) -> str:
    """The subject of a `TokenJob`."""
    return f"jobs.tok.{priority}.{subject_token(job_id)}"


def decode_subject(job_id: str, lane: Priority = "normal") -> str:
    """The subject of a `DecodeJob`; the lane is `high` for a song that somebody listens to."""
    return DEC_SUBJECTS[lane].replace("*", subject_token(job_id))


def decode_lane(subject: str) -> Priority:
    """The lane of a `DecodeJob`, by its subject."""
    return "high" if subject.startswith(DEC_SUBJECTS["high"].removesuffix("*")) else "normal"


def encode_subject(job_id: str) -> str:
    """The subject of a `TokenJob` of a recording."""
    return ENC_SUBJECT.replace("*", subject_token(job_id))


def dead_subject(stage: str, job_id: str) -> str:
    """The dead-letter subject of a message that will not be tried again."""
    return f"dead.{stage}.{subject_token(job_id)}"


def event_subject(tenant: str, job_id: str, kind: str) -> str:
    """The subject of an event; the kind `*` means all kinds."""
    return f"events.{subject_token(tenant)}.{subject_token(job_id)}.{kind}"


def cancel_subject(job_id: str) -> str:
    """The subject that asks the worker of a job to stop; not stored."""
    return f"ctl.cancel.{subject_token(job_id)}"


def listen_subject(job_id: str) -> str:
    """The subject of a `Listening`: somebody listens to a song that is being made; not stored."""
    return f"ctl.listen.{subject_token(job_id)}"


def work_subject(stage: str) -> str:
    """The subject that notifies workers of a song that waits, new or given back; not stored."""
    return f"ctl.work.{stage}"


def submit_subject(tenant: str) -> str:
    """The subject on which NATS clients submit songs."""
    return f"submit.{subject_token(tenant)}"


def intake_subject(tenant: str) -> str:
    """The subject on which NATS clients leave requests that are submitted later; a gateway answers, no stream."""
    return f"intake.{subject_token(tenant)}"


def intake_queue_subject(tenant: str) -> str:
    """The subject of a tenant's requests in the stream INTAKE; the tenant `*` means any tenant."""
    return f"jobs.intake.{tenant if tenant == '*' else subject_token(tenant)}"


def record_subject(tenant: str, job_id: str) -> str:
    """The subject on which NATS clients request a song's record."""
    return f"record.{subject_token(tenant)}.{subject_token(job_id)}"


def job_subject(tenant: str, job_id: str) -> str:
    """The subject of a song's key in JOBS; the tenant `*` means any tenant."""
    return f"$KV.{JOBS}.{tenant if tenant == '*' else subject_token(tenant)}.{subject_token(job_id)}"


def lock_group(role: str) -> str:
    """The group of a role in GPU_LOCK: roles of one group exclude each other on a device even where models stay.

    Codec and encoder have one share of the device's memory, and so one group.
    """
    return "codec" if role == "encoder" else role


def lock_key(gpu: str, role: str, instance: str) -> str:
    """A candidate's key in GPU_LOCK."""
    return f"{gpu}.{lock_group(role)}.{instance}"
