"""Writing of files that contain secrets."""

import os
from pathlib import Path


def write_private(path: Path, content: str | bytes) -> None:
    """Write a file atomically that only its owner can read."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    draft.replace(path)
