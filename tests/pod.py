"""Several processes of one command, on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAIT = 900  # seconds, for a run on a busy machine


class Pod:
  """A command started as `count` processes, of `devices` each.

  Args:
    arguments: of `python`, for every process.
    own: more of them, by process.
    meet: how the processes are told of each other: by 'flags', by JAX's
      variables ('jax'), or by those of srun ('slurm').
  """

  def __init__(self, arguments, count, devices=1, own=None, meet='flags'):
    port = free_port()
    self.processes = []
    for index in range(count):
      flags, variables = [], {}
      if count > 1:
        flags, variables = _MEETINGS[meet](port, count, index)
      self.processes.append(
        subprocess.Popen(
          [sys.executable, *arguments, *(own or {}).get(index, ()), *flags],
          cwd=ROOT,
          env={**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices), **variables},
          stderr=subprocess.PIPE,
          text=True,
        )
      )

  def until(self, *starts):
    """Reads process 0's lines up to one that begins so."""
    for line in self.processes[0].stderr:
      if line.startswith(starts):
        return
    raise AssertionError(f'process 0 never said {starts}')

  def lose(self, victim, how):
    """Sends a signal to one of two processes, and waits for the other to end.

    Returns:
      Its exit status, what it said, and the seconds that it took.
    """
    started = time.monotonic()
    self.processes[victim].send_signal(how)
    other = self.processes[1 - victim]
    try:
      said = other.communicate(timeout=WAIT)[1]
    finally:
      self.kill()
    return other.returncode, said, time.monotonic() - started

  def end(self):
    """Returns the exit statuses, and what each process said."""
    try:
      said = [p.communicate(timeout=WAIT)[1] for p in self.processes]
    finally:
      self.kill()
    return [process.returncode for process in self.processes], said

  def kill(self):
    for process in self.processes:
      process.send_signal(signal.SIGKILL)


def free_port():
  """Returns a port that is free, among those that JAX chooses under Slurm."""
  for port in range(61440 + os.getpid() % 4000, 65535):
    with socket.socket() as one:
      try:
        one.bind(('', port))
      except OSError:
        continue
      if port not in _given:
        _given.add(port)
        return port
  raise AssertionError('no port is free')


_given = set()


def _by_flags(port, count, index):
  flags = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}']
  return [*flags, f'--process_id={index}'], {}


def _by_jax(port, count, index):
  return [], {
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': str(count),
    'JAX_PROCESS_ID': str(index),
  }


def _by_slurm(port, count, index):
  return [], {
    'SLURM_JOB_ID': str(port - 61440),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_STEP_NUM_TASKS': str(count),
    'SLURM_STEP_TASKS_PER_NODE': str(count),
    'SLURM_NTASKS': str(count),
    'SLURM_PROCID': str(index),
    'SLURM_LOCALID': str(index),
  }


_MEETINGS = {'flags': _by_flags, 'jax': _by_jax, 'slurm': _by_slurm}
