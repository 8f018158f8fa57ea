"""Configuration from the environment, validated once at start.

`Settings.load()` reads every ``HEARTMULA_*`` variable and raises `ConfigError` with the variable's name and what
it may be. An unknown ``HEARTMULA_*`` variable is an error too: a misspelt setting would be silently ignored.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shared import setting_parsers as parse
from shared.errors import ConfigError


def _setting(variable: str, parser: Callable[[str], Any], default: Any, doc: str, *, secret: bool = False) -> Any:
    """`secret`: neither errors nor the settings' repr show the value."""
    metadata = {"variable": variable, "parse": parser, "doc": doc, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of all processes. A field left at its default was not set."""

    model_path: Path = _setting(
        "HEARTMULA_MODEL_PATH",
        parse.path,
        Path("ckpt/demo"),
        "checkpoint folder (see ckpt/README.md)",
    )
    model_version: str = _setting(
        "HEARTMULA_MODEL_VERSION",
        parse.text,
        "",
        "which HeartMuLa-oss-* folder, when the checkpoint folder holds several",
    )
    model_dtype: str = _setting(
        "HEARTMULA_MODEL_DTYPE",
        parse.choice("float16", "bfloat16", "float32"),
        "",
        "float16, bfloat16 or float32; unset: bfloat16 on CUDA (float16 before Ampere), float32 on the CPU; the codec "
        "in bfloat16 on CPUs with AMX and on CUDA from Ampere on where memory asks for it, else in float32",
    )
    int8: str = _setting(
        "HEARTMULA_INT8",
        parse.choice("off", "decoder", "all"),
        "off",
        "weights of the language model kept as int8: those of the depth decoder, or of the backbone too",
    )
    compile: bool = _setting(
        "HEARTMULA_COMPILE",
        parse.flag,
        False,
        "accepted and without effect: torch.compile was slower than what is there without it",
    )
    engine: str = _setting(
        "HEARTMULA_ENGINE",
        parse.choice("native", "heartlib", "trivial"),
        "native",
        "native, heartlib (reference; must be installed) or trivial (makes beeps; tests the flow without a model)",
    )
    trivial_step_ms: int = _setting(
        "HEARTMULA_TRIVIAL_STEP_MS", parse.integer(0, 10_000), 0, "how long a step of the trivial engine takes"
    )
    trivial_window: tuple[int, int] = _setting(
        "HEARTMULA_TRIVIAL_WINDOW",
        parse.window,
        (372, 320),
        "frames of a window of the trivial codec, and frames from one to the next: 372/320, as the codec's",
    )
    trivial_window_ms: int = _setting(
        "HEARTMULA_TRIVIAL_WINDOW_MS", parse.integer(0, 60_000), 0, "how long a window of the trivial codec takes"
    )
    trivial_swap_ms: int = _setting(
        "HEARTMULA_TRIVIAL_SWAP_MS",
        parse.integer(0, 60_000),
        0,
        "how long the trivial engines take to move to the device, and as long back",
    )
    sequential_offload: bool | None = _setting(
        "HEARTMULA_SEQUENTIAL_OFFLOAD",
        parse.flag_or_auto,
        None,
        "true: the models take turns on the device; false: both stay on it; auto: both stay where memory allows",
    )
    hybrid_mode: bool = _setting(
        "HEARTMULA_HYBRID_MODE",
        parse.flag,
        False,
        "true: the language model stays on the CPU, only the codec uses the GPU",
    )
    output_path: Path | None = _setting(
        "HEARTMULA_OUTPUT_PATH", parse.path, None, "finished audio is also written to this folder"
    )
    device: str = _setting("HEARTMULA_DEVICE", parse.device, "auto", "auto, cpu, cuda or cuda:N")
    gpu_id: str = _setting(
        "HEARTMULA_GPU_ID",
        parse.token,
        "",
        "name of the device in the lease; unset: the GPU's UUID, or cpu-<host name>",
    )
    cpu_device_mb: int = _setting(
        "HEARTMULA_CPU_DEVICE_MB",
        parse.integer(1, 10_000_000),
        0,
        "size of the accounting device that stands in for a GPU on the CPU; unset: the machine's memory",
    )
    turn_seconds: float = _setting(
        "HEARTMULA_TURN_SECONDS",
        parse.seconds(1, 86400),
        60.0,
        "slice of a worker's turn: how long songs that wait for the other worker may have to wait for the device",
    )
    batch: int = _setting(
        "HEARTMULA_BATCH",
        parse.integer(1, 256),
        0,
        "songs that are made at once, fewer where memory does not suffice; unset: up to 16 on CUDA, 8 on the CPU",
    )
    codec_steps: int = _setting(
        "HEARTMULA_CODEC_STEPS",
        parse.integer(1, 100),
        10,
        "Euler steps of the codec for 29.76 s of audio; time follows them",
    )
    codec_guidance: float = _setting(
        "HEARTMULA_CODEC_GUIDANCE",
        parse.number(1, 5),
        1.25,
        "guidance of the codec; 1: none, which takes half the time",
    )
    checkpoint_seconds: float = _setting(
        "HEARTMULA_CHECKPOINT_SECONDS",
        parse.seconds(0.08, 3600),
        5.0,
        "seconds of music after which a song's tokens are saved again; what a crash can cost",
    )
    sweep_seconds: float = _setting(
        "HEARTMULA_SWEEP_SECONDS",
        parse.seconds(1, 86400),
        300.0,
        "pause between two searches for what crashes left behind; only what is older than this is touched",
    )
    keep_tokens_seconds: float | None = _setting(
        "HEARTMULA_KEEP_TOKENS_SECONDS",
        parse.seconds(0, 604_800),
        None,
        "seconds for which a completed song's tokens are kept, for others to go on from; unset: as long as its audio",
    )
    recording_seconds: float = _setting(
        "HEARTMULA_RECORDING_SECONDS",
        parse.seconds(1, 3600),
        600.0,
        "how long an uploaded recording may be",
    )
    recording_mb: int = _setting(
        "HEARTMULA_RECORDING_MB",
        parse.integer(1, 10_000),
        100,
        "how many million bytes an uploaded recording may have",
    )
    lease_ttl: int = _setting(
        "HEARTMULA_LEASE_TTL",
        parse.integer(2, 60),
        10,
        "seconds after which a dead worker's lease expires; 15-20 on a cluster",
    )
    queue_limit: int = _setting(
        "HEARTMULA_QUEUE_LIMIT",
        parse.integer(1, 100_000),
        500,
        "songs that may wait or run, and as many recordings; more are refused with 429",
    )
    webhook_secret: str = _setting(
        "HEARTMULA_WEBHOOK_SECRET", parse.webhook_secret, "", "whsec_…, signs webhooks; unset: no webhooks", secret=True
    )
    webhook_private: bool = _setting(
        "HEARTMULA_WEBHOOK_PRIVATE", parse.flag, False, "whether webhooks may go to private addresses, as fetches may"
    )
    host: str = _setting("HEARTMULA_HOST", parse.text, "127.0.0.1", "address the gateway listens on")
    port: int = _setting("HEARTMULA_PORT", parse.integer(1, 65535), 8000, "port the gateway listens on")
    api_keys: Path | None = _setting(
        "HEARTMULA_API_KEYS",
        parse.path,
        None,
        "TOML file of tenants, their keys' SHA-256 and their limits; unset: no key is needed",
    )
    cors_origins: str = _setting(
        "HEARTMULA_CORS_ORIGINS",
        parse.origins,
        "",
        "origins, divided by commas, whose pages may use the API, with a key where keys are needed",
    )
    allowed_hosts: str = _setting(
        "HEARTMULA_ALLOWED_HOSTS",
        parse.hosts,
        "",
        "names, divided by commas, under which a gateway without keys answers; localhost, IP addresses and "
        "HEARTMULA_HOST always are",
    )
    data_dir: Path = _setting(
        "HEARTMULA_DATA_DIR",
        parse.path,
        Path("data"),
        "state of the embedded servers, their credentials, the device locks; both workers of a GPU must share it",
    )
    nats_url: str = _setting(
        "HEARTMULA_NATS_URL",
        parse.nats_urls,
        "",
        "your own NATS, credentials included; several nodes divided by commas; unset: the embedded server",
        secret=True,
    )
    reply_prefixes: str = _setting(
        "HEARTMULA_REPLY_PREFIXES",
        parse.prefixes,
        "",
        "first parts of further subjects, divided by commas, on which the gateway may answer NATS clients",
    )
    nats_replicas: int = _setting(
        "HEARTMULA_NATS_REPLICAS",
        parse.integer(1, 5),
        1,
        "copies of every stream; more than one on a cluster",
    )
    nats_port: int = _setting("HEARTMULA_NATS_PORT", parse.integer(1, 65535), 4222, "port of the embedded NATS server")
    s3_endpoint: str = _setting(
        "HEARTMULA_S3_ENDPOINT", parse.endpoint, "", "your own S3 store; unset: the embedded one"
    )
    s3_port: int = _setting(
        "HEARTMULA_S3_PORT",
        parse.integer(1, 55527),
        8333,
        "port of the embedded S3 server; it also takes the nine above it, and the one 10,008 above",
    )
    s3_access_key: str = _setting("HEARTMULA_S3_ACCESS_KEY", parse.text, "", "credentials of your own S3 store")
    s3_secret_key: str = _setting(
        "HEARTMULA_S3_SECRET_KEY", parse.text, "", "credentials of your own S3 store", secret=True
    )
    s3_bucket: str = _setting("HEARTMULA_S3_BUCKET", parse.text, "heartmula", "bucket for tokens and audio")
    s3_region: str = _setting("HEARTMULA_S3_REGION", parse.text, "us-east-1", "region of the S3 store")
    log_format: str = _setting(
        "HEARTMULA_LOG_FORMAT", parse.choice("text", "json"), "text", "lines for people, or a JSON object a line"
    )
    metrics_port: int = _setting(
        "HEARTMULA_METRICS_PORT", parse.integer(0, 65535), 0, "where a worker serves its figures; 0: nowhere"
    )
    metrics_host: str = _setting("HEARTMULA_METRICS_HOST", parse.text, "127.0.0.1", "on which address")
    log_level: str = _setting(
        "HEARTMULA_LOG_LEVEL",
        parse.choice("debug", "info", "warning", "error"),
        "info",
        "debug, info, warning or error",
    )

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read and check every variable; raises `ConfigError` naming the first that is wrong."""
        values: dict[str, Any] = {}
        known = set()
        for item in fields(cls):
            variable = item.metadata["variable"]
            known.add(variable)
            raw = environ.get(variable, "")
            if raw == "":  # compose files pass unset variables as empty ones
                continue
            try:
                values[item.name] = item.metadata["parse"](raw)
            except ValueError as error:
                got = "" if item.metadata["secret"] or "@" in raw else f", got {raw!r}"
                raise ConfigError(f"{variable} {error}{got}") from None
        unknown = sorted(v for v in environ if v.startswith("HEARTMULA_") and v not in known | _ELSEWHERE)
        if unknown:
            raise ConfigError(f"{unknown[0]} is not a setting of this version; docs/configuration.md lists them all")
        settings = cls(**values)
        if settings.s3_endpoint and not (settings.s3_access_key and settings.s3_secret_key):
            raise ConfigError("HEARTMULA_S3_ENDPOINT needs HEARTMULA_S3_ACCESS_KEY and HEARTMULA_S3_SECRET_KEY too")
        return settings

    def require_servers(self) -> None:
        """Raise `ConfigError` unless NATS and S3 are named: a single service cannot start servers of its own."""
        if not self.nats_url:
            raise ConfigError("HEARTMULA_NATS_URL is not set; `make run` sets it for the embedded server")
        if not self.s3_endpoint:
            raise ConfigError("HEARTMULA_S3_ENDPOINT is not set; `make run` sets it for the embedded server")


# Read by the golden tests and the command line, not by a service.
_ELSEWHERE = {
    "HEARTMULA_API_KEY",
    "HEARTMULA_API_KEY_FILE",
    "HEARTMULA_GOLDEN",
    "HEARTMULA_GOLDEN_ENCODER",
    "HEARTMULA_URL",
}


def host_name() -> str:
    """This machine's name as one NATS subject token."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in socket.gethostname()) or "host"
