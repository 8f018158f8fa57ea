"""Credentials of the embedded servers: random, made at the first start, kept in the data folder."""

import base64
import secrets
from pathlib import Path

import msgspec

from deploy.local.private_file import write_private
from deploy.local.servers.nats import ROLES, Role
from shared.errors import ConfigError


def _word(length: int) -> str:
    return msgspec.field(default_factory=lambda: secrets.token_hex(length))


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What the local stack's own clients show to the embedded servers, what songs may be fetched with, and what signs
    webhooks."""

    nats_operator_password: str = _word(24)  # users are called like their roles: deploy/nats/roles.conf
    nats_bootstrap_password: str = _word(24)
    nats_gateway_password: str = _word(24)
    nats_tokenizer_password: str = _word(24)
    nats_codec_password: str = _word(24)
    nats_client_password: str = _word(24)
    s3_access_key: str = _word(10)
    s3_secret_key: str = _word(24)
    s3_reader_access_key: str = _word(10)  # may read and list finished songs, and nothing else
    s3_reader_secret_key: str = _word(24)
    webhook_secret: str = msgspec.field(
        default_factory=lambda: "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    )

    @property
    def nats_passwords(self) -> dict[Role, str]:
        """By role."""
        return {role: getattr(self, f"nats_{role}_password") for role in ROLES}


def load_credentials(data_dir: Path) -> Credentials:
    """Read ``credentials.json`` in the data folder, readable by its owner only; what it lacks is made and written."""
    path = data_dir / "credentials.json"
    try:
        known = path.read_bytes() if path.exists() else b"{}"
        found = msgspec.json.decode(known, type=Credentials)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove it, and new credentials are made") from None
    text = msgspec.json.format(msgspec.json.encode(found)).decode() + "\n"
    if text.encode() != known:
        write_private(path, text)
    return found
