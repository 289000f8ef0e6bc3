"""The processes of a run learn that one of them is gone by its connection to rank 0, which ends with it.

A kernel closes the connections of a process that dies, and notices within half a minute a machine that does, whatever
the process was doing; collectives alone would wait for half an hour (gloo) or for ever.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
from typing import Any

KEY = "tarflow_fast/lifeline"  # the store has "port token" under it
CONNECT_SECONDS = 30.0
GRACE_SECONDS = 20.0  # a process that has lost another has so long to end by itself
PART_SECONDS = 2.0  # a process has so long to hear that another one leaves
MOST_BYTES = 4096  # a message is no longer
BYE, LOST, HELLO = "bye", "lost ", "hello "
# These are (option, seconds or number): a silent machine is taken for dead after 10 + 4 · 5 s.
KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPALIVE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))


class _Peer:
    """A `_Peer` is a connection, the part of a message that has come, and the rank at the other end, once known."""

    def __init__(self, connection: socket.socket, rank: int | None):
        self.connection, self.rank, self.received = connection, rank, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: str) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(message.encode() + b"\n")

    def part(self) -> None:
        """Says goodbye, and waits until that was heard: a connection closed with something unread takes it back."""
        self.send(BYE)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(PART_SECONDS)
            while self.connection.recv(MOST_BYTES):
                pass
        self.connection.close()


class Lifeline:
    """A `Lifeline` holds the connections of this process, which a thread watches.

    store: the store of the run. rank, world: the number of this process, and how many there are. host: the machine of
    rank 0. After `fail`, or when another process is lost, whose `reason` then says
    why, this process has GRACE_SECONDS to call `close`; if it hangs meanwhile, say in a collective, the thread prints
    the reason and ends it with exit code 1.
    """

    def __init__(self, store: Any, rank: int, world: int, host: str):
        self.rank, self.reason = rank, ""
        self._lost, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._peers: list[_Peer] = []
        self._selector = selectors.DefaultSelector()
        self._wake, waker = socket.socketpair()
        self._selector.register(waker, selectors.EVENT_READ, None)
        self._server: socket.socket | None = None
        if rank == 0:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world)
            self._token = secrets.token_hex(16)
            self._selector.register(self._server, selectors.EVENT_READ, None)
            store.set(KEY, f"{self._server.getsockname()[1]} {self._token}")
        else:
            port, self._token = store.get(KEY).decode().split()
            connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
            connection.settimeout(None)
            self._add(_Peer(connection, 0)).send(f"{HELLO}{self._token} {rank}")
        self._waker = waker
        self._thread = threading.Thread(target=self._watch, name="tarflow-lifeline", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> str:
        """Returns the reason why the run cannot go on, if it comes within so many seconds, else an empty text."""
        self._lost.wait(seconds)
        return self.reason

    def fail(self, reason: str) -> None:
        """Tells the others that this process cannot go on."""
        self._lose(f"rank {self.rank} ended: {' '.join(reason.split())}"[: MOST_BYTES // 4])

    def close(self) -> None:
        """Closes the connections so that the other processes do not take it for a death."""
        self._closed.set()
        self._wake.close()
        self._thread.join()
        if self._server is not None:
            self._server.setblocking(False)
            with contextlib.suppress(OSError):  # accept fails when there are no more
                while True:
                    self._accept(self._server)
            self._server.close()
        for peer in self._peers:
            peer.part()
        self._waker.close()
        self._selector.close()

    def _add(self, peer: _Peer) -> _Peer:
        """Takes up a connection; one that is made after the run was lost hears of it at once."""
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        with self._lock:
            self._peers.append(peer)
            if self._lost.is_set():
                peer.send(LOST + self.reason)
        return peer

    def _accept(self, server: socket.socket) -> None:
        self._add(_Peer(server.accept()[0], None))

    def _drop(self, peer: _Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _lose(self, reason: str) -> None:
        """Records, once, why the run cannot go on, and passes it on: rank 0 to all, others to rank 0."""
        with self._lock:
            if self._lost.is_set():
                return
            self.reason = reason
            for peer in list(self._peers):
                peer.send(LOST + reason)
            self._lost.set()
        if threading.current_thread() is not self._thread:
            self._wake.send(b"x")  # the thread has to watch the time now

    def _watch(self) -> None:
        """Serves the connections until `close`, or ends the process when its grace after a loss is over."""
        end: float | None = None
        while True:
            if end is None and self._lost.is_set():
                end = time.monotonic() + GRACE_SECONDS
            ready = self._selector.select(None if end is None else max(0.0, end - time.monotonic()))
            for key, _ in ready:
                if key.fileobj is self._waker:
                    self._waker.recv(MOST_BYTES)
                    if self._closed.is_set():
                        return
                elif key.fileobj is self._server:
                    with contextlib.suppress(OSError):
                        self._accept(self._server)
                else:
                    self._receive(key.data)
            if end is not None and time.monotonic() >= end:
                os.write(2, f"Error: {self.reason}\n".encode(errors="replace"))
                os._exit(1)

    def _receive(self, peer: _Peer) -> None:
        try:
            part = peer.connection.recv(MOST_BYTES)
        except OSError as error:
            part = b""
            where = f" ({error.strerror})" if error.strerror else ""
        else:
            where = ""
        if not part:
            self._drop(peer)
            if peer.rank is not None:
                self._lose(f"rank {peer.rank} of this run is gone{where}")
            return
        peer.received += part
        *messages, peer.received = peer.received.split(b"\n")
        for message in messages:
            if peer in self._peers:
                self._understand(peer, message.decode(errors="replace"))
        if len(peer.received) > MOST_BYTES and peer in self._peers:
            self._drop(peer)  # it is a stranger

    def _understand(self, peer: _Peer, message: str) -> None:
        if peer.rank is None:
            word, _, rank = message.removeprefix(HELLO).partition(" ")
            if secrets.compare_digest(word.encode(), self._token.encode()) and rank.isdecimal():
                peer.rank = int(rank)
            else:
                self._drop(peer)
        elif message == BYE:
            self._drop(peer)
        elif message.startswith(LOST):
            self._lose(message.removeprefix(LOST))
