"""vhost-user-recorder.py PATH SERVER RECORD: stands between QEMU and the vhost-user server at SERVER, as a server at PATH, and
appends to RECORD all bytes that both send. Descriptors pass through. PATH is there while the server is, as it would be without
this program, and is not there while a front-end is connected. Runs until it is killed."""

import os
import select
import socket
import struct
import sys
import threading
import time

MOST_DESCRIPTORS = 16
HEADER = struct.Struct("=III")  # request, flags, bytes of the payload


def main(path, server, record):
    with open(record, "ab", buffering=0) as record:
        while True:
            with connected(server) as back_end:
                front_end = accepted(path, back_end)
                if front_end:
                    with front_end:
                        relay(front_end, back_end, record)


def connected(server):
    """A connection to the server, once it is there."""
    while True:
        back_end = socket.socket(socket.AF_UNIX)
        try:
            back_end.connect(server)
            return back_end
        except (FileNotFoundError, ConnectionRefusedError):
            back_end.close()
            time.sleep(0.01)


def accepted(path, back_end):
    """The next front-end, unless the back-end ends before that."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        ready, _, _ = select.select([listener, back_end], [], [])
        os.unlink(path)
        return listener.accept()[0] if listener in ready else None


def relay(front_end, back_end, record):
    """Passes on what both send, until one of them leaves."""
    answers = threading.Thread(target=copy, args=(back_end, front_end, record))
    answers.start()
    copy(front_end, back_end, record)
    answers.join()


def copy(source, sink, record):
    try:
        while message := received(source):
            data, descriptors = message
            record.write(data)
            sent = socket.send_fds(sink, [data], descriptors)
            sink.sendall(data[sent:])
            for descriptor in descriptors:
                os.close(descriptor)
    except (BrokenPipeError, ConnectionResetError):
        pass
    for end in source, sink:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def received(source):
    """One message with its descriptors, which are sent with its first byte; none at the end."""
    data, descriptors, _, _ = socket.recv_fds(source, HEADER.size, MOST_DESCRIPTORS)
    while data:
        missing = HEADER.size - len(data)
        if missing <= 0:
            _request, _flags, payload = HEADER.unpack_from(data)
            missing += payload
        if missing == 0:
            return data, descriptors
        more = source.recv(missing)
        if not more:
            break
        data += more
    return None


main(*sys.argv[1:])
