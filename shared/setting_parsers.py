"""Parsers of the values of settings: each returns the value, or raises `ValueError` that says what it must be."""

import base64
import math
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


def text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def path(value: str) -> Path:
    return Path(text(value))


def flag(value: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    try:
        return known[value.strip().lower()]
    except KeyError:
        raise ValueError("must be true or false") from None


def flag_or_auto(value: str) -> bool | None:
    """None is auto."""
    if value.strip().lower() == "auto":
        return None
    try:
        return flag(value)
    except ValueError:
        raise ValueError("must be auto, true or false") from None


def integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError(f"must be a whole number from {low} to {high}") from None
        if not low <= number <= high:
            raise ValueError(f"must be from {low} to {high}")
        return number

    return parse


def window(value: str) -> tuple[int, int]:
    """Frames of a window and frames from one to the next."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value.strip())
    length, hop = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= hop <= length:
        raise ValueError("must be two whole numbers such as 372/320, the second not larger than the first")
    return length, hop


def number(low: float, high: float, kind: str = "a number") -> Callable[[str], float]:
    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise ValueError(f"must be {kind} from {low:g} to {high:g}")
        return number

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    return number(low, high, "a number of seconds")


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return parse


def url(*schemes: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        wanted = " or ".join(f"{scheme}://" for scheme in schemes)
        try:
            parts = urlsplit(value)
            known = value.startswith(tuple(f"{scheme}://" for scheme in schemes))
            usable = known and parts.hostname is not None and parts.port != 0
        except ValueError:  # its words may repeat a part of a password
            usable = False
        if not usable:
            raise ValueError(
                f"must be a URL starting with {wanted}, then a host, and a port if it is not the usual one"
            )
        return value.rstrip("/")

    return parse


def nats_urls(value: str) -> str:
    parse = url("nats", "tls")
    return ",".join(parse(part.strip()) for part in value.split(","))


def origins(value: str) -> str:
    for origin in value.split(","):
        scheme, _, host = origin.strip().partition("://")
        if scheme not in ("http", "https") or not host or any(c in "/*?#@ " for c in host):
            raise ValueError("must be origins such as https://songs.example, divided by commas")
    return value


def hosts(value: str) -> str:
    """Names of hosts, in lower case."""
    names = [name.strip().lower().removesuffix(".") for name in value.split(",")]
    if not all(_HOST.fullmatch(name) for name in names):
        raise ValueError("must be names such as songs.example, without scheme or port, divided by commas")
    return ",".join(names)


def prefixes(value: str) -> str:
    if not all(re.fullmatch(r"_[A-Za-z0-9_-]+", part.strip()) for part in value.split(",")):
        raise ValueError("must be first parts of subjects such as _INBOX_alice, divided by commas")
    return value


def device(value: str) -> str:
    kind, _, index = value.partition(":")
    if value not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdigit()):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def webhook_secret(value: str) -> str:
    """As Standard Webhooks writes a secret: whsec_ and 24 to 64 bytes in base64."""
    try:
        secret = base64.b64decode(value.removeprefix("whsec_"), validate=True)
    except ValueError:
        secret = b""
    if not value.startswith("whsec_") or not 24 <= len(secret) <= 64:
        raise ValueError("must be whsec_ and 24 to 64 bytes in base64")
    return value


def token(value: str) -> str:
    """One NATS subject token; it also becomes a file name."""
    if not value or not all(c.isalnum() or c in "-_" for c in value):
        raise ValueError("may hold letters, digits, - and _ only")
    return value


def endpoint(value: str) -> str:
    if "@" in value:
        raise ValueError("must be a URL starting with http:// or https://, without a user and password")
    return url("http", "https")(value)
