"""The file in a form (multipart/form-data, RFC 7578), passed on as it arrives."""

from collections.abc import AsyncIterable, AsyncIterator

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from shared.errors import RecordingRefused

FIELD = "file"


def form_boundary(content_type: str) -> str | None:
    """The boundary of a form, None for any other content type. Raises `RecordingRefused` for a form without one."""
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data":
        return None
    if not (boundary := options.get("boundary", "")).isascii() or not 1 <= len(boundary) <= 70:  # RFC 2046 §5.1.1
        raise _malformed("its content type has no boundary of 1 to 70 characters")
    return str(boundary)


async def file_in_form(body: AsyncIterable[bytes], boundary: str) -> AsyncIterator[bytes]:
    """The bytes of the field `file`. The name that the client gives it is not looked at.

    Raises `RecordingRefused` for a form that is broken, or has any other field.
    """
    files = 0
    try:
        parser = PushMultipartParser(boundary)
        async for chunk in body:
            for event in parser.parse(chunk) if chunk else ():
                if isinstance(event, MultipartSegment):
                    files += 1
                    _check(event.name, files)
                elif event:
                    yield bytes(event)
        parser.close()  # which finds out whether the form has ended
    except MultipartError as error:
        raise _malformed(str(error)) from None
    if not files:
        raise _malformed(f"it has no field {FIELD!r}")


def _check(name: str | None, files: int) -> None:
    if name != FIELD:
        raise _malformed(f"its only field must be {FIELD!r}")
    if files > 1:
        raise _malformed("it holds several files, and each recording needs a request of its own")


def _malformed(what: str) -> RecordingRefused:
    return RecordingRefused("malformed", f"the form cannot be used: {what}")
