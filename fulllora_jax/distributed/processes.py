"""Many processes, one run: how they find each other, agree and end.

Every process runs the same command on its own host. Who they are comes from --coordinator,
--num_processes and --process_id; from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
(or JOB_COMPLETION_INDEX, which Kubernetes sets); or, under srun and on TPU slices, from JAX itself.
`jax.distributed` connects them: its coordination service, which runs in process 0, misses a process
that sends no heartbeats, and then ends all the others with SIGABRT and a line that names the lost
one. In one process every function here is trivial.
"""

import collections
import functools
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from fulllora_jax.core import console, ranges
from fulllora_jax.core.errors import RESTART, Unavailable, UserError, first_line

_ENVIRONMENT = {
  'coordinator': ('JAX_COORDINATOR_ADDRESS',),
  'num_processes': ('JAX_NUM_PROCESSES',),
  'process_id': ('JAX_PROCESS_ID', 'JOB_COMPLETION_INDEX'),
}
_GRACE = 5.0  # seconds in which processes that end for one reason all end
_LATE = 10.0  # seconds after a heartbeat's time, in which JAX ends a process

# Seconds after which a silent process is lost; JAX's own where it was started by somebody else.
_heartbeat = 100.0


def start(values: flags.FlagValues) -> None:
  """Joins the other processes, if there are any; before JAX is used.

  Raises:
    UserError: flags or environment that do not say who this is.
    Unavailable: JAX cannot find the others.
  """
  for name in ('start_timeout', 'peer_timeout'):
    ranges.check(f'--{name}', values[name].value, '(0, inf)')
  given = parameters(values, os.environ)
  if given:
    if not given['process_id']:
      _check_port(_port(given['coordinator_address']))
    given['cluster_detection_method'] = 'deactivate'
  elif _in_cluster(os.environ):
    given = {'local_device_ids': _slurm_devices(os.environ)}
  else:
    return
  _initialize(given, values.start_timeout, values.peer_timeout)
  introduce()
  if 'num_processes' in given:  # JAX goes by that of process 0
    check_same('command', {'--num_processes': given['num_processes']})


def parameters(values: flags.FlagValues, environment: Mapping[str, str]) -> dict[str, Any]:
  """Reads who this process is from flags or environment.

  Returns:
    Arguments of `jax.distributed.initialize`; none where nothing says that there are others.

  Raises:
    UserError: something is missing or makes no sense.
  """
  given: dict[str, Any] = {}
  for name, variables in _ENVIRONMENT.items():
    found = [environment[v] for v in variables if environment.get(v)]
    flag = values[name].value
    given[name] = flag if flag is not None else next(iter(found), None)
  # JOB_COMPLETION_INDEX alone is no sign of other processes.
  if values['process_id'].value is None and not (given['coordinator'] or given['num_processes']):
    return {}
  for name, value in given.items():
    if value is None:
      raise UserError(
        f'--{name}: missing; several processes need --coordinator, '
        '--num_processes and --process_id, or ' + ', '.join(v for v, *_ in _ENVIRONMENT.values())
      )
  count, index = _number(given, 'num_processes'), _number(given, 'process_id')
  if not 0 <= index < count:
    raise UserError(f'--process_id {index}: of {count} processes the ids are 0..{count - 1}')
  address = given['coordinator']
  _port(address)
  if count == 1:
    return {}
  return dict(coordinator_address=address, num_processes=count, process_id=index)


def _number(given: Mapping[str, Any], name: str) -> int:
  try:
    return int(given[name])
  except ValueError:
    raise UserError(f'--{name} {given[name]!r}: it must be a number') from None


def _port(coordinator: str) -> int:
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(
      f'--coordinator {coordinator!r}: write host:port of process 0, as in 10.0.0.1:8476'
    )
  return int(port)


def _check_port(port: int) -> None:
  """Refuses a port in use, which JAX would share with whoever has it."""
  try:
    socket.create_server(('', port)).close()
  except OSError as error:
    raise UserError(
      f'--coordinator: cannot listen on port {port}: {os.strerror(error.errno or 0)}; another run '
      'may be on this host, give another port'
    ) from None


def _in_cluster(environment: Mapping[str, str]) -> bool:
  """Whether JAX is to find the others: under srun, on TPUs, in a pod's job.

  Elsewhere its search may take long, warn, or mistake one process for many.
  """
  if int(environment.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
    return True
  platforms = environment.get('JAX_PLATFORMS', '')
  if importlib.util.find_spec('libtpu') and platforms in ('', 'tpu'):
    return True
  in_job = 'JOB_COMPLETION_INDEX' in environment
  return in_job and importlib.util.find_spec('kubernetes') is not None


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
  """Returns the GPUs of a task under srun: all that it sees, or one of them.

  Left to itself JAX takes one, even where a node has one task. Of several tasks
  that see the same GPUs each takes its own.

  Returns:
    Their numbers; an empty list means all; None leaves it to JAX.
  """
  if 'SLURM_LOCALID' not in environment:
    return None
  tasks = re.split(r'\D', environment.get('SLURM_STEP_TASKS_PER_NODE', '1'))
  visible = environment.get('CUDA_VISIBLE_DEVICES', '0,1')
  if int(tasks[0]) < 2 or len(visible.split(',')) < 2:
    return []
  return [int(environment['SLURM_LOCALID'])]


def _initialize(given: Mapping[str, Any], wait: float, silence: float) -> None:
  global _heartbeat
  _heartbeat = silence
  met = threading.Event()
  who = given.get('coordinator_address', 'the cluster')
  threading.Thread(target=_watch, args=(met, who, wait), daemon=True).start()
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=max(1, round(wait)),
      heartbeat_timeout_seconds=max(1, round(silence)),
    )
  except (RuntimeError, ValueError) as error:
    # So JAX says that it found no cluster: this process is alone.
    if not str(error).startswith('coordinator_address should be defined'):
      raise Unavailable(
        f'the other hosts: {first_line(error)}; say who this one is with '
        '--coordinator, --num_processes and --process_id'
      ) from None
  finally:
    met.set()


def _watch(met: threading.Event, who: str, wait: float) -> None:
  """Ends this process with a line, where JAX would abort without one."""
  soon = min(wait, 5.0)
  if met.wait(soon):
    return
  console.say(f'waiting for the other processes of {who}, at most {wait:g} s')
  if not met.wait(wait - soon):
    print(
      f'error: --start_timeout {wait:g}: not all processes of {who} are there; start all of them, '
      'each with a --process_id of its own, and let them reach process 0',
      file=sys.stderr,
    )
    console.flush()
    os._exit(RESTART)


@functools.cache
def introduce() -> None:
  """Says once who is there, and lets process 0 alone tell of progress.

  Raises:
    UserError: they have different numbers of devices.
  """
  if count() > 1:
    console.speak_as(jax.process_index())
    numbers = collections.Counter(d.process_index for d in jax.devices())
    if len(set(numbers.values())) > 1:
      raise UserError(
        f'processes 0..{count() - 1} have {", ".join(str(numbers[i]) for i in range(count()))} '
        'devices; give all of them as many'
      )
    hosts = ', '.join(dict.fromkeys(gather(socket.gethostname())))
    console.say(f'{count()} processes on {hosts}')


def count() -> int:
  """Returns the number of processes."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
  """Whether this is process 0, which alone writes reports."""
  return count() == 1 or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """Returns every process's JSON value, in order, on every process."""
  if count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(text.size))
  # Of few lengths, since each is a program of its own.
  length = max(256, 1 << (int(sizes.max()) - 1).bit_length())
  rows = multihost_utils.process_allgather(np.pad(text, (0, length - text.size)))
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_primary(function: Callable, *args: Any) -> Any:
  """Calls a function on process 0; returns its JSON value on every process.

  Raises:
    UserError: the function raised it; raised on every process.
  """
  if count() == 1:
    return function(*args)
  value, refusal = _attempt(function, *args) if is_primary() else (None, None)
  value, refusal = gather([value, refusal])[0]
  if refusal is not None:
    raise UserError(refusal)
  return value


def everywhere(function: Callable, *args: Any) -> Any:
  """Calls a function on every process; returns each one's own value.

  Raises:
    UserError: the function raised it on one of them; raised on every process.
  """
  if count() == 1:
    return function(*args)
  value, refusal = _attempt(function, *args)
  for index, (host, line) in enumerate(gather([socket.gethostname(), refusal])):
    if line is not None:
      raise UserError(f'process {index} ({host}): {line}' if index else line)
  return value


def _attempt(function: Callable, *args: Any) -> tuple[Any, str | None]:
  """Returns (value, None), or (None, why the function refuses)."""
  try:
    return function(*args), None
  except UserError as error:
    return None, str(error)


def any_of(flag: bool) -> bool:
  """Whether a flag is set on any of the processes."""
  if count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.uint8(flag)).any())


def wait_for_all() -> None:
  """Waits until every process has come here."""
  if count() > 1:
    multihost_utils.sync_global_devices('wait_for_all')


def check_same(what: str, values: Mapping[str, Any]) -> None:
  """Raises UserError on every process unless all have the same JSON values.

  Args:
    what: what the values are, for the message.
    values: JSON values by name.
  """
  (host, first), *others = gather([socket.gethostname(), dict(values)])
  for index, (other_host, other) in enumerate(others, 1):
    for name in sorted(first.keys() | other.keys()):
      if first.get(name) != other.get(name):
        raise UserError(
          f'process {index} ({other_host}) has another {what}: {name} {other.get(name)!r}, process '
          f'0 ({host}) has {first.get(name)!r}; start all with the same'
        )


def await_verdict() -> None:
  """Waits until JAX would have ended this process for the loss of another.

  Such a loss breaks whatever this process does together with the lost one, as
  an error of any kind. Where this returns, the error is this process's own.
  """
  if count() > 1:
    time.sleep(_heartbeat + _LATE)


def finish() -> None:
  """Leaves the other processes at the end of a command that succeeded."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()
    console.speak_as(0)


def leave(status: int) -> None:
  """Ends this process with an exit status; returns where it is alone.

  What goes wrong on all of them ends all with this status: they wait here for each other, so that
  none of them is lost to another one. After a wrong of its own this process is out after a moment,
  and JAX ends the others once it misses this one.
  """
  if jax.distributed.is_initialized():
    console.flush()
    threading.Timer(_GRACE, os._exit, [status]).start()
    try:
      jax.distributed.shutdown()
    finally:
      os._exit(status)
