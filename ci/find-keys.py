"""find-keys.py DISK RECOVERY STATE CONTROL FILE...: looks in each FILE for the keys of DISK, whose provider is the native one in STATE
and whose recovery key is RECOVERY: the volume key, as cryptsetup shows it, the provider's primary key, the KEK, and the slot
secret. Fails if it finds one, in any form below; or if it does not find the bytes of CONTROL, given in hexadecimal, which are known
to be there."""

import base64
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import uuid

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def main(disk, recovery, state, control, *files):
    keys = secrets(disk, recovery, state)
    failed = False
    for file in files:
        with open(file, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            found = [name for name, key in keys.items() if any(content.find(form) >= 0 for form in forms(key))]
            if found:
                print(f"{file.name}: found {', '.join(found)}")
            is_searched = content.find(bytes.fromhex(control)) >= 0
            if not is_searched:
                print(f"{file.name}: the bytes that must be there are not found")
            failed |= bool(found) or not is_searched
            print(f"{file.name}: searched {len(content)} bytes for {len(keys)} keys")
    sys.exit(failed)


def secrets(disk, recovery, state):
    with tempfile.TemporaryDirectory() as directory:
        dumped = os.path.join(directory, "key")
        dump = ["cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", dumped]
        subprocess.run([*dump, "--key-file", recovery, disk], check=True, capture_output=True)
        with open(dumped, "rb") as file:
            volume_key = file.read()
    shown = subprocess.run(["cryptsetup", "luksDump", "--dump-json-metadata", disk], check=True, capture_output=True)
    (token,) = json.loads(shown.stdout)["tokens"].values()
    volume = subprocess.run(["cryptsetup", "luksUUID", disk], check=True, capture_output=True, text=True).stdout.strip()
    with open(os.path.join(state, "providers/native/primary.key"), "rb") as file:
        primary = file.read()[16:48]
    key_id = token["key_id"].encode()
    kek = HKDF(SHA256(), 32, None, b"sealblk native KEK\0" + key_id).derive(primary)
    # src/providers/wrap.rs. With another KEK this fails.
    provider = token["provider"].encode()
    wrapped = base64.b64decode(token["wrapped_slot_secret"])
    bound_to = b"sealblk wrapped slot secret\0" + uuid.UUID(volume).bytes + struct.pack(">I", int(token["keyslots"][0]))
    bound_to += b"".join(struct.pack(">I", len(name)) + name for name in (provider, key_id))
    slot_secret = AESGCM(kek).decrypt(wrapped[1:13], wrapped[13:], bound_to)
    return {"the volume key": volume_key, "the primary key": primary, "the KEK": kek, "the slot secret": slot_secret}


def forms(key):
    """Each 16 bytes of a key, each half of it in hexadecimal, and its begin in base64, whatever is before it."""
    yield from (key[at : at + 16] for at in range(0, len(key), 16))
    yield from (key[at : at + 16].hex().encode() for at in range(0, len(key), 32))
    yield from (base64.b64encode(key[skipped : skipped + 15]) for skipped in range(3))


main(*sys.argv[1:])
