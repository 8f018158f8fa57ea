"""Security of SeaweedFS's internal ports: certificates between its parts, and signatures for access to its volumes.

Its master, volume, filer, S3, admin and worker parts speak gRPC with each other over TCP, and any client could make S3
users and delete objects there, unless both sides have to present a certificate. The volume server reads and writes
objects over HTTP for any client that knows their ids, unless it requires a signature.
"""

import secrets
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.local.private_file import write_private

_PARTS = ("master", "volume", "filer", "s3", "admin", "worker", "client")


def write_security(folder: Path) -> None:
    """Write a new ``security.toml``, certificate and key into SeaweedFS's folder.

    They are made for each start: all parts run in one process, nothing outside it trusts the certificate, and no stored
    object depends on them. So none has to be renewed or kept.
    """
    certificate, key = _certificate()
    write_private(folder / "grpc.crt", certificate)
    write_private(folder / "grpc.key", key)
    lines = [f'[jwt.{name}]\nkey = "{secrets.token_hex(32)}"' for name in ("signing", "signing.read")]
    lines += ['[grpc]\nca = "grpc.crt"']
    lines += [f'[grpc.{part}]\ncert = "grpc.crt"\nkey = "grpc.key"' for part in _PARTS]
    write_private(folder / "security.toml", "\n".join(lines) + "\n")


def _certificate() -> tuple[bytes, bytes]:
    """Make a self-signed certificate and its private key, both in PEM.

    Both sides of each connection present it and accept no other. It is valid at any date.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "embedded object store")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(1970, 1, 1))
        .not_valid_after(datetime(9999, 12, 31, 23, 59, 59))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
