"""Servers whose certificates are wrong in one way each, and files of keys that are: servers.py DIRECTORY

DIRECTORY has what certificates.py makes. Each certificate is NAME.pem with NAME.key, as there. For each server a line is printed,
NAME PORT, and then one that is empty; they answer until standard input ends.
"""

import os
import socket
import ssl
import sys
import threading
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NOW = datetime.now(timezone.utc)
DAY = timedelta(days=1)
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
PKCS8, OLD = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL
OPENSSH = serialization.PrivateFormat.OpenSSH
CLEAR = serialization.NoEncryption()
SECRET = serialization.BestAvailableEncryption(b"passphrase")


def p256():
    return ec.generate_private_key(ec.SECP256R1())


def name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def make(subject, issuer=None, key=None, ca=False, names=("127.0.0.1",), usage=None, more=(), days=(-1, 1)):
    """A certificate and its key; an issuer is a pair of the same."""
    key = key or p256()
    issuer_name, issuer_key = (issuer[0].subject, issuer[1]) if issuer else (name(subject), key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + days[0] * DAY)
        .not_valid_after(NOW + days[1] * DAY)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        names = [x509.IPAddress(ip_address(n)) if n[0].isdigit() else x509.DNSName(n) for n in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    for extension in more:
        builder = builder.add_extension(extension, critical=True)
    algorithm = None if isinstance(issuer_key, ed448.Ed448PrivateKey) else hashes.SHA256()
    return builder.sign(issuer_key, algorithm), key


def element(der):
    """The first element of DER, and what is behind it."""
    length, at = der[1], 2
    if length & 0x80:
        at += length & 0x7F
        length = int.from_bytes(der[2:at], "big")
    return der[: at + length], der[at + length :]


def content(der):
    return der[2 + (der[1] & 0x7F if der[1] & 0x80 else 0) :]


def sequence(tag, parts):
    parts = b"".join(parts)
    size = len(parts).to_bytes((len(parts).bit_length() + 7) // 8, "big")
    return bytes([tag]) + (size if len(parts) < 128 else bytes([0x80 | len(size)]) + size) + parts


def version_1(certificate, issuer_key):
    """The same certificate as X.509 had them in 1988: no version, and no extensions."""
    parts, rest = [], content(certificate.tbs_certificate_bytes)
    while rest:
        part, rest = element(rest)
        parts.append(part)
    tbs = sequence(0x30, parts[1:-1])
    signature = issuer_key.sign(tbs, ec.ECDSA(hashes.SHA256()))
    return x509.load_der_x509_certificate(sequence(0x30, [tbs, parts[2], sequence(3, [b"\0", signature])]))


def save(file, data, private=True):
    with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600 if private else 0o644), "wb") as out:
        out.write(data)


def save_pair(file, pair, more=()):
    save(file + ".pem", b"".join(c.public_bytes(PEM) for c in (pair[0], *more)), private=False)
    save(file + ".key", pair[1].private_bytes(PEM, PKCS8, CLEAR))


def load(file):
    certificate = x509.load_pem_x509_certificate(open(file + ".pem", "rb").read())
    return certificate, serialization.load_pem_private_key(open(file + ".key", "rb").read(), None)


def answer(listener, context):
    while True:
        plain, _ = listener.accept()
        try:
            with context.wrap_socket(plain, server_side=True) as stream:
                stream.recv(1)
        except OSError:
            plain.close()


def serve(title, file, ask=ssl.CERT_NONE):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Weak keys too.
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.load_cert_chain(file + ".pem", file + ".key")
    if ask != ssl.CERT_NONE:
        context.load_verify_locations("ca.pem")
        context.verify_mode = ask
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=answer, args=(listener, context), daemon=True).start()
    print(title, listener.getsockname()[1])


os.chdir(sys.argv[1])
ca = load("ca")
between = make("between", ca, ca=True, names=())
same_name = make("ca", ca=True, names=())
curve = make("curve-ca", key=ec.generate_private_key(ec.SECP521R1()), ca=True, names=())
save_pair("curve-ca", curve)
unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.7"), b"\5\0")
plain, plain_key = make("version-1", ca)
servers = {
    "self-signed-ca": make("self-signed-ca", ca=True),
    "self-signed": make("self-signed"),
    "version-1": (version_1(plain, ca[1]), plain_key),
    "no-name": make("no-name", ca, names=()),
    "wrong-name": make("wrong-name", ca, names=("kms.example.com", "192.0.2.1")),
    "critical": make("critical", ca, more=[unknown]),
    "between-missing": make("between-missing", between),
    "same-name": make("same-name", same_name),
    "client-only": make("client-only", ca, usage=ExtendedKeyUsageOID.CLIENT_AUTH),
    "p521": make("p521", ca, key=ec.generate_private_key(ec.SECP521R1())),
    "ed448": make("ed448", ca, key=ed448.Ed448PrivateKey.generate()),
    "rsa-1024": make("rsa-1024", ca, key=rsa.generate_private_key(65537, 1024)),
    "p521-authority": make("p521-authority", curve),
}
for title, pair in servers.items():
    save_pair(title, pair)
    serve(title, title)
between_server = make("between-sent", between)
save_pair("between-sent", between_server, [between[0]])
serve("between-sent", "between-sent")
serve("expired", "expired-server")
serve("future", "future-server")
serve("stranger", "stranger-server")
serve("good", "server")
serve("mutual", "server", ssl.CERT_REQUIRED)

client = load("client")
key = client[1]
save("encrypted.key", key.private_bytes(PEM, PKCS8, SECRET))
save("encrypted-old.key", key.private_bytes(PEM, OLD, SECRET))
save("old.key", key.private_bytes(PEM, OLD, CLEAR))
save("der.key", key.private_bytes(DER, PKCS8, CLEAR))
save("openssh.key", key.private_bytes(PEM, OPENSSH, CLEAR))
save("p12.key", pkcs12.serialize_key_and_certificates(b"host", key, client[0], None, CLEAR))
save("public.key", key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
save("request.key", x509.CertificateSigningRequestBuilder().subject_name(name("x")).sign(key, hashes.SHA256()).public_bytes(PEM))
save("der.pem", client[0].public_bytes(DER), private=False)
save_pair("own-version-1", (version_1(client[0], ca[1]), key))
save_pair("own-p521", make("own-p521", ca, key=ec.generate_private_key(ec.SECP521R1())))
save_pair("own-rsa-1024", make("own-rsa-1024", ca, key=rsa.generate_private_key(65537, 1024)))
save_pair("own-dsa", make("own-dsa", ca, key=dsa.generate_private_key(2048)))
print(flush=True)
sys.stdin.read()
