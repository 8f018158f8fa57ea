"""Describes why a server cannot be used, in words that a user understands: no class names, no passwords."""

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator

import nats.errors
import nats.js.errors
import urllib3

from shared.errors import HeartMulaError

NO_ANSWER = "no answer yet"
_LOST = "the connection was lost"
_ALTERNATIVES = re.compile(r"\[Errno (\d+)\]")  # asyncio joins the failures of a host's addresses in one text
_OTHER_NAME = (62, 64)  # what OpenSSL says of a certificate for another host name, or another address


def address(urls: str) -> str:
    """Remove users and passwords from addresses, which are divided by commas."""

    def bare(url: str) -> str:
        scheme, mark, rest = url.strip().partition("://")
        return f"{scheme}{mark}{rest.rpartition('@')[2]}"

    return ",".join(bare(url) for url in urls.split(","))


def describe_error(error: BaseException) -> str:
    """Say in words what an exception of nats-py, urllib3 or the operating system means."""
    for cause in _causes(error):
        if words := _words(cause):
            return words
    return "no answer that could be understood"


def is_final(error: BaseException) -> bool:
    """Whether waiting does not help: credentials are wrong, or a certificate is not trusted."""
    return any(isinstance(cause, ssl.SSLCertVerificationError) or _is_refusal(cause) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, then those that it wraps."""
    seen: list[BaseException] = []
    found = [error]
    while found:
        cause = found.pop(0)
        if any(cause is known for known in seen):
            continue
        seen.append(cause)
        yield cause
        inner = [getattr(cause, "reason", None), cause.__cause__, *cause.args]
        found += [part for part in inner if isinstance(part, BaseException)]


def _is_refusal(cause: BaseException) -> bool:
    if isinstance(cause, nats.errors.AuthorizationError):
        return True
    # Refusals during the first exchange come as text.
    return isinstance(cause, nats.errors.Error) and "authorization violation" in str(cause).lower()


def _words(cause: BaseException) -> str | None:
    """The meaning of one exception; None where one that it wraps says more."""
    match cause:
        case HeartMulaError():
            return str(cause)
        case ssl.SSLCertVerificationError():
            return _certificate(cause)
        case ssl.SSLError():
            return _tls(getattr(cause, "reason", None) or "EOF")  # only OpenSSL's own have one
        case socket.gaierror():
            return "the host's name cannot be resolved"
        case nats.js.errors.NoStreamResponseError() | nats.errors.NoRespondersError():
            return "JetStream does not answer"
        case nats.js.errors.APIError():
            return cause.description or "JetStream refused"
        case nats.errors.OutboundBufferLimitError() | nats.errors.ConnectionClosedError():
            return "no connection"
        case nats.errors.UnexpectedEOF() | nats.errors.StaleConnectionError():
            return _LOST
        case urllib3.exceptions.NewConnectionError():  # a kind of timeout to urllib3; its cause says more
            return None
        case TimeoutError() | nats.errors.TimeoutError() | urllib3.exceptions.TimeoutError():
            return NO_ANSWER
        case nats.errors.Error():
            if _is_refusal(cause):
                return "wrong user or password"
            return str(cause).removeprefix("nats: ").strip("'\" ") or NO_ANSWER
        case urllib3.exceptions.ResponseError():
            return f"it answers with {cause}"  # "too many 503 error responses"
        case OSError():
            return _system(cause)
    return None


def _tls(reason: str) -> str:
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return "it does not speak TLS there"
    if any(word in reason for word in ("EOF", "CLOSE_NOTIFY", "SHUTDOWN")):
        return _LOST
    return f"TLS failed ({reason.lower().replace('_', ' ')})"


def _certificate(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _OTHER_NAME:
        return f"its certificate is for another host ({error.verify_message})"
    file = os.environ.get("SSL_CERT_FILE")
    advice = "set SSL_CERT_FILE to a file with the certificate of the authority that signed it"
    if file:
        advice = f"SSL_CERT_FILE={file} {'does not hold its authority' if os.path.isfile(file) else 'is not there'}"
    return f"its certificate is not trusted ({error.verify_message}): {advice}"


def _system(error: OSError) -> str:
    numbers = {error.errno} if error.errno else {int(number) for number in _ALTERNATIVES.findall(str(error))}
    if errno.ECONNREFUSED in numbers:
        return "connection refused, nothing listens there"
    if not numbers or numbers & {errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED}:
        return _LOST
    return os.strerror(min(numbers)).lower()
