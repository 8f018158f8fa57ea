"""The ids of recordings."""

import uuid

_NAMESPACE = uuid.UUID("5c0f8a55-6c39-4b8e-9d35-0f5d3a1f7d52")


def recording_id(tenant: str, sha256: str) -> str:
    """The id of a tenant's recording, given the SHA-256 of the upload: the same file is the same recording."""
    return str(uuid.uuid5(_NAMESPACE, f"{tenant}/{sha256}"))
