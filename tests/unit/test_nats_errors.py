"""nats-py's errors become this project's; others pass unchanged."""

import asyncio

import nats.errors
import pytest
from nats.js.errors import APIError, BadRequestError, NoStreamResponseError, NotFoundError, ServiceUnavailableError

from shared.errors import HeartMulaError, NotFound, Refused, StreamFull, Unavailable, WrongSequence
from shared.nats.errors import nats_errors


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (NotFoundError(code=404, description="no message found"), NotFound, "it failed: no message found"),
        (APIError(code=500, err_code=10057, description="no message found"), NotFound, "it failed: no message found"),
        (APIError(code=500, err_code=10057, description="disk is away"), Refused, "it failed: disk is away"),
        (BadRequestError(code=400, err_code=10071, description="wrong last"), WrongSequence, "it failed: wrong last"),
        (
            APIError(code=400, err_code=10077, description="maximum messages exceeded"),
            StreamFull,
            "it failed: maximum messages exceeded",
        ),
        (ServiceUnavailableError(code=503, description="no quorum"), Refused, "it failed: no quorum"),
        (BadRequestError(code=400, err_code=10003), Refused, "it failed: JetStream refused"),
        (NoStreamResponseError(), Unavailable, "it failed: JetStream does not answer"),
        (nats.errors.TimeoutError(), Unavailable, "it failed: no answer yet"),
        (nats.errors.OutboundBufferLimitError(), Unavailable, "it failed: no connection"),
        (TimeoutError(), Unavailable, "it failed: no answer yet"),
        (ConnectionRefusedError(111, "refused"), Unavailable, "it failed: connection refused, nothing listens there"),
    ],
)
def test_each_error_has_one_meaning_and_keeps_its_cause(
    raised: Exception, kind: type[HeartMulaError], message: str
) -> None:
    with pytest.raises(HeartMulaError) as caught, nats_errors("it failed"):
        raise raised
    assert type(caught.value) is kind
    assert str(caught.value) == message
    assert caught.value.__cause__ is raised
    assert not isinstance(caught.value, Unavailable) or caught.value.service == "nats"


@pytest.mark.parametrize("subject_only", [True, False])
def test_a_full_subject_is_told_from_a_full_stream(subject_only: bool) -> None:
    description = f"maximum messages {'per subject ' if subject_only else ''}exceeded"
    with pytest.raises(StreamFull) as caught, nats_errors("it failed"):
        raise APIError(code=400, err_code=10077, description=description)
    assert caught.value.subject_only is subject_only


def test_a_refusal_has_words_of_its_own_where_they_are_given() -> None:
    with pytest.raises(Unavailable, match=r"^refused: no room"), nats_errors("no answer", refusal="refused"):
        raise APIError(code=500, description="no room")
    with pytest.raises(Unavailable, match=r"^no answer: "), nats_errors("no answer", refusal="refused"):
        raise nats.errors.TimeoutError


@pytest.mark.parametrize("raised", [ValueError("x"), NotFound("x"), asyncio.CancelledError()], ids=repr)
def test_other_exceptions_pass_unchanged(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, nats_errors("it failed"):
        raise raised
    assert caught.value is raised
