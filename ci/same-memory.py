"""same-memory.py PROCESS PROCESS: fails unless the memory of two QEMU's guests, which do not run, is the same in each byte."""

import mmap
import os
import sys

PAGE = 4096
CHUNK = 1 << 20


def main(*processes):
    one, other = map(memory, processes)
    if len(one) != len(other):
        sys.exit(f"{len(one)} bytes and {len(other)} bytes")
    differ = [page for at in range(0, len(one), CHUNK) for page in different_pages(one, other, at)]
    if differ:
        sys.exit(f"{len(differ)} pages differ, as {', '.join(map(hex, differ[:8]))}")


def memory(process):
    """What QEMU has of `-object memory-backend-memfd`, mapped."""
    descriptors = f"/proc/{process}/fd"
    for name in os.listdir(descriptors):
        path = os.path.join(descriptors, name)
        if os.readlink(path).startswith("/memfd:memory-backend"):
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    sys.exit(f"process {process} has no memory of a guest")


def different_pages(one, other, at):
    if one[at : at + CHUNK] != other[at : at + CHUNK]:
        for page in range(at, min(at + CHUNK, len(one)), PAGE):
            if one[page : page + PAGE] != other[page : page + PAGE]:
                yield page // PAGE


main(*sys.argv[1:])
