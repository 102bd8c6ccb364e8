"""A run in a bucket, through the clients that runs use: a whole one.

The bucket is a server of this machine (fake_gcs.py).
"""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from fake_gcs import FakeGcs

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _has(module):
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of a package above it
    return False


pytestmark = pytest.mark.skipif(
  not (_has('google.cloud.storage') and shutil.which('openssl'))
  or not (_has('tensorflow') or _has('gcsfs')),
  reason='needs google-cloud-storage, gcsfs or TensorFlow, and openssl',
)


@pytest.fixture(scope='module')
def server():
  with FakeGcs('bucket') as made:
    yield made


@pytest.fixture(scope='module')
def main(server, tmp_path_factory, digits_dir):
  """Runs the command; gcsfs is taken where it is there, since it is quicker."""
  environment = server.environment(tmp_path_factory.mktemp('keys'))
  if _has('gcsfs'):
    environment['EPATH_USE_TF'] = '0'

  def run(workdir='gs://bucket/run', **changes):
    values = {
      'method': 'standard',
      'data.dir': digits_dir,
      'train.steps': 4,
      'train.checkpoint_every': 2,
      'eval.attacks': "('clean',)",
      **changes,
    }
    return subprocess.run(
      [
        *(sys.executable, '-m', 'fulllora_jax.main', f'--workdir={workdir}'),
        '--config=tests/small_digits.py',
        *(f'--config.{name}={value}' for name, value in values.items()),
      ],
      env=os.environ | {'JAX_NUM_CPU_DEVICES': '1'} | environment,
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=900,
    )

  return run


@pytest.fixture(scope='module')
def finished(main):
  done = main()
  assert done.returncode == 0, done.stderr
  return done


def read(server, name):
  return server.objects['bucket', f'run/{name}'][0]


@pytest.mark.slow
def test_all_of_a_run_is_there(finished, server):
  report = json.loads(read(server, 'report.json'))
  assert report['last_step'] == 4
  assert read(server, 'curves.svg').startswith(b'<svg')
  lines = read(server, 'metrics.jsonl').splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert steps == sorted(steps) and steps[-1] == 4
  names = [name for _, name in server.objects]
  for place in ('checkpoints/4', 'last/4'):
    assert f'run/{place}/commit_success.txt' in names
  assert 'run/.lock' not in names


@pytest.mark.slow
def test_a_finished_run_is_found(finished, server, main):
  before = read(server, 'report.md')
  again = main()
  assert again.returncode == 0, again.stderr
  assert 'gs://bucket/run holds a finished run' in again.stderr
  assert read(server, 'report.md') == before


def test_a_bucket_that_is_not_there(main):
  done = main('gs://nobody/run')
  assert done.returncode == 2
  last = done.stderr.strip().splitlines()[-1]
  assert 'cannot write to gs://nobody/run: there is no such bucket' in last
