"""Maps the errors of the object store's client to this project's, at one place.

::

    with storage_errors("the object store at http://localhost:8333"):
        client.put_object(...)

raises, instead of whatever minio and urllib3 raise,

- `ObjectError` where an object is not there,
- `Rejected` where waiting does not help: wrong credentials, a certificate that is not trusted,
- `Unavailable` for everything else: no answer, no connection, a refusal.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import urllib3
from minio.error import MinioException, S3Error

from shared.causes import describe_error, is_final
from shared.errors import ObjectError, Rejected, Unavailable

_MISSING = {"NoSuchKey", "NoSuchObject", "ResourceNotFound"}
_REFUSALS = {
    "InvalidAccessKeyId": "the user: HEARTMULA_S3_ACCESS_KEY is not known to it",
    "SignatureDoesNotMatch": "the password: HEARTMULA_S3_SECRET_KEY is wrong",
    # All that is said of a request without a body, as the first one is.
    "AccessDenied": "the user or password: look at HEARTMULA_S3_ACCESS_KEY and HEARTMULA_S3_SECRET_KEY, and whether "
    "that user may use the bucket in HEARTMULA_S3_BUCKET",
}


@contextmanager
def storage_errors(where: str, refusals: Mapping[str, str] = _REFUSALS) -> Iterator[None]:
    """Map what the body raises. `where` names the store for people.

    `refusals` has S3's codes that waiting does not mend, and what the store does not accept then.
    """
    try:
        yield
    except S3Error as error:
        if error.code in _MISSING:
            raise ObjectError(f"the object is gone: {error.code}") from None
        if refusal := refusals.get(error.code or ""):
            raise Rejected("s3", f"{where} does not accept {refusal}") from error
        raise Unavailable("s3", f"{where} refused: {error.code}, {error.message}") from error
    except urllib3.exceptions.HTTPError as error:
        kind = Rejected if is_final(error) else Unavailable
        raise kind("s3", f"no connection to {where}: {describe_error(error)}") from error
    except MinioException as error:
        raise Unavailable("s3", f"{where} answers strangely: {error}") from error  # as a proxy does
