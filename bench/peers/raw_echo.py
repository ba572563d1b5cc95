"""The floor: a DEALER that sends back what it got, with nothing around it. `raw_echo.py URL`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Self

import zmq


class RawEcho:
    """A ROUTER here and the DEALER there. Messages are [id, body] after the identity."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vb-")
        url = f"ipc://{self._folder.name}/raw.sock"
        self._context = zmq.Context()
        self.router = self._context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.setsockopt(zmq.RCVTIMEO, 20_000)
        self.router.bind(url)
        self._process = subprocess.Popen([sys.executable, __file__, url])
        self.identity = self.router.recv_multipart()[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.router.send_multipart([self.identity, b""])
        self._process.wait(20.0)
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def asks(self, count: int, body: bytes) -> None:
        """One at a time."""
        router, identity = self.router, self.identity
        for number in range(count):
            router.send_multipart([identity, b"%d" % number, body])
            router.recv_multipart()

    def pipelined(self, count: int, body: bytes, window: int) -> None:
        """Up to `window` at once."""
        router, identity = self.router, self.identity
        sent = received = 0
        while received < count:
            while sent < count and sent - received < window:
                router.send_multipart([identity, b"%d" % sent, body])
                sent += 1
            router.recv_multipart()
            received += 1


def main() -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(sys.argv[1])
    dealer.send_multipart([b"here"])
    while True:
        frames = dealer.recv_multipart()
        if len(frames) == 1:
            break
        dealer.send_multipart(frames)
    context.destroy(linger=0)


if __name__ == "__main__":
    main()
