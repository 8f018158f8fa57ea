"""Maps the errors of nats-py to this project's, at one place.

::

    with nats_errors("events cannot be read"):
        message = await js.get_msg(...)

raises, instead of whatever nats-py and the operating system raise,

- `NotFound` where a message, stream or consumer is not there,
- `WrongSequence` where a compare-and-set met another write,
- `StreamFull` where a stream, or a subject in it, holds as many messages as it may,
- `Refused` where JetStream refuses for any other reason,
- `Unavailable` where there is no answer or no connection.

Callers decide what the first two mean; the others are kinds of `Unavailable`. Other exceptions pass unchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import nats.errors
from nats.js.errors import APIError, NotFoundError

from shared.causes import describe_error
from shared.errors import NotFound, Refused, StreamFull, Unavailable, WrongSequence

# Error codes of JetStream, from server/errors.json of nats-server.
_WRONG_LAST_SEQUENCE = 10071
_STREAM_FULL = 10077
_NOT_DELETED = 10057  # for whatever reason; its description says which


@contextmanager
def nats_errors(failure: str, refusal: str | None = None) -> Iterator[None]:
    """Map what the body raises. `failure` begins the message: "events cannot be read: no answer yet".

    `refusal`, where it is given, begins it instead where JetStream answered and refused.
    """
    refusal = refusal or failure
    try:
        yield
    except NotFoundError as error:
        raise NotFound(f"{refusal}: {describe_error(error)}") from error
    except APIError as error:
        if error.err_code == _NOT_DELETED and error.description == "no message found":  # it was taken meanwhile
            raise NotFound(f"{refusal}: {describe_error(error)}") from error
        if error.err_code == _WRONG_LAST_SEQUENCE:
            raise WrongSequence(f"{refusal}: {describe_error(error)}") from error
        if error.err_code == _STREAM_FULL:
            subject_only = "per subject" in (error.description or "")
            raise StreamFull("nats", f"{refusal}: {describe_error(error)}", subject_only=subject_only) from error
        raise Refused("nats", f"{refusal}: {describe_error(error)}") from error
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise Unavailable("nats", f"{failure}: {describe_error(error)}") from error
