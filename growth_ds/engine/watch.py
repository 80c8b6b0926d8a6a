"""Ranks that notice a dead one, whatever they wait for.

A collective over an open connection fails as soon as its peer dies. Other waits do not: a group that is being made
waits for the addresses of all its members until its timeout, half an hour by torch's default, and a host that loses its
power closes nothing. Launchers end the ranks that are left on their own machine; `srun` does not without `-K`.

So every rank holds one idle TCP connection to rank 0. The system closes it when the process dies, keepalive when the
host is gone. Who sees it says which rank on which host is gone (the words of a collective that fails name neither), and
then each of the others has `GRACE_S` to fail by itself, with its own words, before it is ended:

    rank k  ---- connection ---->  rank 0     "bye" before an end that all ranks know of
                                              closed without it: rank k is lost; rank 0 tells everybody else
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from types import TracebackType
from typing import Any

from growth_ds.engine import distributed
from growth_ds.engine.reports import exit_now
from growth_ds.errors import GrowthFailed

GRACE_S = 5.0
"""Seconds in which a rank that lost another may fail by itself: most do, in a collective, and say where."""
CONNECT_S = 30.0
"""Seconds for all ranks to connect."""
_SEE_S = 0.5
"""Seconds in which a rank that fails may still see that another one was first."""
_BYE, _LOST = b".", b"!"
_TOKEN = 16
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A host that is silent for 30 s is gone. Not every system has all three."""


class Watch:
    """A context in which the death of any rank ends all of them. Collective, after `init_distributed`.

    Leaving it says goodbye, unless by an exception that only this rank may have: the others are not to wait then. Where
    the ranks cannot connect it does nothing, and rank 0 says so.
    """

    def __init__(self) -> None:
        self._peers: dict[int, socket.socket] = {}
        self._hosts: list[str] = []  # of every rank
        self._over = threading.Event()
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if distributed.world_size() == 1:
            return self
        problem = self._connect()
        if distributed.agree(problem is not None):
            if distributed.rank() == 0:
                print(f"a dead rank is noticed by collectives alone: {problem or 'a rank cannot connect'}", flush=True)
            self._close()
            return self
        self._hosts = distributed.broadcast_object(distributed.gather_objects(socket.gethostname()))
        self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None or self._wake is None:
            return
        self._over.set()
        if error is None or isinstance(error, GrowthFailed) or getattr(error, "on_all_ranks", False):
            self._tell(_BYE)
        else:
            self._thread.join(_SEE_S)
        self._wake[1].send(_BYE)
        self._thread.join()
        self._close()

    def leaving(self) -> None:
        """This rank is on its way out by itself, and may take its time; the others are told when it leaves."""
        self._over.set()

    def _connect(self) -> str | None:
        """Fill `_peers`: rank 0 with all the others, those with rank 0. Returns what went wrong."""
        listener, place = None, None
        if distributed.rank() == 0:
            with contextlib.suppress(OSError):
                listener = socket.create_server(("127.0.0.1" if _is_local() else "", 0), backlog=4096)
                place = [listener.getsockname()[1], secrets.token_hex(_TOKEN)]
        place = distributed.broadcast_object(place)
        if place is None:
            return "rank 0 cannot listen"
        try:
            if listener is not None:
                self._accept(listener, bytes.fromhex(place[1]))
            else:
                peer = socket.create_connection((os.environ["MASTER_ADDR"], place[0]), timeout=CONNECT_S)
                peer.sendall(bytes.fromhex(place[1]) + distributed.rank().to_bytes(4, "big"))
                self._peers[0] = _lasting(peer)
        except OSError as error:
            return f"rank {distributed.rank()}: {error}"
        finally:
            if listener is not None:
                listener.close()
        return None

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        """Every other rank once. Strangers that know no token are hung up on."""
        listener.settimeout(CONNECT_S)
        while len(self._peers) < distributed.world_size() - 1:
            peer, _ = listener.accept()
            peer.settimeout(CONNECT_S)
            greeting = b""
            while len(greeting) < _TOKEN + 4 and (more := peer.recv(_TOKEN + 4 - len(greeting))):
                greeting += more
            if secrets.compare_digest(greeting[:_TOKEN], token) and len(greeting) == _TOKEN + 4:
                self._peers[int.from_bytes(greeting[_TOKEN:], "big")] = _lasting(peer)
            else:
                peer.close()

    def _listen(self) -> None:
        """The thread: sleep until a connection has something to say, or has ended."""
        assert self._wake is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake[0], selectors.EVENT_READ, None)
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    word = _hear(key.fileobj)
                    if word not in (_BYE, b""):
                        self._lost(int.from_bytes(word[1:], "big"), is_news=False)
                        return
                    selector.unregister(key.fileobj)
                    if word == b"":
                        self._tell(_LOST + int(key.data).to_bytes(4, "big"))
                        self._lost(int(key.data), is_news=True)
                        return

    def _tell(self, word: bytes) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # it may be the dead one
                peer.sendall(word)

    def _lost(self, rank: int, is_news: bool) -> None:
        """End this process, unless it comes to an end by itself. What is news is said at once, and in either case."""
        if is_news:
            self._say_gone(rank)
        if self._over.wait(GRACE_S):
            return
        if not is_news:
            self._say_gone(rank)
        exit_now(1)

    def _say_gone(self, rank: int) -> None:
        gone = f"rank {rank} on {self._hosts[rank]} is gone"
        line = f"[rank {distributed.rank()}] {gone}; the run goes on from its newest checkpoint when started"
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(line, file=sys.stderr, flush=True)

    def _close(self) -> None:
        for end in (*self._peers.values(), *(self._wake or ())):
            end.close()
        self._peers, self._wake, self._thread = {}, None, None


def _is_local() -> bool:
    return os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost")


def _hear(peer: Any) -> bytes:
    """What was said: `_BYE`, or `_LOST` with a rank, or nothing at the end of a connection."""
    try:
        word: bytes = peer.recv(1)
        return word + peer.recv(4, socket.MSG_WAITALL) if word == _LOST else word
    except OSError:
        return b""


def _lasting(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
