"""Many processes, one run: how they find each other and agree.

Every process runs the same command on its own host. Who they are comes from
--coordinator, --num_processes and --process_id; from JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, which Kubernetes
sets); from Slurm, under srun; or on TPU pods from JAX itself. In one process
every function here is trivial.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from fulllora_jax.core import console
from fulllora_jax.core.errors import Unavailable, UserError
from fulllora_jax.distributed import peers, rendezvous

_ENVIRONMENT = {
  'coordinator': ('JAX_COORDINATOR_ADDRESS',),
  'num_processes': ('JAX_NUM_PROCESSES',),
  'process_id': ('JAX_PROCESS_ID', 'JOB_COMPLETION_INDEX'),
}
_SLURM_PORTS = 61440, 4000  # the first, and how many: of two, by job
_ADDRESS_BYTES = 1024


class Parameters(NamedTuple):
  """Who this process is among the others.

  Attributes:
    coordinator: host:port of process 0; the port after it is used too.
    num_processes: N > 1.
    process_id: in 0..N-1.
    local_device_ids: the devices of this host that are its own; None: all.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: list[int] | None = None


def start(values: flags.FlagValues) -> None:
  """Joins the other processes, if there are any; before JAX is used.

  Raises:
    UserError: flags or environment that do not say who this is.
    Unavailable: a process is not there within --start_timeout.
  """
  for name in ('start_timeout', 'peer_timeout'):
    if not values[name].value > 0:
      raise UserError(f'--{name} {values[name].value}: it must be above 0')
  found = parameters(values, os.environ)
  if found is not None:
    _join(found, values.start_timeout, values.peer_timeout)
  elif _detects_by_itself(os.environ):
    _detect(values.start_timeout)
    connect(values.start_timeout, values.peer_timeout)


def parameters(
  values: flags.FlagValues, environment: Mapping[str, str]
) -> Parameters | None:
  """Reads who this process is from flags, environment or Slurm.

  Returns:
    None where nothing says that there are others.

  Raises:
    UserError: something is missing or makes no sense.
  """
  given = {}
  for name, variables in _ENVIRONMENT.items():
    if values[name].value is not None:
      given[name] = values[name].value
    else:
      found = [environment[v] for v in variables if environment.get(v)]
      given[name] = found[0] if found else None
  # JOB_COMPLETION_INDEX alone is no sign of other processes.
  if values['process_id'].value is None and not (
    given['coordinator'] or given['num_processes']
  ):
    return _slurm(environment)
  for name, value in given.items():
    if value is None:
      raise UserError(
        f'--{name}: missing; several processes need --coordinator, '
        '--num_processes and --process_id, or '
        + ', '.join(v for v, *_ in _ENVIRONMENT.values())
      )
  count, index = _number(given, 'num_processes'), _number(given, 'process_id')
  if not 0 <= index < count:
    raise UserError(
      f'--process_id {index}: of {count} processes the ids are 0..{count - 1}'
    )
  rendezvous.split(given['coordinator'])
  return Parameters(given['coordinator'], count, index) if count > 1 else None


def _number(given: Mapping[str, Any], name: str) -> int:
  try:
    return int(given[name])
  except ValueError:
    raise UserError(f'--{name} {given[name]!r}: it must be a number') from None


def _slurm(environment: Mapping[str, str]) -> Parameters | None:
  """Reads what srun sets; a batch script itself is one process."""
  count = int(environment.get('SLURM_STEP_NUM_TASKS', 1))
  nodes = environment.get('SLURM_STEP_NODELIST', '')
  # The first of node001,host2 or node[001-015,020],host2.
  first = re.match(r'([^,[]+)(?:\[(\w+))?', nodes)
  if count < 2 or not first:
    return None
  port, ports = _SLURM_PORTS
  port += 2 * (int(environment['SLURM_JOB_ID']) % (ports // 2))
  return Parameters(
    f'{first.group(1)}{first.group(2) or ""}:{port}',
    count,
    int(environment['SLURM_PROCID']),
    _slurm_devices(environment),
  )


def _slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
  """Gives each of several tasks of a node one GPU, unless Slurm did."""
  tasks = re.match(r'\d+', environment.get('SLURM_STEP_TASKS_PER_NODE', '1'))
  visible = environment.get('CUDA_VISIBLE_DEVICES', '0,1')
  if int(tasks.group()) < 2 or len(visible.split(',')) < 2:
    return None
  return [int(environment['SLURM_LOCALID'])]


def _detects_by_itself(environment: Mapping[str, str]) -> bool:
  """Whether JAX may know a cluster: TPU hosts, pods of an indexed job."""
  platforms = environment.get('JAX_PLATFORMS', '')
  if importlib.util.find_spec('libtpu') and platforms in ('', 'tpu'):
    return True
  in_job = 'JOB_COMPLETION_INDEX' in environment
  return in_job and importlib.util.find_spec('kubernetes') is not None


def _join(found: Parameters, wait: float, silence: float) -> None:
  """Meets the others first: JAX aborts where one does not come."""
  host, port = rendezvous.split(found.coordinator)
  if found.process_id:
    meeting = rendezvous.join([host], port + 1, *found[1:3], wait)
  else:
    with rendezvous.listen(port + 1) as server:
      meeting = rendezvous.gather(server, found.num_processes, wait)
  try:
    jax.distributed.initialize(
      *found,
      cluster_detection_method='deactivate',
      initialization_timeout=max(1, round(wait)),
    )
  except (RuntimeError, ValueError) as error:
    raise Unavailable(
      f'--coordinator {found.coordinator}: {_first_line(error)}'
    ) from None
  peers.joined = peers.Peers(found.process_id, *meeting, silence)
  _introduce()


def _detect(wait: float) -> None:
  try:
    jax.distributed.initialize(initialization_timeout=max(1, round(wait)))
  except ValueError:
    pass  # no cluster: JAX has no coordinator for it
  except RuntimeError as error:
    raise Unavailable(
      f'the other hosts: {_first_line(error)}; say who this one is with '
      '--coordinator, --num_processes and --process_id'
    ) from None


def _first_line(error: Exception) -> str:
  return str(error).strip().split('\n')[0][:300]


def connect(wait: float = 300.0, silence: float = 60.0) -> None:
  """Connects the processes of a JAX that is initialised already.

  Args:
    wait: seconds for all of them to come.
    silence: seconds after which one that says nothing is dead.

  Raises:
    Unavailable: they cannot reach each other.
  """
  count, index = jax.process_count(), jax.process_index()
  if peers.joined is not None or count == 1:
    return
  with rendezvous.listen(0) as server:
    text = rendezvous.describe(server).encode()[:_ADDRESS_BYTES]
    padded = np.frombuffer(text.ljust(_ADDRESS_BYTES), np.uint8)
    first = bytes(multihost_utils.broadcast_one_to_all(padded)).decode()
    if index:
      meeting = rendezvous.join(
        *rendezvous.described(first), count, index, wait
      )
    else:
      meeting = rendezvous.gather(server, count, wait)
  peers.joined = peers.Peers(index, *meeting, silence)
  _introduce()


def _introduce() -> None:
  console.speak_as(peers.joined.index)
  hosts = ', '.join(dict.fromkeys(peers.joined.names))
  console.say(f'{len(peers.joined.names)} processes on {hosts}')


def count() -> int:
  """Returns the number of processes."""
  return 1 if peers.joined is None else len(peers.joined.names)


def is_primary() -> bool:
  """Whether this is process 0, which alone writes reports."""
  return peers.joined is None or peers.joined.index == 0


def from_primary(function: Callable, *args: Any) -> Any:
  """Calls a function on process 0; returns its JSON value on every process.

  Raises:
    UserError: on every process, where the function raises it.
  """
  if peers.joined is None:
    return function(*args)
  if peers.joined.index:
    answer = peers.joined.broadcast()
  else:
    try:
      answer = {'value': function(*args)}
    except UserError as error:
      answer = {'error': str(error)}
    peers.joined.broadcast(answer)
  if 'error' in answer:
    raise UserError(answer['error'])
  return answer['value']


def gather(value: Any) -> list[Any]:
  """Returns every process's JSON value, in order, on every process."""
  return [value] if peers.joined is None else peers.joined.gather(value)


def reached_sync_point(call: int) -> bool:
  """Whether JAX wants to stop here, on all processes alike.

  Args:
    call: rises with every call, alike on all processes.
  """
  return multihost_utils.reached_preemption_sync_point(call)


def wait_for_all() -> None:
  """Waits until every process has come here."""
  gather(None)


def check_same(what: str, values: Mapping[str, Any]) -> None:
  """Raises UserError on every process unless all have the same JSON values.

  Args:
    what: they are, for the message.
    values: by name.
  """
  first, *others = gather(dict(values))
  names = peers.joined.names if others else []
  for index, other in enumerate(others, 1):
    for name in sorted(first.keys() | other.keys()):
      if first.get(name) != other.get(name):
        raise UserError(
          f'process {index} ({names[index]}) has another {what}: {name} '
          f'{other.get(name)!r}, process 0 ({names[0]}) has '
          f'{first.get(name)!r}; start all with the same'
        )


def finish() -> None:
  """Leaves the other processes at the end of a command that succeeded."""
  if peers.joined is not None:
    wait_for_all()
    peers.joined.leave(0)
    peers.joined = None
    console.speak_as(0)
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()
