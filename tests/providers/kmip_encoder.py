"""What tells a key's use, as PyKMIP's encoder has it: kmip_encoder.py VERSION KEY CONTENT

It prints the payload in hexadecimal: for KMIP 1.4 that of x-Identifier, for 2.0 that of Application Specific Information.
PyKMIP has no Add Attribute, but Modify Attribute of 1.4 and Set Attribute of 2.0 have a payload of the same form.
"""

import sys

from kmip.core import enums, objects, utils
from kmip.core.attributes import ApplicationSpecificInformation, CustomAttribute
from kmip.core.messages import payloads

version, key, content = sys.argv[1:]
if version == "1.4":
    payload = payloads.ModifyAttributeRequestPayload(
        unique_identifier=key,
        attribute=objects.Attribute(
            attribute_name=objects.Attribute.AttributeName("x-Identifier"),
            attribute_value=CustomAttribute(content),
        ),
    )
else:
    information = ApplicationSpecificInformation(application_namespace="sealblk", application_data=content)
    payload = payloads.SetAttributeRequestPayload(
        unique_identifier=key, new_attribute=objects.NewAttribute(attribute=information)
    )
stream = utils.BytearrayStream()
payload.write(stream, kmip_version=enums.KMIPVersion["KMIP_" + version.replace(".", "_")])
print(stream.buffer.hex())
