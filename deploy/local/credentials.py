"""Credentials of the embedded servers: random, made at the first start, kept in the data folder."""

import secrets
from pathlib import Path

import msgspec

from deploy.local.servers import write_private
from shared.errors import ConfigError


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What the local stack's own clients show to the embedded servers."""

    nats_user: str
    nats_password: str
    s3_access_key: str
    s3_secret_key: str


def load_credentials(data_dir: Path) -> Credentials:
    """Read ``credentials.json`` in the data folder, or make it, readable by its owner only."""
    path = data_dir / "credentials.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Credentials)
    except FileNotFoundError:
        made = Credentials(
            nats_user="heartmula",
            nats_password=secrets.token_hex(24),
            s3_access_key=secrets.token_hex(10),
            s3_secret_key=secrets.token_hex(24),
        )
        write_private(path, msgspec.json.format(msgspec.json.encode(made)).decode() + "\n")
        return made
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove it, and new credentials are made") from None
