"""The errors of the object store's client become this project's; others pass unchanged."""

import ssl

import pytest
import urllib3
from minio.error import InvalidResponseError, S3Error

from shared.errors import HeartMulaError, ObjectError, Rejected, Unavailable
from shared.storage.errors import storage_errors

POOL = urllib3.HTTPConnectionPool("localhost")


def s3_error(code: str) -> S3Error:
    response = urllib3.HTTPResponse(status=400)
    return S3Error(code=code, message="its words", resource=None, request_id=None, host_id=None, response=response)


def untrusted() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "…")
    error.verify_code, error.verify_message = 19, "self-signed certificate in certificate chain"
    return error


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (s3_error("NoSuchKey"), ObjectError, "the object is gone: NoSuchKey"),
        (s3_error("SignatureDoesNotMatch"), Rejected, "the store does not accept the password: HEARTMULA_S3_SECRET"),
        (s3_error("SlowDown"), Unavailable, "the store refused: SlowDown, its words"),
        (urllib3.exceptions.ReadTimeoutError(POOL, "/", "…"), Unavailable, "no connection to the store: no answer yet"),
        (
            urllib3.exceptions.SSLError(untrusted()),
            Rejected,
            "no connection to the store: its certificate is not trusted",
        ),
        (InvalidResponseError(502, "text/html", "Bad Gateway"), Unavailable, "the store answers strangely: "),
    ],
)
def test_each_error_has_one_meaning(raised: Exception, kind: type[HeartMulaError], message: str) -> None:
    with pytest.raises(HeartMulaError) as caught, storage_errors("the store"):
        raise raised
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
    assert not isinstance(caught.value, Unavailable) or caught.value.service == "s3"


def test_what_waiting_does_not_mend_can_be_named_by_the_caller() -> None:
    refusals = {"InvalidAccessKeyId": "S3_ROOT_USER"}
    with pytest.raises(Rejected, match="the store does not accept S3_ROOT_USER"), storage_errors("the store", refusals):
        raise s3_error("InvalidAccessKeyId")
    with pytest.raises(Unavailable) as caught, storage_errors("the store", {}):
        raise s3_error("InvalidAccessKeyId")
    assert type(caught.value) is Unavailable


@pytest.mark.parametrize("raised", [ValueError("x"), ObjectError("x"), OSError("x")], ids=repr)
def test_other_exceptions_pass_unchanged(raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, storage_errors("the store"):
        raise raised
    assert caught.value is raised
