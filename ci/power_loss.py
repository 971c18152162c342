"""Makes disks as a power cut could have left them, and judges each: see ci/boot/power-loss.

A disk may have, after a power cut: all that was written before a flush that has begun; and of what was written since then any part, in
any order, since storage has a cache. What was written is in a record of QEMU's block driver blklogwrites, in the kernel's format (Linux'
Documentation/admin-guide/device-mapper/log-writes.rst). The judges are cryptsetup for headers, python3-cryptography for the ciphertext,
e2fsck and debugfs for what is in it; sealblk has to open each header as well.
"""

import hashlib
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SECTOR = 512
PAYLOAD = 16 << 20  # where the payload of a volume starts that sealblk made
BLOCK = 4096  # of the guest
MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD = 1, 2, 4
WINDOW = 16  # how many files the guest keeps, and how many blocks that it writes durably


def main():
    before, record, recovery, file_system, unit, cuts, sealblk, state, work = sys.argv[1:]
    with open(before, "rb") as file:
        before = file.read()
    key = Key(volume_key(before, recovery), int(unit))
    entries = [Entry(key, *entry) for entry in read(record)]
    seed = int(os.environ.get("SEED") or random.randrange(1 << 32))
    print(f"  SEED={seed}", flush=True)
    random.seed(seed)
    judge = Judge(key, recovery, int(file_system), sealblk, state, work)
    flushes = [at for at, entry in enumerate(entries) if entry.is_flush()]
    # The header is written seldom: a fifth of the cuts is there.
    of_header = [at for at, entry in enumerate(entries) if entry.data and entry.offset < PAYLOAD]
    assert of_header, "no header was changed"
    anywhere = int(cuts) * 4 // 5
    chosen = sorted(random.choices(range(len(entries)), k=anywhere) + random.choices(of_header, k=int(cuts) - anywhere))
    disk, applied = Disk(key, before), 0
    for cut in chosen:
        # All before the last flush that had begun.
        flush = max((at for at in flushes if at < cut), default=0)
        for entry in entries[applied:flush]:
            disk.apply(entry)
        applied = max(applied, flush)
        late = entries[applied : cut + 1]
        # Each fourth time storage has kept the order, and has lost nothing but the end.
        if random.randrange(4):
            late = random.sample(late, random.randint(0, len(late)))
        left = disk.copy()
        for entry in late:
            left.apply(entry)
        judge.judge(left, f"cut at entry {cut} of {len(entries)}, with {len(late)} entries since the flush at {flush}")
    for entry in entries[applied:]:
        disk.apply(entry)
    judge.judge(disk, "at the end")
    of_kind = [sum(map(kind, entries)) for kind in (Entry.is_flush, Entry.is_durable, Entry.is_discard)]
    print(
        f"  {len(entries)} entries, of these {of_kind[0]} flushes, {of_kind[1]} durable writes, {of_kind[2]} discards; "
        f"{len(chosen)} cuts: {judge.recovered} file systems recovered, with up to {judge.most} flushed files, "
        f"{len(judge.headers)} headers opened, of {len(set(judge.headers.values()))} sizes"
    )
    assert of_kind[0] and of_kind[2], "nothing was flushed, or nothing discarded"
    assert judge.recovered > len(chosen) // 2, "most cuts came before there was a file system"
    assert len(set(judge.headers.values())) > 1, "the disk did not grow"


def read(path):
    """The record's entries: offset, length, flags, data."""
    with open(path, "rb") as record:
        magic, version, count, size = struct.unpack("<QQQI", record.read(28))
        assert (magic, version, size) == (MAGIC, 1, SECTOR), "not a record"
        entries, at = [], size
        for _ in range(count):
            record.seek(at)
            sector, sectors, flags, _ = struct.unpack("<QQQQ", record.read(32))
            at += size
            data = b""
            if not flags & DISCARD and sectors:
                record.seek(at)
                data = record.read(sectors * size)
                assert len(data) == sectors * size
                at += len(data)
            entries.append((sector * size, len(data) or sectors * size, flags, data))
        return entries


class Key:
    """Decrypts the payload, whose encryption sectors have `unit` bytes."""

    def __init__(self, key, unit):
        self.key, self.unit = key, unit

    def decrypts(self, offset, data):
        """The plaintext of `data`, which lie at `offset` in the payload."""
        sectors = []
        for at in range(0, len(data), self.unit):
            # The tweak is the number of the sector of 512 bytes.
            tweak = ((offset + at) // SECTOR).to_bytes(16, "little")
            decryptor = Cipher(algorithms.AES(self.key), modes.XTS(tweak)).decryptor()
            sectors.append(decryptor.update(data[at : at + self.unit]))
        return b"".join(sectors)


class Entry:
    """What was written at once."""

    def __init__(self, key, offset, length, flags, data):
        self.offset, self.flags = offset, flags
        self.data = bytes(length) if flags & DISCARD else data
        self.plain = b""
        if offset >= PAYLOAD:
            assert offset % key.unit == 0 and length % key.unit == 0, "a part of an encryption sector was written"
            self.plain = key.decrypts(offset - PAYLOAD, self.data)

    def is_flush(self):
        return bool(self.flags & FLUSH)

    def is_durable(self):
        return bool(self.flags & FUA)

    def is_discard(self):
        return bool(self.flags & DISCARD)


class Disk:
    """A disk: all of it, and the plaintext of its payload."""

    def __init__(self, key, data, plain=None):
        self.data = bytearray(data)
        self.plain = bytearray(plain or key.decrypts(0, data[PAYLOAD:]))

    def copy(self):
        return Disk(None, self.data, self.plain)

    def apply(self, entry):
        assert entry.offset + len(entry.data) <= len(self.data), "written behind the end"
        self.data[entry.offset : entry.offset + len(entry.data)] = entry.data
        if entry.plain:
            offset = entry.offset - PAYLOAD
            self.plain[offset : offset + len(entry.plain)] = entry.plain


def run(*command, **more):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, **more)


def volume_key(volume, recovery):
    """The volume key, by cryptsetup; the recovery key opens the volume in each state."""
    with tempfile.TemporaryDirectory() as scratch:
        disk, key = f"{scratch}/disk", f"{scratch}/key"
        with open(disk, "wb") as file:
            file.write(volume)
        said = run("cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", key, "--key-file", recovery, disk)
        assert said.returncode == 0, said.stdout
        with open(key, "rb") as file:
            return file.read()


class Judge:
    def __init__(self, key, recovery, file_system, sealblk, state, work):
        self.key, self.recovery, self.file_system, self.sealblk, self.state = key, recovery, file_system, sealblk, state
        self.scratch = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else work)
        self.work = work
        self.headers = {}  # the size of the disk by each header's digest
        self.recovered = 0
        self.most = 0

    def judge(self, disk, what):
        try:
            self.judge_content(disk.plain, self.judge_header(disk.data))
        except AssertionError as error:
            left = f"{self.work}/left.luks"
            with open(left, "wb") as file:
                file.write(disk.data)
            sys.exit(f"{what}: {error}; see {left}")

    def judge_header(self, disk):
        """How many sectors the header says that the disk has."""
        header = hashlib.sha256(disk[:PAYLOAD]).digest()
        if header in self.headers:
            return self.headers[header]
        path = f"{self.scratch.name}/disk"
        with open(path, "wb") as file:
            file.write(disk)
        said = run("cryptsetup", "luksDump", "--dump-json-metadata", path)
        assert said.returncode == 0, f"cryptsetup refuses the header: {said.stdout}"
        (segment,) = json.loads(said.stdout)["segments"].values()
        self.headers[header] = int(segment["size"]) // SECTOR
        # The recovery key takes seconds.
        if len(self.headers) % 4 == 0:
            assert volume_key(disk, self.recovery) == self.key.key, "cryptsetup finds another volume key"
        socket = f"{self.scratch.name}/socket"
        server = subprocess.Popen(
            [self.sealblk, "serve", "--blk-file", path, "--socket-path", socket, "--state-dir", self.state],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = ""
        for line in server.stdout:
            said += line
            if "serving disk" in line:
                break
        server.terminate()
        said += server.communicate(timeout=60)[0]
        assert server.returncode == 0 and "the disk is unlocked" in said, f"sealblk does not open it: {said}"
        return self.headers[header]

    def judge_content(self, plain, sectors):
        def behind(number):
            at = self.file_system + number * BLOCK
            return bytes(plain[at : at + BLOCK])

        found = re.fullmatch(rb"flushed (\d+), sectors (\d+)", behind(0).rstrip())
        if not found:
            return
        flushed, seen = int(found[1]), int(found[2])
        assert sectors >= seen, f"the disk has {sectors} sectors, and the guest has seen {seen}"
        # The oldest may be overwritten already.
        for number in range(max(1, flushed - WINDOW + 2), flushed + 1):
            wanted = (b"durable %d;" % number * BLOCK)[:BLOCK]
            assert behind(number % WINDOW + 1) == wanted, f"durable write {number} of {flushed} is gone"
        path = f"{self.scratch.name}/plain"
        with open(path, "wb") as file:
            file.write(plain[: self.file_system])
        said = run("e2fsck", "-p", path)
        assert said.returncode in (0, 1), f"the file system does not recover: {said.stdout}"
        said = run("e2fsck", "-f", "-n", path)
        assert said.returncode == 0, f"the file system is not clean: {said.stdout}"
        files = {number: f"{self.scratch.name}/file-{number}" for number in range(max(1, flushed - WINDOW + 1), flushed + 1)}
        said = run("debugfs", "-f", "-", path, input="".join(f"dump /file-{number} {got}\n" for number, got in files.items()))
        for number, got in files.items():
            wanted = (f"file {number}\n" * 200_000)[: number * 7919 % 200_000 + 1].encode()
            assert os.path.exists(got), f"file {number} of {flushed} is gone: {said.stdout}"
            with open(got, "rb") as file:
                assert file.read() == wanted, f"file {number} of {flushed} is not what the guest flushed"
            os.remove(got)
        self.recovered += 1
        self.most = max(self.most, flushed)


main()
