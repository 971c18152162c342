"""Makes the certificates of the tests in a directory: certificates.py DIRECTORY

An authority, "ca", with a server's certificate for 127.0.0.1, ::1 and localhost and those of two hosts, "client" and "other";
"expired-server" and "expired-client"; "future-server" and "future-client", which are not valid yet, as under a clock that is late;
"lasting-ca" and "lasting-client", for a year; and a second authority, "stranger", with "stranger-server" and
"stranger-client". Each is NAME.pem with NAME.key. ECDSA, since PyKMIP offers suites with forward secrecy for no other key.
"""

import datetime
import ipaddress
import os
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


def write(name, certificate, key):
    with open(name + ".pem", "wb") as file:
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
    with open(os.open(name + ".key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )


def make(name, issuer=None, server=False, days=(-1, 1)):
    """A certificate that is valid from days[0] to days[1] from now; without an issuer, an authority's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_certificate, issuer_key = issuer or (None, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + days[0] * DAY)
        .not_valid_after(NOW + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if server:
        names = [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ("127.0.0.1", "::1")]
        names.append(x509.DNSName("localhost"))
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    write(name, certificate, key)
    return certificate, key


os.chdir(sys.argv[1])
ca = make("ca")
make("server", ca, server=True)
make("client", ca)
make("other", ca)
make("expired-server", ca, server=True, days=(-3, -2))
make("expired-client", ca, days=(-3, -2))
make("future-server", ca, server=True, days=(2, 3))
make("future-client", ca, days=(2, 3))
lasting = make("lasting-ca", days=(-1, 365))
make("lasting-client", lasting, days=(-1, 365))
stranger = make("stranger")
make("stranger-server", stranger, server=True)
make("stranger-client", stranger)
