"""A network of a contestant's own: nothing but a loopback, whose counters count that contestant alone.

This module's process makes it and sleeps; the contestant's processes enter it before anything else. Needs Linux, and
the right to (CAP_SYS_ADMIN); without, contestants share the machine's loopback. With `--megabits` its loopback carries so
many a second (a token bucket, by `tc`): of all processes together, as if they shared one medium.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess

from bench.wire import Channel

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
BURST, QUEUE = "128kb", "64mb"  # more than the loopback's largest packet; more than senders have under way


def _call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, however that ends."""
    _call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL))


def enter(pid: int) -> None:
    """This process moves to the network of process `pid`; only before it has threads or sockets of its own."""
    with open(f"/proc/{pid}/ns/net", "rb") as network:
        _call("setns", network.fileno(), CLONE_NEWNET)


def make() -> None:
    """A new network for this process, its loopback up."""
    _call("unshare", CLONE_NEWNET)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", IFF_UP)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


def narrow(megabits: float) -> None:
    """This process's loopback carries so many a second. Raises OSError where the kernel, or `tc`, cannot do it."""
    command = [
        "tc",
        "qdisc",
        "add",
        "dev",
        "lo",
        "root",
        "tbf",
        "rate",
        f"{megabits}mbit",
        "burst",
        BURST,
        "limit",
        QUEUE,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--megabits", type=float)
    arguments = parser.parse_args()
    channel = Channel(socket.socket(fileno=arguments.socket))
    try:
        make()
        if arguments.megabits is not None:
            narrow(arguments.megabits)
    except OSError as error:
        channel.send({"answer": "not available", "reason": f"no network of its own: {error}"})
    else:
        channel.send({"answer": "made"})
    channel.receive()


if __name__ == "__main__":
    main()
