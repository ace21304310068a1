"""A proxy that stands between client and server and does what bad networks do, one fault for each request."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, Thread

PASS, DROP, LOSE_ANSWER, CUT_ANSWER, BUSY = "pass", "drop", "lose answer", "cut answer", "busy"


class FaultyProxy:
    """Listens on 127.0.0.1 and forwards to `port`. `faults` are used up request by request; then all pass."""

    def __init__(self, port: int) -> None:
        self.faults: list[str] = []
        self.requests: list[bytes] = []
        """Every request as it came, head and body."""
        self.answered = 0
        """Requests that the server has answered, whether or not the client learned of it."""
        self.answers: list[bytes] = []
        """Every answer of the server that was passed on whole."""
        self._port, self._lock = port, Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[Thread] = []
        self._open: list[socket.socket] = []
        self._accepting = Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for connection in self._open:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            self._threads.append(Thread(target=self._serve, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            while request := _message(client):
                with self._lock:
                    self.requests.append(request)
                    fault = self.faults.pop(0) if self.faults else PASS
                if fault == DROP:
                    return
                if fault == BUSY:
                    client.sendall(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
                    continue
                server.sendall(request)
                answer = _message(server)
                self.answered += 1
                if fault == LOSE_ANSWER:
                    return
                if fault == CUT_ANSWER:
                    client.sendall(answer[: len(answer) // 2])
                    return
                self.answers.append(answer)
                client.sendall(answer)


def _message(connection: socket.socket) -> bytes:
    """One HTTP message with a content-length; empty at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (chunk := connection.recv(65536)):
            return b""
        data += chunk
    head, _, _ = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    size = len(head) + 4 + int(fields.get(b"content-length", b"0"))
    while len(data) < size:
        if not (chunk := connection.recv(65536)):
            return b""
        data += chunk
    return data


@contextmanager
def faulty_proxy(port: int, *faults: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(port)
    proxy.faults += faults
    try:
        yield proxy
    finally:
        proxy.close()
