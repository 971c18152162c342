"""PyKMIP's server, as it is but for two limits of it: kmip_server.py CONFIGURATION LOG HOST [VERSION...]

It binds IPv4 addresses alone, and always speaks all versions of the protocol; here it takes IPv6 addresses too, and speaks
the versions that are named.
"""

import socket
import sys

from kmip.core.messages.contents import ProtocolVersion
from kmip.services.server import engine, server

configuration, log, host, *versions = sys.argv[1:]

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

sys.argv = ["pykmip-server", "-f", configuration, "-l", log]
server.main()
