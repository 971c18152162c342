"""What the operator of a key server does to a key, by PyKMIP's client: kmip_operator.py HOST PORT CERTIFICATES VERB [ARGUMENT]

Of CERTIFICATES, the directory, it is "client".
"""

import sys

from kmip.core import enums
from kmip.pie.client import ProxyKmipClient
from kmip.pie.objects import SymmetricKey

host, port, certificates, verb, *arguments = sys.argv[1:]
client = ProxyKmipClient(
    hostname=host,
    port=int(port),
    cert=f"{certificates}/client.pem",
    key=f"{certificates}/client.key",
    ca=f"{certificates}/ca.pem",
    config="none",
    kmip_version=enums.KMIPVersion.KMIP_1_4,
)
with client:
    if verb == "deactivate":
        client.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, arguments[0])
    elif verb == "compromise":
        client.revoke(enums.RevocationReasonCode.KEY_COMPROMISE, arguments[0])
    elif verb == "destroy":
        client.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, arguments[0])
        client.destroy(arguments[0])
    elif verb == "create":
        # Not activated.
        print(client.create(enums.CryptographicAlgorithm.AES, 256))
    elif verb == "register":
        # A key of half the length, active.
        masks = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
        uid = client.register(SymmetricKey(enums.CryptographicAlgorithm.AES, 128, bytes(16), masks))
        client.activate(uid)
        print(uid)
    elif verb == "register-wrapping":
        # A key that others are given out under, active.
        masks = [enums.CryptographicUsageMask.WRAP_KEY, enums.CryptographicUsageMask.UNWRAP_KEY]
        with open(arguments[0], "rb") as file:
            uid = client.register(SymmetricKey(enums.CryptographicAlgorithm.AES, 256, file.read(), masks))
        client.activate(uid)
        print(uid)
    elif verb == "attributes":
        for attribute in client.get_attributes(arguments[0])[1]:
            print(attribute.attribute_name.value, attribute.attribute_value, sep="=")
    elif verb == "locate":
        print(*client.locate(), sep="\n")
    else:
        sys.exit(f"{verb}: no such verb")
