"""How the processes of a run meet: all of them connect to process 0."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence

from fulllora_jax.core.console import Pace, say
from fulllora_jax.core.errors import Unavailable, UserError
from fulllora_jax.distributed import peers

_RETRY = 0.2  # seconds

# What meeting gives: the hosts' names, and a connection to each peer.
Meeting = tuple[list[str], dict[int, socket.socket]]


def split(coordinator: str) -> tuple[str, int]:
  """Splits host:port.

  Raises:
    UserError: it is none.

  >>> split('10.0.0.1:8476'), split('[::1]:8476')
  (('10.0.0.1', 8476), ('::1', 8476))
  """
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65535:
    raise UserError(
      f'--coordinator {coordinator!r}: write host:port of process 0, as in '
      '10.0.0.1:8476'
    )
  return host.strip('[]'), int(port)


def listen(port: int) -> socket.socket:
  """Opens a port; 0 chooses a free one.

  Raises:
    UserError: it is taken.
  """
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ('', port), family=socket.AF_INET6, dualstack_ipv6=True
      )
    return socket.create_server(('', port))
  except OSError as error:
    raise UserError(
      f'--coordinator: cannot listen on port {port}: '
      f'{os.strerror(error.errno)}; another '
      'run may be on this host, give another port'
    ) from None


def describe(server: socket.socket) -> str:
  """Returns where others can reach a server, as text for `described`."""
  addresses = [socket.gethostname()]
  with contextlib.suppress(OSError), _datagram() as probe:
    probe.connect(('10.255.255.255', 1))  # sends nothing, chooses a route
    addresses.append(probe.getsockname()[0])
  return json.dumps([addresses, server.getsockname()[1]])


def described(text: str) -> tuple[list[str], int]:
  """Returns the addresses and the port that `describe` wrote."""
  addresses, port = json.loads(text)
  return addresses, port


def _datagram() -> socket.socket:
  return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def gather(server: socket.socket, count: int, wait: float) -> Meeting:
  """Process 0: waits for the others to connect.

  Args:
    server: that listens.
    count: of processes, this one included.
    wait: seconds for all of them.

  Raises:
    Unavailable: some did not come.
    UserError: some do not belong together.
  """
  connections: dict[int, socket.socket] = {}
  try:
    names = _await_others(server, count, wait, connections)
  except UserError as error:
    for connection in connections.values():
      with contextlib.suppress(OSError):
        again = isinstance(error, Unavailable)
        peers.send(connection, 'refused', [str(error), again])
    raise
  for connection in connections.values():
    peers.send(connection, 'names', names)
  return names, connections


def _await_others(
  server: socket.socket,
  count: int,
  wait: float,
  connections: dict[int, socket.socket],
) -> list[str]:
  """Fills `connections`; returns all names, by process."""
  names = {0: socket.gethostname()}
  deadline, pace = time.monotonic() + wait, Pace()
  while len(names) < count:
    left = deadline - time.monotonic()
    missing = sorted(set(range(count)) - names.keys())
    if left <= 0:
      raise Unavailable(
        f'--num_processes {count}: after {wait:g} s there is no process '
        f'{", ".join(map(str, missing))}; start all of them, and let them '
        f'reach port {server.getsockname()[1]} of this host'
      )
    if pace.due():
      say(f'waiting for process {", ".join(map(str, missing))}')
    server.settimeout(min(left, 1.0))
    with contextlib.suppress(TimeoutError):
      connection, _ = server.accept()
      greeted = _greeted(connection)
      if greeted is not None:
        index, its_count, name = greeted
        # A number that is taken gets its refusal too.
        connections[index if index not in connections else -1] = connection
        _check(index, its_count, name, count, names)
        names[index] = name
  return [names[index] for index in range(count)]


def _greeted(connection: socket.socket) -> tuple[int, int, str] | None:
  """Returns who connected; None for a stranger."""
  connection.settimeout(5.0)
  try:
    kind, (index, count, name) = peers.receive(connection)
    if kind == 'hello':
      return int(index), int(count), str(name)
  except (OSError, EOFError, TypeError, ValueError):
    pass
  connection.close()
  return None


def _check(index: int, its_count: int, name: str, count: int, names) -> None:
  if its_count != count:
    raise UserError(
      f'--num_processes: {its_count} on {name}, {count} on {names[0]}; start '
      'all with the same'
    )
  if not 0 <= index < count:
    raise UserError(
      f'--process_id {index} on {name}: of {count} processes the ids are '
      f'0..{count - 1}'
    )
  if index in names:
    raise UserError(
      f'--process_id {index} is taken by {names[index]}, {name} has it too; '
      f'give each process its own, 0..{count - 1}'
    )


def join(
  addresses: Sequence[str], port: int, count: int, index: int, wait: float
) -> Meeting:
  """The others: connects to process 0.

  Args:
    addresses: where it may be.
    port: it listens on.
    count: of processes.
    index: of this one.
    wait: seconds for it and for all the others to come.

  Raises:
    Unavailable: it cannot be reached.
    UserError: it refuses.
  """
  name, started = socket.gethostname(), time.monotonic()
  connection = _connect(addresses, port, wait)
  connection.settimeout(wait + 5.0)
  try:
    peers.send(connection, 'hello', [index, count, name])
    kind, answer = peers.receive(connection)
  except (OSError, EOFError, ValueError):
    waited = time.monotonic() - started
    raise Unavailable(
      f'--coordinator: process 0 at {addresses[0]} went away after '
      f'{waited:.0f} s without a word; its own output says why'
    ) from None
  if kind == 'refused':
    line, again = answer
    raise (Unavailable if again else UserError)(line)
  return answer, {0: connection}


def _connect(addresses: Sequence[str], port: int, wait: float) -> socket.socket:
  deadline, pace = time.monotonic() + wait, Pace()
  while True:
    for address in addresses:
      try:
        return socket.create_connection((address, port), timeout=5.0)
      except OSError as error:
        reason = error.strerror or str(error)
    if time.monotonic() > deadline:
      raise Unavailable(
        f'--coordinator: no process 0 at {addresses[0]} port {port} after '
        f'{wait:g} s: {reason}; start it, and let this host reach that port'
      )
    if pace.due():
      say(f'waiting for process 0 at {addresses[0]} port {port}: {reason}')
    time.sleep(_RETRY)
