"""Kills a training at random for as long as asked; says what that cost.

  python tests/soak.py --minutes 30 --seed 0

The command of a small run is started, killed (SIGKILL mostly, SIGTERM
sometimes; with --processes 2, one of them) and started again, until the run is
at its end; then another run begins, and the last is let finish once the time is
up. Every run must give the adapter of one that was never disturbed: bit for bit
on one process, to rounding on several. The delays follow from the seed; what
they hit depends on the machine.

A line is printed for each kill, and a summary at the end. The exit status is 1
if a run went on from before its last finished save, ended with a status that is
not documented, hung, left files behind, or ended otherwise than the undisturbed
one. The files stay in --dir, a temporary directory by default.
"""

import argparse
import atexit
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import small_digits
from pod import free_port

from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
# Killed (9), SIGTERM before it is listened for (15), an abort of JAX, which
# lost its coordinator (6), or a whole save and a documented exit (75).
EXPECTED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT, 75}
HANGS = 180  # seconds from a kill to the end of all processes
ROUNDING = 1e-4
FLAGS = (
  '--config.train.checkpoint_every=25',
  '--config.train.eval_every=200',
  '--config.train.log_every=1',
  '--config.eval.attacks=("pgd-2",)',
  '--peer_timeout=20',
  # Process 0 may be killed before the others have reached it.
  '--start_timeout=90',
)


class Failure(Exception):
  """What must not happen."""


@dataclasses.dataclass
class Record:
  """What a soak has seen so far.

  Attributes:
    kills: so many.
    in_saves: kills that left a save unfinished.
    restarts: after kills.
    older: restarts that found the newest checkpoint damaged.
    lost: the most steps that one of the kills cost.
    finished: runs that came to their end.
    leftovers: files that should not be there.
  """

  kills: int = 0
  in_saves: int = 0
  restarts: int = 0
  older: int = 0
  lost: int = 0
  finished: int = 0
  leftovers: int = 0

  def summary(self) -> str:
    return (
      f'{self.kills} kills, {self.in_saves} of them in a save; '
      f'{self.restarts} restarts, {self.older} from an older checkpoint; at '
      f'most {self.lost} steps lost to a kill; {self.finished} runs finished, '
      f'{self.leftovers} files left over'
    )


class Pod:
  """The command, started on all its processes; stderr goes to files."""

  def __init__(self, command: list[str], count: int, log: Path):
    self.log, self.processes, arguments = log, [], []
    atexit.register(self.kill)
    if count > 1:
      port = free_port()
      arguments = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}']
    for index in range(count):
      own = [*arguments, f'--process_id={index}'] if count > 1 else []
      with open(f'{log}.{index}', 'w') as stderr:
        self.processes.append(
          subprocess.Popen([*command, *own], cwd=ROOT, stderr=stderr, stdout=subprocess.DEVNULL)
        )

  def has_ended(self) -> bool:
    return any(process.poll() is not None for process in self.processes)

  def end(self, seconds: float | None = None) -> list[int]:
    """Waits for all processes; returns their statuses."""
    deadline = None if seconds is None else time.monotonic() + seconds
    try:
      for process in self.processes:
        process.wait(deadline and max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
      raise Failure(f'hangs {seconds:g} s after a kill, see {self.log}.*') from None
    finally:
      self.kill()
    return [process.returncode for process in self.processes]

  def kill(self) -> None:
    for process in self.processes:
      process.kill()

  def said(self, index: int = 0) -> str:
    return Path(f'{self.log}.{index}').read_text()


class Soak:
  """Runs under kills, each against the same undisturbed one."""

  def __init__(self, directory: Path, processes: int, seed: int):
    self.directory, self.processes = directory, processes
    self.record, self.random = Record(), random.Random(seed)
    self.started = time.monotonic()
    self._pods = 0

  def start(self, workdir: Path, *flags: str) -> Pod:
    command = [sys.executable, '-m', 'fulllora_jax.main']
    command += [f'--config={small_digits.__file__}', f'--workdir={workdir}']
    self._pods += 1
    log = self.directory / f'log-{self._pods:04d}'
    data = f'--config.data.dir={self.directory / "data"}'
    return Pod([*command, data, *flags], self.processes, log)

  def finish(self, workdir: Path, *flags: str) -> str:
    """Lets a run go on to its end, undisturbed; returns what it said."""
    pod = self.start(workdir, *flags)
    statuses = pod.end()
    if any(statuses):
      raise Failure(f'a run ended with {statuses}, see {pod.log}.*')
    return pod.said()

  def kill_until(self, deadline: float, workdir: Path, *flags: str) -> bool:
    """Kills a run again and again; returns whether it came to its end."""
    saved = 0
    while time.monotonic() < deadline:
      pod = self.start(workdir, *flags)
      self._await_moment(pod, workdir)
      how = '' if pod.has_ended() else self._kill(pod)
      statuses = pod.end(HANGS)
      saved = self._check_resume(pod, saved)
      if not any(statuses):
        return True
      if not how or not EXPECTED.issuperset(statuses):
        raise Failure(f'a run ended with {statuses}, see {pod.log}.*')
      saved = self._note(pod, workdir, how, saved)
      self.record.restarts += 1
    return False

  def _await_moment(self, pod: Pod, workdir: Path) -> None:
    """Waits for any moment, one after a save, or one in a save."""
    kind, delay = self.random.random(), self.random.random()
    before, began = newest_step(workdir), time.monotonic()
    if kind < 0.2:
      wait_until(lambda: time.monotonic() > began + 15 * delay, pod)
      return
    wait_until(lambda: newest_step(workdir) > before, pod)
    reached = time.monotonic()
    wait_until(lambda: time.monotonic() > reached + 15 * delay, pod)
    if kind < 0.6:
      wait_until(lambda: is_saving(workdir), pod, pause=0)

  def _kill(self, pod: Pod) -> str:
    """Sends a signal to one of the processes; returns which to whom."""
    name = 'SIGTERM' if self.random.random() < 0.2 else 'SIGKILL'
    victim = self.random.randrange(self.processes)
    pod.processes[victim].send_signal(getattr(signal, name))
    return f'{name} to {victim}'

  def _check_resume(self, pod: Pod, saved: int) -> int:
    """Checks where a pod went on; returns that step, or `saved`."""
    self.record.older += pod.said().count('is damaged')
    found = re.findall(r'resuming at step (\d+)', pod.said())
    if found and int(found[-1]) < saved:
      raise Failure(f'step {saved} was saved, but a run resumed at {found[-1]}, see {pod.log}.*')
    return int(found[-1]) if found else saved

  def _note(self, pod: Pod, workdir: Path, how: str, resumed: int) -> int:
    """Prints what a kill cost; returns the newest step saved."""
    saved, reached = newest_step(workdir), newest_measured(workdir)
    record, in_save = self.record, is_saving(workdir)
    lost = max(reached - saved, 0)
    record.kills += 1
    record.in_saves += in_save
    record.lost = max(record.lost, lost)
    minutes = (time.monotonic() - self.started) / 60
    say(
      f'{minutes:5.1f} min  {how}{" in a save" if in_save else ""}: resumed at '
      f'{resumed}, reached {reached}, saved {saved}, lost {lost}'
    )
    return saved

  def compare(self, workdir: Path, whole: Path) -> None:
    """Raises Failure unless a run ended as the undisturbed one."""
    leftovers = list(workdir.rglob('*tmp*'))
    self.record.finished += 1
    self.record.leftovers += len(leftovers)
    if leftovers:
      raise Failure(f'left behind: {leftovers}')
    largest = 0.0
    for which in ('best', 'last'):
      adapters = [artefact.read_artefact(p / which) for p in (workdir, whole)]
      (found, metadata), (wanted, expected) = adapters
      if metadata['step'] != expected['step']:
        raise Failure(f'{which} of {workdir} is of another step')
      wanted = trees.named_leaves(wanted)
      for path, leaf in trees.named_leaves(found).items():
        largest = max(largest, np.abs(leaf - wanted[path]).max())
    if largest > (ROUNDING if self.processes > 1 else 0):
      raise Failure(f'the adapter of {workdir} differs by {largest}')
    rows = [read_metrics(p / 'metrics.jsonl') for p in (workdir, whole)]
    steps = [[(row['step'], row['kind']) for row in part] for part in rows]
    if steps[0] != steps[1]:
      raise Failure(f'the metrics of {workdir} lack steps, or have them twice')
    say(f'{workdir.name} is at its end; its adapter differs by {largest}')


def newest_step(workdir: Path) -> int:
  """Returns the newest step saved whole, 0 where there is none."""
  saved = workdir / 'checkpoints'
  names = os.listdir(saved) if saved.exists() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def newest_measured(workdir: Path) -> int:
  path = workdir / 'metrics.jsonl'
  rows = read_metrics(path) if path.exists() else ()
  return max((row['step'] for row in rows), default=0)


def is_saving(workdir: Path) -> bool:
  return any(workdir.glob('*/*.orbax-checkpoint-tmp'))


def wait_until(condition, pod: Pod, pause: float = 0.02) -> None:
  """Waits until something is so, or the pod has ended."""
  while not condition() and not pod.has_ended():
    time.sleep(pause)


def say(line: str) -> None:
  print(line, flush=True)


def prepare(directory: Path, data_dir: str | None) -> None:
  """Makes DIRECTORY/data: a link to prepared digits, or prepares them."""
  directory.mkdir(parents=True, exist_ok=True)
  if data_dir:
    (directory / 'data').symlink_to(Path(data_dir).absolute())
    return
  command = [sys.executable, '-m', 'fulllora_jax.data.prepare', '--name=digits']
  subprocess.run([*command, f'--dir={directory / "data"}'], cwd=ROOT, check=True)


def soak(job: Soak, minutes: float, steps: int) -> None:
  """Runs under kills until the time is up."""
  base, whole = job.directory / 'base', job.directory / 'undisturbed'
  job.finish(base, '--config.train.steps=1')
  flags = f'--config.base.source={base / "base"}', *FLAGS
  flags += (f'--config.train.steps={steps}',)
  job.finish(whole, *flags)
  say(f'undisturbed: {(time.monotonic() - job.started) / 60:.1f} min')
  job.started = time.monotonic()
  deadline, number = job.started + 60 * minutes, 0
  while time.monotonic() < deadline:
    number += 1
    workdir = job.directory / f'run-{number}'
    if not job.kill_until(deadline, workdir, *flags):
      job.finish(workdir, *flags)
    job.compare(workdir, whole)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--minutes', type=float, default=30.0)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--steps', type=int, default=3000, help='of each run')
  parser.add_argument('--data_dir', help='where digits is prepared')
  parser.add_argument('--dir', type=Path, help='for the files of the runs')
  values = parser.parse_args()
  directory = values.dir or Path(tempfile.mkdtemp(prefix='soak-'))
  os.environ.update(
    PYTHONPATH=str(ROOT),
    JAX_PLATFORMS='cpu',
    JAX_NUM_CPU_DEVICES='1',
    JAX_COMPILATION_CACHE_DIR=str(directory / 'cache'),
  )
  prepare(directory, values.data_dir)
  job, failure = Soak(directory, values.processes, values.seed), None
  try:
    soak(job, values.minutes, values.steps)
  except Failure as error:
    failure = error
  say(job.record.summary())
  say(f'FAILED: {failure}' if failure else 'all equal to the undisturbed run')
  return 1 if failure else 0


if __name__ == '__main__':
  sys.exit(main())
