"""A certificate authority for tests, and servers that speak TLS with its certificates."""

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from deploy.local.process import Process
from deploy.local.servers.embedded import NatsServer, S3Server

_SIGNING = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
_NATS_FOLDER = Path(__file__).parents[2] / "deploy" / "nats"


class Authority:
    """A certificate authority: `file` is what its users trust, `cert` and `key` are those of a server on 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.file, self.cert, self.key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
        signer, name = ec.generate_private_key(ec.SECP256R1()), _name("an authority of a test's own")
        authority = _certificate_builder(name, name, signer).add_extension(x509.BasicConstraints(True, None), True)
        authority = authority.add_extension(_SIGNING, True)
        key = ec.generate_private_key(ec.SECP256R1())
        addresses = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        server = _certificate_builder(_name("a server"), name, key).add_extension(addresses, False)
        # Python 3.13 trusts no certificate that does not say which key signed it.
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        server = server.add_extension(identifier, False)
        self.file.write_bytes(authority.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM))
        self.cert.write_bytes(server.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM))
        self.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate_builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


class TlsNatsServer(NatsServer):
    """The project's NATS configuration with a ``tls`` block, as docs/operations.md says."""

    def __init__(self, data_dir: Path, port: int, passwords: dict[str, str], authority: Authority) -> None:
        self._authority = authority
        super().__init__(data_dir, port, passwords)  # type: ignore[arg-type]

    def _process(self) -> Process:
        process = super()._process()
        config = self.data_dir / "nats.conf"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        text = (_NATS_FOLDER / "nats.conf").read_text()
        roles = os.path.relpath(_NATS_FOLDER / "roles.conf", self.data_dir)
        text = text.replace('include "roles.conf"', f'include "{roles}"')
        config.write_text(f"{text}\ntls {{ cert_file: '{self._authority.cert}', key_file: '{self._authority.key}' }}\n")
        process._command[process._command.index("-c") + 1] = str(config)
        return process

    def url_of(self, role: str) -> str:
        return super().url_of(role).replace("nats://", "tls://")  # type: ignore[arg-type]


class TlsS3Server(S3Server):
    """SeaweedFS whose S3 speaks HTTPS."""

    def __init__(self, data_dir: Path, port: int, authority: Authority) -> None:
        self._authority = authority
        super().__init__(data_dir, port, "tester", "secretsecret")

    @property
    def url(self) -> str:
        return super().url.replace("http://", "https://")

    def _process(self) -> Process:
        process = super()._process()
        process._command += [f"-s3.cert.file={self._authority.cert}", f"-s3.key.file={self._authority.key}"]
        return process
