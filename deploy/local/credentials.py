"""Random credentials of the embedded servers, made at the first start and kept in the data folder."""

import base64
import secrets
from pathlib import Path

import msgspec

from deploy.local.private_file import write_private
from deploy.local.servers.nats import ROLES, Role
from shared.errors import ConfigError


def _random(length: int) -> str:
    """Declare a field whose default is `length` random bytes in hexadecimal."""
    return msgspec.field(default_factory=lambda: secrets.token_hex(length))


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """Passwords and keys for the embedded NATS and S3 servers, for reading finished songs, and for signing webhooks."""

    nats_operator_password: str = _random(24)  # users are named after their roles, see deploy/nats/roles.conf
    nats_bootstrap_password: str = _random(24)
    nats_gateway_password: str = _random(24)
    nats_tokenizer_password: str = _random(24)
    nats_codec_password: str = _random(24)
    nats_client_password: str = _random(24)
    s3_access_key: str = _random(10)
    s3_secret_key: str = _random(24)
    s3_reader_access_key: str = _random(10)  # may read and list finished songs, and nothing else
    s3_reader_secret_key: str = _random(24)
    webhook_secret: str = msgspec.field(
        default_factory=lambda: "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    )

    @property
    def nats_passwords(self) -> dict[Role, str]:
        """The password of each role."""
        return {role: getattr(self, f"nats_{role}_password") for role in ROLES}


def load_credentials(data_dir: Path) -> Credentials:
    """Read ``credentials.json`` in the data folder, and add what it lacks. Only its owner can read the file.

    Raises `ConfigError` where it cannot be read.
    """
    path = data_dir / "credentials.json"
    try:
        stored = path.read_bytes() if path.exists() else b"{}"
        credentials = msgspec.json.decode(stored, type=Credentials)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove it, and new credentials are made") from None
    text = msgspec.json.format(msgspec.json.encode(credentials)).decode() + "\n"
    if text.encode() != stored:
        write_private(path, text)
    return credentials
