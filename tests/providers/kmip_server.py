"""PyKMIP's server: kmip_server.py DIRECTORY DATABASE CERTIFICATE HOST PORT [VERSION...]

DIRECTORY is the server's own, for its configuration and "log"; servers that have DATABASE in common have the same keys.
CERTIFICATE is a path without its ending, as `certificates.py` makes them, with the authority "ca" beside it.

The server is as it is but for two limits of it. It binds IPv4 addresses alone, and always speaks all versions of the protocol;
here it takes IPv6 addresses too, and speaks the versions that are named.
"""

import os
import socket
import sys

from kmip.core.messages.contents import ProtocolVersion
from kmip.services.server import engine, server

directory, database, certificate, host, port, *versions = sys.argv[1:]

os.makedirs(f"{directory}/policies", exist_ok=True)
with open(f"{directory}/configuration", "w") as file:
    file.write(
        f"""[server]
hostname={host}
port={port}
certificate_path={certificate}.pem
key_path={certificate}.key
ca_path={os.path.dirname(certificate)}/ca.pem
auth_suite=TLS1.2
policy_path={directory}/policies
enable_tls_client_auth=True
database_path={database}
"""
    )

if ":" in host:
    socket.AF_INET = socket.AF_INET6

if versions:
    wanted = [ProtocolVersion(*map(int, version.split("."))) for version in versions]
    original = engine.KmipEngine.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._protocol_versions = [version for version in self._protocol_versions if version in wanted]
        assert self._protocol_versions

    engine.KmipEngine.__init__ = init

sys.argv = ["pykmip-server", "-f", f"{directory}/configuration", "-l", f"{directory}/log"]
server.main()
