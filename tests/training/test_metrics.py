"""metrics.jsonl: each step once, whatever kills the run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.training import metrics
from fulllora_jax.training.metrics import MetricWriter, read_metrics


def write(workdir, steps, start_step=0, tensorboard=False):
  with MetricWriter(workdir, tensorboard=tensorboard, start_step=start_step) as writer:
    for step in steps:
      writer.write(step, 'train', {'loss': 1 / step})
    writer.write(steps[-1], 'validation', {'clean_accuracy': 0.5})


def steps_of(workdir, kind='train'):
  rows = read_metrics(workdir / 'metrics.jsonl', kind)
  return [row['step'] for row in rows]


def test_lines(tmp_path):
  with MetricWriter(tmp_path / 'new' / 'run', tensorboard=False, start_step=0) as writer:
    writer.write(5, 'train', {'loss': np.float32(0.5), 'gradient_norm': np.nan})
    path = tmp_path / 'new' / 'run' / 'metrics.jsonl'
    # There before the file is closed.
    assert json.loads(path.read_text()) == {
      'step': 5,
      'kind': 'train',
      'loss': 0.5,
      'gradient_norm': None,
    }


def test_read_by_kind(tmp_path):
  write(tmp_path, [1, 2])
  assert steps_of(tmp_path) == [1, 2]
  assert steps_of(tmp_path, 'validation') == [2]
  assert steps_of(tmp_path, None) == [1, 2, 2]


def test_resumed_run_has_every_step_once(tmp_path):
  write(tmp_path, [10, 20, 30, 40])
  write(tmp_path, [30, 40, 50], start_step=25)
  assert steps_of(tmp_path) == [10, 20, 30, 40, 50]
  assert steps_of(tmp_path, 'validation') == [50]
  assert not list(tmp_path.glob('*.tmp'))


def test_a_step_that_is_there_is_not_repeated(tmp_path):
  write(tmp_path, [10, 20])
  write(tmp_path, [20, 30], start_step=20)
  assert steps_of(tmp_path) == [10, 20, 30]
  assert steps_of(tmp_path, 'validation') == [20, 30]


@pytest.mark.parametrize(
  'tail', [b'{"step": 2, "ki', b'{"step": 2}', b'\xff\x00\n', b'[]\n', b'\n']
)
def test_torn_lines_are_dropped(tmp_path, tail):
  path = tmp_path / 'metrics.jsonl'
  write(tmp_path, [1])
  path.write_bytes(path.read_bytes() + tail)
  assert steps_of(tmp_path) == [1]
  write(tmp_path, [2], start_step=5)
  assert steps_of(tmp_path) == [1, 2]


def test_whole_file_is_left_as_it_is(tmp_path):
  write(tmp_path, [1, 2])
  before = (tmp_path / 'metrics.jsonl').stat().st_ino
  write(tmp_path, [3], start_step=2)
  assert (tmp_path / 'metrics.jsonl').stat().st_ino == before


def test_read_refuses_a_damaged_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "kind": "train"}\nrubbish\n{"step": 2}\n')
  with pytest.raises(UserError, match='metrics.jsonl, line 2: not a line of'):
    read_metrics(path)


def test_read_refuses_a_missing_file(tmp_path):
  with pytest.raises(UserError, match='cannot read .*No such file'):
    read_metrics(tmp_path / 'metrics.jsonl')


def test_unwritable_directory(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match='cannot write .*metrics.jsonl'):
    MetricWriter(tmp_path / 'file', tensorboard=False, start_step=0)


def test_without_tensorflow(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  write(tmp_path, [1], tensorboard=True)
  assert steps_of(tmp_path) == [1]
  assert not (tmp_path / 'tensorboard').exists()
  error = capsys.readouterr().err
  assert error.startswith('no TensorBoard files: clu, tensorflow')
  assert error.count('\n') == 1


class StandIn:
  """Runs a Python program in place of fulllora_jax.training.tensorboard."""

  def __init__(self, monkeypatch, program):
    self.processes = []
    start = subprocess.Popen

    def popen(command, **options):
      assert command[1:3] == ['-m', 'fulllora_jax.training.tensorboard']
      command = [sys.executable, '-c', program, command[3]]
      self.processes.append(start(command, **options))
      return self.processes[-1]

    monkeypatch.setattr('subprocess.Popen', popen)
    monkeypatch.setattr(metrics, '_tensorboard_is_installed', lambda: True)


_COPY = """
import pathlib, sys
from fulllora_jax.training.tensorboard import whole_lines
workdir = pathlib.Path(sys.argv[1])
(workdir / 'tensorboard').mkdir(exist_ok=True)
with (workdir / 'tensorboard' / 'lines').open('ab') as file:
  for line in whole_lines(workdir / 'metrics.jsonl', sys.stdin):
    file.write(line)
"""


def test_event_process_gets_all_lines(tmp_path, monkeypatch):
  StandIn(monkeypatch, _COPY)
  write(tmp_path, list(range(1, 500)), tensorboard=True)
  lines = (tmp_path / 'tensorboard' / 'lines').read_text()
  assert lines == (tmp_path / 'metrics.jsonl').read_text()


def test_resumed_event_files_start_anew(tmp_path, monkeypatch):
  StandIn(monkeypatch, _COPY)
  write(tmp_path, [10, 20, 30])
  (tmp_path / 'tensorboard').mkdir()
  (tmp_path / 'tensorboard' / 'events.out.tfevents.1').touch()
  write(tmp_path, [25], start_step=20, tensorboard=True)
  assert [p.name for p in (tmp_path / 'tensorboard').iterdir()] == ['lines']
  lines = (tmp_path / 'tensorboard' / 'lines').read_text()
  assert lines == (tmp_path / 'metrics.jsonl').read_text()


def test_dead_event_process_is_one_warning(tmp_path, monkeypatch, capsys):
  stand_in = StandIn(monkeypatch, 'raise SystemExit(1)')
  with MetricWriter(tmp_path, tensorboard=True, start_step=0) as writer:
    stand_in.processes[0].wait()
    for step in range(1, 50):
      writer.write(step, 'train', {'loss': 1.0})
      time.sleep(0.001)
  assert len(steps_of(tmp_path)) == 49
  error = capsys.readouterr().err
  assert error.startswith('warning: TensorBoard files lack steps')
  assert error.count('\n') == 1


def test_event_process_that_fails_at_once(tmp_path, monkeypatch, capsys):
  # It dies after the last line: no write tells, but its exit status does.
  StandIn(monkeypatch, 'import sys; sys.stdin.read(); sys.exit(1)')
  write(tmp_path, [1], tensorboard=True)
  assert 'TensorBoard files lack steps' in capsys.readouterr().err


def test_hung_event_process_does_not_hold_up(tmp_path, monkeypatch, capsys):
  stand_in = StandIn(monkeypatch, 'import time; time.sleep(600)')
  monkeypatch.setattr(metrics, '_CLOSE_SECONDS', 0.2)
  start = time.monotonic()
  with MetricWriter(tmp_path, tensorboard=True, start_step=0) as writer:
    for step in range(1, 2000):
      writer.write(step, 'train', {f'metric_{i}': 1.0 for i in range(8)})
  assert time.monotonic() - start < 5
  assert stand_in.processes[0].poll() is not None
  assert len(steps_of(tmp_path)) == 1999
  assert capsys.readouterr().err.count('TensorBoard files lack steps') == 1


_KILLED = """
import os, sys
from fulllora_jax.training.metrics import MetricWriter
writer = MetricWriter(sys.argv[1], tensorboard=True, start_step=0)
writer.write(1, 'train', {'loss': 1.0})
print(writer._events._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_event_process_ends_with_a_killed_run(tmp_path):
  process = subprocess.run(
    [sys.executable, '-c', _KILLED, str(tmp_path)],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=300,
  )
  status = Path('/proc', process.stdout.strip(), 'stat')
  if not Path('/proc/self').exists():
    pytest.skip('needs /proc')
  assert process.returncode == -9
  deadline = time.monotonic() + 50
  # Gone, or a zombie that nobody waits for.
  while status.exists() and status.read_text().split(') ')[1][0] != 'Z':
    assert time.monotonic() < deadline, 'the event process is still there'
    time.sleep(0.1)
  assert steps_of(tmp_path) == [1]
