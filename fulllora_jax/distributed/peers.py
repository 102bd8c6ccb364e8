"""What the processes of one run tell each other beside the devices.

Every process keeps a TCP connection to process 0. Over it they agree on small
JSON values, and notice when one of them is gone: a process that dies closes
its connection, a machine that dies falls silent. The others then print a line
that names it and exit, where JAX alone would wait in a collective operation
for minutes and abort without a name.
"""

import json
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fulllora_jax.core import console

# EX_TEMPFAIL of sysexits.h: nothing is wrong here, the same command goes on.
RESTART = 75

_BEATS = 4  # signs of life within the time after which silence is death
_GRACE = 3.0  # seconds in which a process that was told to stop may do so
_LARGEST = 2**24  # bytes of a message


class Peers:
  """One process among those of a run; made by `listen` or `join`.

  Attributes:
    index: of this process.
    names: of the hosts, by process.
  """

  def __init__(
    self,
    index: int,
    names: Sequence[str],
    sockets: dict[int, socket.socket],
    silence: float,
    end: Callable[[str, int], None] | None = None,
  ):
    """Starts to listen to the others.

    Args:
      index: of this process.
      names: of the hosts, by process.
      sockets: process 0: to each of the others; the others: to process 0.
      silence: seconds after which a process that says nothing is dead.
      end: called with a line and an exit status when another process is gone.
    """
    self.index, self.names = index, list(names)
    self._sockets, self._silence = sockets, silence
    self._end = end or _print_and_exit
    self._inbox = {peer: queue.Queue() for peer in sockets}
    self._sending = {peer: threading.Lock() for peer in sockets}
    self._gone: set[int] = set()
    self._leaving = threading.Event()
    for peer, connection in sockets.items():
      connection.settimeout(silence)
      _start(self._listen, peer, connection)
    _start(self._beat)

  def broadcast(self, value: Any = None) -> Any:
    """Returns process 0's value, a JSON value, on every process."""
    if self.index:
      return self._inbox[0].get()
    for peer in self._sockets:
      self._send(peer, 'value', value)
    return value

  def gather(self, value: Any) -> list[Any]:
    """Returns every process's JSON value, in order, on every process."""
    if self.index:
      self._send(0, 'value', value)
      return self.broadcast()
    values = [self._inbox[peer].get() for peer in sorted(self._sockets)]
    return self.broadcast([value, *values])

  def leave(self, status: int, line: str = '') -> None:
    """Says goodbye: this process ends with `status`, for the reason given."""
    self._leaving.set()
    for peer in self._sockets:
      self._send(peer, 'left', [status, line])

  def _listen(self, peer: int, connection: socket.socket) -> None:
    try:
      while True:
        kind, payload = receive(connection)
        if kind == 'value':
          self._inbox[peer].put(payload)
        elif kind == 'left':
          return self._left(peer, *payload)
        elif kind == 'fell':
          return self._fell(*payload)
    except TimeoutError:
      self._fell(peer, f'has been silent for {self._silence:g} s', RESTART)
    except (OSError, EOFError, ValueError):
      self._fell(peer, 'has died', RESTART)

  def _left(self, peer: int, status: int, line: str) -> None:
    """Another process ends by itself; with an error, so must this one."""
    self._gone.add(peer)
    if status in (0, RESTART):
      return
    time.sleep(_GRACE)  # it may be everyone's error
    self._fell(peer, f'has stopped: {line}' if line else 'has stopped', status)

  def _fell(self, peer: int, how: str, status: int) -> None:
    if self._leaving.is_set():
      return
    for other in set(self._sockets) - {peer}:
      self._send(other, 'fell', [peer, how, status])
    hint = '; the same command goes on' if status == RESTART else ''
    if not self.index:
      time.sleep(_GRACE / 3)  # JAX aborts the others once process 0 is gone
    self._end(
      f'process {peer} ({self.names[peer]}) {how}; this one, '
      f'{self.index} ({self.names[self.index]}), stops too{hint}',
      status,
    )

  def _beat(self) -> None:
    while not self._leaving.wait(self._silence / _BEATS):
      for peer in set(self._sockets) - self._gone:
        self._send(peer, 'beat', None)

  def _send(self, peer: int, kind: str, payload: Any) -> None:
    try:
      with self._sending[peer]:
        send(self._sockets[peer], kind, payload)
    except OSError:
      pass  # `_listen` notices


# The other processes of this one's run, if there are any; set by
# distributed.py.
joined: Peers | None = None


def fail(status: int, line: str = '') -> None:
  """Tells the others that this process ends with a status, and ends it.

  Returns where there are no others. JAX would wait for them at its exit.
  """
  if joined is not None:
    joined.leave(status, line)
    console.flush()
    os._exit(status)


def await_verdict() -> None:
  """Waits until it is known whether another process has died.

  Its death breaks whatever this one does together with it, as an error of any
  kind. The dead is named then, and this process ends; else this returns.
  """
  if joined is not None:
    time.sleep(_GRACE)


def send(connection: socket.socket, kind: str, payload: Any) -> None:
  """Sends a JSON value of one kind."""
  text = json.dumps([kind, payload]).encode()
  connection.sendall(struct.pack('!I', len(text)) + text)


def receive(connection: socket.socket) -> tuple[str, Any]:
  """Receives what `send` sent.

  Raises:
    TimeoutError: the connection's time is over.
    EOFError: it was closed.
    ValueError: what came is no message.
    OSError: it broke.
  """
  (size,) = struct.unpack('!I', _exactly(connection, 4))
  if size > _LARGEST:
    raise ValueError(f'a message of {size} bytes')
  kind, payload = json.loads(_exactly(connection, size))
  return kind, payload


def _exactly(connection: socket.socket, size: int) -> bytes:
  parts = bytearray()
  while len(parts) < size:
    part = connection.recv(size - len(parts))
    if not part:
      raise EOFError
    parts += part
  return bytes(parts)


def _start(function: Callable, *args: Any) -> None:
  threading.Thread(target=function, args=args, daemon=True).start()


def _print_and_exit(line: str, status: int) -> None:
  console.flush()
  os.write(2, f'{line}\n'.encode())  # whole, whoever else writes there
  os._exit(status)  # the main thread may wait for the dead for ever
