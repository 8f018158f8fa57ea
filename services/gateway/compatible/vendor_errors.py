"""Errors in the words of a vendor's request, whose fields have other names than ours."""

from collections.abc import Mapping

from services.gateway.errors import ApiError


def with_names(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """An error about a field of `GenerateRequest`, about the vendor's field instead where `names` has one for it.

    For the exception handlers of vendors' routes; the route's own errors name the vendor's fields already.
    """
    theirs = names.get(error.field)
    if theirs is None:
        return error
    detail = error.detail
    if detail.startswith(f"{error.field}: "):
        detail = f"{theirs}{detail[len(error.field) :]}"
    return ApiError(error.status, error.kind, detail, field=theirs, headers=error.headers, members=error.members)
