"""Kills a run at random moments for a long time, and looks at what is left.

  python tests/soak.py --minutes=30 --data_dir=TFDS_DIR [--processes=2]

A small digits run is made once undisturbed. Then the same command runs again
and again; a random process of it gets SIGKILL (or, one time in seven, SIGTERM)
at a random moment. Each start must go on from the newest checkpoint that was
whole at the kill, and each run that gets to its end must have the undisturbed
one's adapter: bit for bit in one process, to rounding in several. Exits with 1
where that does not hold.
"""

import argparse
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from fulllora_jax import checkpoint
from fulllora_jax import state as state_lib

ROOT = Path(__file__).parents[1]
SETTINGS = (
  '--config.optimizer.name=sgd',
  '--config.train.log_every=5',
  '--config.train.eval_every=500',
  '--config.train.checkpoint_every=5',
  '--config.eval.attacks=("clean",)',
)


class Run:
  """The processes of one start, and the lines that process 0 says."""

  def __init__(self, command, processes):
    port = _free_port()
    self.lines: list[str] = []
    self.processes = [
      subprocess.Popen(
        [sys.executable, *command, *_place(port, index, processes)],
        cwd=ROOT,
        env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'},
        stderr=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        text=True,
      )
      for index in range(processes)
    ]
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self):
    for line in self.processes[0].stderr:
      self.lines.append(line.rstrip())

  def number(self, pattern):
    """Returns the newest number in its lines that a pattern finds."""
    found = [m for line in self.lines if (m := re.match(pattern, line))]
    return int(found[-1].group(1)) if found else None

  def ended(self):
    return all(process.poll() is not None for process in self.processes)

  def wait(self, seconds):
    """Waits for the end; returns whether it came."""
    deadline = time.monotonic() + seconds
    while not self.ended() and time.monotonic() < deadline:
      time.sleep(0.05)
    return self.ended()


def _free_port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return min(probe.getsockname()[1], 65000)


def _place(port, index, processes):
  if processes == 1:
    return []
  return [
    f'--coordinator=127.0.0.1:{port}',
    f'--num_processes={processes}',
    f'--process_id={index}',
    '--start_timeout=100',
  ]


def newest_save(workdir):
  """Returns the newest whole checkpoint, and whether one is being written."""
  names = [p.name for p in (workdir / 'checkpoints').glob('*')]
  whole = [int(name) for name in names if name.isdigit()]
  return max(whole, default=0), any('tmp' in name for name in names)


def disturb(run, workdir, rng):
  """Kills one process at a random moment; returns what was seen, or None."""
  deadline = time.monotonic() + 300
  while run.number(r'step (\d+)/') is None:  # until it trains
    if run.ended() or time.monotonic() > deadline:
      return None
    time.sleep(0.02)
  time.sleep(rng.uniform(0.0, 8.0))
  if rng.random() < 0.3:  # in the middle of a save
    until = time.monotonic() + 5
    while not newest_save(workdir)[1] and time.monotonic() < until:
      pass
  if run.ended():
    return None
  sign = rng.choice([signal.SIGKILL] * 6 + [signal.SIGTERM])
  victim = rng.randrange(len(run.processes))
  saved, saving = newest_save(workdir)
  run.processes[victim].send_signal(sign)
  return sign, victim, saved, saving


def same_adapter(workdir, reference, exactly):
  for which in ('best', 'last'):
    found, wanted = (
      state_lib.named_leaves(checkpoint.read_artefact(path / which)[0])
      for path in (workdir, reference)
    )
    for path, leaf in wanted.items():
      if exactly and found[path].tobytes() != leaf.tobytes():
        return False
      if not np.allclose(found[path], leaf, atol=1e-3):
        return False
  return True


def soak(arguments):
  """Returns the number of things that were wrong."""
  rng = random.Random(arguments.seed)
  folder = Path(tempfile.mkdtemp(prefix='soak'))
  command = [
    *('-m', 'fulllora_jax.main', '--config=tests/small_digits.py'),
    f'--config.data.dir={arguments.data_dir}',
    f'--config.train.steps={arguments.steps}',
    *SETTINGS,
  ]
  reference = folder / 'reference'
  first = Run([*command, f'--workdir={reference}'], 1)
  if not first.wait(1800) or first.processes[0].returncode:
    print('\n'.join(first.lines[-5:]))
    return 1
  command.append(f'--config.base.source={reference / "base"}')
  expected = folder / 'expected'  # from that base, undisturbed
  Run([*command, f'--workdir={expected}'], 1).wait(1800)

  started, end = time.monotonic(), time.monotonic() + 60 * arguments.minutes
  kills = saves = ends = wrong = fallbacks = largest = 0
  workdir, before = folder / 'run-0', None
  while time.monotonic() < end:
    run = Run([*command, f'--workdir={workdir}'], arguments.processes)
    seen = disturb(run, workdir, rng)
    if not run.wait(400):
      wrong += 1
      print('HANGS', run.lines[-3:], flush=True)
      for process in run.processes:
        process.kill()
      run.wait(10)
    resumed = run.number(r'resuming at step (\d+)') or 0
    if before is not None and resumed < before:
      wrong += 1
      print(f'LOST: resumed at {resumed}, {before} was whole', flush=True)
    fallbacks += sum('is damaged' in line for line in run.lines)
    step = run.number(r'step (\d+)/') or resumed
    if seen is None:
      statuses = [process.returncode for process in run.processes]
      good = not any(statuses) and same_adapter(
        workdir, expected, arguments.processes == 1
      )
      wrong, ends = wrong + (not good), ends + 1
      print(f'end {statuses}: {"equal" if good else "NOT EQUAL"}', flush=True)
      before, workdir = None, folder / f'run-{ends}'
      continue
    sign, victim, before, saving = seen
    kills, saves = kills + 1, saves + saving
    lost = max(0, step - before)
    largest = max(largest, lost)
    print(
      f'{time.monotonic() - started:6.0f} s  {sign.name} to {victim}: from '
      f'{resumed} to {step}, whole {before}, {"in a save, " * saving}'
      f'{lost} to do again',
      flush=True,
    )
  print(
    f'{kills} kills, {saves} of them in a save, {ends} runs to the end, '
    f'{fallbacks} damaged checkpoints, at most {largest} steps to do again, '
    f'{wrong} wrong'
  )
  shutil.rmtree(folder)
  return wrong


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--minutes', type=float, default=30.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--data_dir', required=True)
  sys.exit(bool(soak(parser.parse_args())))
