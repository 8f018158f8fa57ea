"""Sentences about servers that do not answer, and how often they are reported."""

import errno
import os
import re
import socket
import ssl

import nats.errors
import nats.js.errors
import pytest
import urllib3

from shared.causes import address, describe_error, is_final
from shared.waiting import ThrottledLog

REFUSED = "connection refused, nothing listens there"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), REFUSED),
        # A host with several addresses, as asyncio says it.
        (OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1), [Errno 111] Connect call"), REFUSED),
        (OSError(errno.EHOSTUNREACH, "…"), os.strerror(errno.EHOSTUNREACH).lower()),
        (ConnectionResetError(errno.ECONNRESET, "…"), "the connection was lost"),
        (socket.gaierror(socket.EAI_NONAME, "…"), "the host's name cannot be resolved"),
        (TimeoutError(), "no answer yet"),
        (nats.errors.TimeoutError(), "no answer yet"),
        (nats.errors.OutboundBufferLimitError(), "no connection"),
        (nats.errors.UnexpectedEOF(), "the connection was lost"),
        (nats.errors.AuthorizationError(), "wrong user or password"),
        (nats.errors.Error("nats: 'Authorization Violation'"), "wrong user or password"),
        (nats.errors.Error("nats: 'maximum connections exceeded'"), "maximum connections exceeded"),
        (nats.js.errors.NoStreamResponseError(), "JetStream does not answer"),
        (
            nats.js.errors.ServiceUnavailableError(code=503, description="insufficient resources"),
            "insufficient resources",
        ),
        (urllib3.exceptions.HTTPError("<urllib3.connection.HTTPConnection object at 0x7f>"), "no answer that could"),
        (
            urllib3.exceptions.MaxRetryError(
                urllib3.HTTPConnectionPool("h"),
                "/",
                caused(urllib3.exceptions.ProtocolError("…"), ConnectionRefusedError(errno.ECONNREFUSED, "…")),
            ),
            REFUSED,
        ),
        (urllib3.exceptions.ReadTimeoutError(urllib3.HTTPConnectionPool("h"), "/", "…"), "no answer yet"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER]"), "the connection was lost"),
        (RuntimeError("secret"), "no answer that could be understood"),
    ],
)
def test_a_cause_has_words_and_no_class_name(error: Exception, words: str) -> None:
    said = describe_error(error)
    assert said.startswith(words)
    assert not re.search(r"[a-z]Error|Exception|object at|secret", said)


def test_only_what_waiting_does_not_mend_is_final() -> None:
    assert is_final(nats.errors.Error("nats: 'Authorization Violation'"))
    assert is_final(caused(urllib3.exceptions.HTTPError(), ssl.SSLCertVerificationError()))
    assert not is_final(socket.gaierror(socket.EAI_NONAME, "…"))
    assert not is_final(TimeoutError())


@pytest.mark.parametrize(
    ("urls", "shown"),
    [
        ("nats://me:swordfish@host:4222", "nats://host:4222"),
        ("nats://me:sword@fish@a:1,tls://you:swordfish@b:2", "nats://a:1,tls://b:2"),
        ("http://host:9000", "http://host:9000"),
    ],
)
def test_addresses_are_shown_without_passwords(urls: str, shown: str) -> None:
    assert address(urls) == shown


def test_a_sentence_is_said_at_once_when_it_changes_and_every_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 1000.0, list[tuple[float, str]]()
    monkeypatch.setattr("time.monotonic", lambda: now)
    throttled = ThrottledLog(lambda sentence: said.append((now, sentence)))
    while now < 1070:
        throttled.log("refused" if now < 1065 else "no answer yet")
        now += 0.5
    assert said == [(1000.0, "refused"), (1030.0, "refused"), (1060.0, "refused"), (1065.0, "no answer yet")]
