"""What the service refuses, in words for an agent."""

from collections.abc import Iterator
from contextlib import contextmanager

from mcp.server.mcpserver.exceptions import ToolError

from heartmula_client.errors import ClientError


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the service refuses into an error whose words the agent reads."""
    try:
        yield
    except ClientError as error:
        raise ToolError(in_words(error)) from error


def in_words(error: ClientError) -> str:
    """An error in words that say which argument is meant and when to try again."""
    field = (error.field or "").removeprefix("continue_from.")
    text = error.detail
    if error.field and text.startswith(f"{error.field}: "):
        text = text.removeprefix(f"{error.field}: ")
    text = f"{field}: {text}" if field else text
    if error.title:
        text = f"{error.title}. {text}"
    if error.status == 401:
        return f"{text}. The key belongs into HEARTMULA_API_KEY of the server's environment."
    return f"{text}. Try again in {error.retry_after:g} s." if error.retry_after else text
