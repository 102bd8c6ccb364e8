"""One run over several processes: the same numbers, and a common end."""

import json
import signal
import socket

import numpy as np
import pytest
from golden import fake_checkpoint
from pod import Pod
from safetensors.numpy import save_file

from fulllora_jax.adapters import artefact
from fulllora_jax.core import trees
from fulllora_jax.training.metrics import read_metrics

HOST = socket.gethostname()
# SGD, since AdamW makes much of rounding in gradients near zero.
SETTINGS = (
  '--config.optimizer.name=sgd',
  '--config.adapter.targets=("query",)',  # less to compile in each process
  '--config.train.steps=6',
  '--config.train.eval_every=3',
  '--config.train.checkpoint_every=2',
  '--config.eval.attacks=("clean","pgd-2","apgd-ce")',
  '--config.eval.num_examples=20',
  '--config.eval.batch_size=16',
  '--peer_timeout=10',
  '--start_timeout=100',
)
# Where what is evaluated at the end is not the point.
CLEAN = '--config.eval.attacks=("clean",)'


@pytest.fixture(scope='module')
def start(finished, small_command):
  """Starts a pod that trains from the finished run's base."""
  base = f'--config.base.source={finished.workdir / "base"}'

  def start_pod(workdir, count, devices, *flags, **options):
    arguments = [*small_command, f'--workdir={workdir}', base, *SETTINGS]
    return Pod([*arguments, *flags], count, devices, **options)

  return start_pod


@pytest.fixture(scope='module')
def alone(start, tmp_path_factory):
  """The run on one process and one device."""
  workdir = tmp_path_factory.mktemp('processes') / 'alone'
  statuses, said = start(workdir, 1, 1).end()
  assert statuses == [0], said
  return workdir


def evaluations(workdir):
  report = json.loads((workdir / 'report.json').read_text())
  return {(e['weights'], e['attack']): e for e in report['evaluations']}


def assert_same_run(workdir, expected):
  """Adapters to rounding, counts and the number of measurements exactly."""
  for which in ('best', 'last'):
    found, metadata = artefact.read_artefact(workdir / which)
    wanted, other = artefact.read_artefact(expected / which)
    assert metadata['base_fingerprint'] == other['base_fingerprint']
    assert metadata['step'] == other['step']
    wanted = trees.named_leaves(wanted)
    for path, leaf in trees.named_leaves(found).items():
      np.testing.assert_allclose(leaf, wanted[path], atol=3e-6, err_msg=path)
  found, wanted = (evaluations(path) for path in (workdir, expected))
  assert len(found) >= 3
  for name, one in found.items():
    for key in ('num_correct', 'examples', 'per_class'):
      assert one[key] == wanted[name][key], name
    if 'verified' in one:
      assert one['verified']['mismatches'] == one['verified']['outside'] == 0
  found, wanted = (read_metrics(path / 'metrics.jsonl') for path in (workdir, expected))
  assert [(row['step'], row['kind']) for row in found] == [
    (row['step'], row['kind']) for row in wanted
  ]
  for one, other in zip(found, wanted, strict=True):
    for key in one.keys() & {'loss', 'clean_accuracy', 'robust_accuracy'}:
      assert one[key] == pytest.approx(other[key], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  'count, devices, fsdp, meet', [(1, 8, 4, None), (2, 2, 2, 'slurm'), (4, 1, 1, 'jax')]
)
def test_any_shape_gives_the_same_run(start, alone, tmp_path, count, devices, fsdp, meet):
  flags = [f'--config.mesh.fsdp={fsdp}', '--config.mesh.shard_from=64']
  if count == 4:  # each compiles for itself
    flags.append(CLEAN)
  statuses, said = start(tmp_path / 'run', count, devices, *flags, meet=meet).end()
  assert statuses == [0] * count, said
  assert_same_run(tmp_path / 'run', alone)
  if count > 1:
    assert said[0].startswith(f'{count} processes on {HOST}\n')
  for other in said[1:]:  # process 0 alone tells of progress
    assert 'step' not in other and 'report' not in other


@pytest.mark.slow
def test_all_find_the_same_hinge(start, tmp_path):
  flags = ('--config.attack.eps_start=auto', '--config.attack.eps_full=20/24', CLEAN)
  flags += ('--config.train.steps=24', '--config.train.eval_every=12')
  found = []
  for count in (1, 2):
    statuses, said = start(tmp_path / str(count), count, 1, *flags).end()
    assert statuses == [0] * count, said
    found.append(json.loads((tmp_path / str(count) / 'report.json').read_text())['hinges'])
  assert found[0] == found[1] and found[0]['auto']['found']
  assert_same_run(tmp_path / '2', tmp_path / '1')


@pytest.mark.slow
def test_sigterm_to_one_stops_all_and_one_alone_goes_on(start, alone, tmp_path):
  run = tmp_path / 'run'
  pod = start(run, 2, 1, CLEAN)
  pod.until('step 2/6')
  pod.processes[1].send_signal(signal.SIGTERM)
  statuses, said = pod.end()
  assert statuses == [75, 75], said
  assert 'SIGTERM: saved step ' in said[0].splitlines()[-1]
  assert 'Traceback' not in ''.join(said)
  assert not (run / 'last').exists()
  statuses, said = start(run, 1, 2, CLEAN).end()  # on another shape
  assert statuses == [0]
  assert 'resuming at step ' in said[0]
  assert_same_run(run, alone)


@pytest.mark.slow
def test_the_loss_of_one_ends_the_other_and_the_same_command_goes_on(start, alone, tmp_path):
  """As a launcher does: again after any death by a signal, to the end."""
  run = tmp_path / 'run'
  # What JAX says of process 1 has its number; process 0 is its coordinator.
  losses = (
    (1, signal.SIGKILL, 'heartbeats):\n1\n'),
    (0, signal.SIGSTOP, 'coordination.CoordinationService/Heartbeat'),
  )
  for victim, how, words in losses:
    # So often that at step 4 an earlier checkpoint is whole.
    pod = start(run, 2, 1, CLEAN, '--config.train.checkpoint_every=1')
    pod.until('step 4/', 'resuming at')
    status, said, seconds = pod.lose(victim, how)
    assert status == -signal.SIGABRT, said
    assert words in said
    assert seconds < 10 + 10
    assert not (run / 'report.md').exists()
  statuses, said = start(run, 2, 1, CLEAN).end()
  assert statuses == [0, 0], said
  assert 'resuming at step ' in said[0]
  assert_same_run(run, alone)


def test_different_configs_stop_all_by_the_field(start, tmp_path):
  own = {1: ('--config.train.batch_size=32',)}
  statuses, said = start(tmp_path / 'run', 2, 1, own=own).end()
  assert statuses == [2, 2], said
  for one in said:
    assert one.splitlines()[-1] == (
      f'error: process 1 ({HOST}) has another command or version: '
      f'train.batch_size 32, process 0 ({HOST}) has 16; start all with the same'
    )
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_published_base_is_kept_once_for_all(start, tmp_path):
  golden = fake_checkpoint.read('vit-timm-plain')
  folder = tmp_path / 'checkpoint'
  folder.mkdir()
  arrays = fake_checkpoint.weights(golden['shapes'])
  save_file(arrays, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(golden['config']))
  model = {'width': 24, 'depth': 2, 'num_heads': 3, 'mlp_dim': 96}
  model |= {'patch_size': 4, 'pool': 'token'}
  run = tmp_path / 'run'
  statuses, said = start(
    run,
    *(2, 1),
    f'--config.base.source={folder}',
    *(f'--config.model.{name}={value}' for name, value in model.items()),
    '--config.data.image_size=16',
    '--config.train.steps=1',
    '--config.attack.steps=1',
    '--config.eval.validation_attack=clean',
    '--config.eval.attacks=("clean",)',
  ).end()
  assert statuses == [0, 0], said
  assert (run / 'base' / 'load.md').exists()
  metadata = artefact.read_metadata(run / 'best')
  assert metadata['base_source']['layout']
  assert (run / 'report.md').exists()


@pytest.mark.slow
def test_a_head_is_probed_by_all_as_by_one(start, tmp_path):
  probe = ('--config.head.start=adversarial_probe', '--config.adapter.head=frozen', CLEAN)
  probe += ('--config.head.train.steps=2', '--config.head.train.batch_size=16')
  for workdir, count in (('alone', 1), ('two', 2)):
    statuses, said = start(tmp_path / workdir, count, 1, *probe).end()
    assert statuses == [0] * count, said
  one, two = (artefact.read_artefact(tmp_path / w / 'last') for w in ('alone', 'two'))
  head = artefact.read_artefact(tmp_path / 'two' / 'head' / 'best')[0]['params']['head']
  assert one[1]['base_fingerprint'] == two[1]['base_fingerprint']
  for name, leaf in head.items():
    np.testing.assert_array_equal(two[0]['params']['head'][name], leaf)
    np.testing.assert_allclose(one[0]['params']['head'][name], leaf, atol=3e-6)
  for workdir in ('alone', 'two'):
    report = json.loads((tmp_path / workdir / 'report.json').read_text())
    assert report['passes'] == (2 + 6) * 16 * 3
