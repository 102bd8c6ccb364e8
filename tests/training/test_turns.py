"""Training for several threats, one of them a batch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import ALGORITHM, ATTACK, BATCH, FROZEN, ROOT_KEY, TRAINABLE, assert_same, copy

from fulllora_jax import config as config_lib
from fulllora_jax.adapters import artefact
from fulllora_jax.attacks import Threat
from fulllora_jax.core.errors import UserError
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.finished_run import FinishedRun
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.training import checkpoints as checkpoints_lib
from fulllora_jax.training import checks, objectives, turns
from fulllora_jax.training import run as run_lib
from fulllora_jax.training import state as state_lib
from fulllora_jax.training.hinges import Hinges
from fulllora_jax.training.metrics import read_metrics
from fulllora_jax.training.train_step import compile_train_step

THREATS = (Threat('linf', 0.1), Threat('l2', 0.8), Threat('l1', 4.0))
UNION = dataclasses.replace(ATTACK, several=turns.OneOf(THREATS))
TEXT = 'linf:0.1,l2:0.5,l1:2'


def make_step(devices=1, seen=(), **changed):
  """Returns the state before the first step, the frozen leaves, the batch and the step."""
  algorithm = dataclasses.replace(ALGORITHM, **{'attack': UNION, **changed})
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  seen = jnp.asarray(seen, jnp.float32) if len(seen) else None
  state = state_lib.create(TRAINABLE, algorithm.tx, seen=seen)
  state, frozen = mesh_lib.replicate((state, FROZEN), mesh)
  return state, frozen, mesh_lib.put_batch(BATCH, mesh), compile_train_step(algorithm, mesh)


def run(steps, **options):
  state, frozen, batch, step_fn = make_step(**options)
  history = []
  for _ in range(steps):
    state, metrics = step_fn(state, frozen, batch, ROOT_KEY)
    history.append(copy(metrics))
  return copy(state), history, step_fn


def only(place):
  """What was seen, with which the threat at a place is drawn for certain."""
  return [[1.0 - (i == place), 1.0] for i in range(3)]


@pytest.mark.parametrize('place', range(3))
@pytest.mark.parametrize('start', ['uniform', 'near', 'x'])
def test_a_batch_is_attacked_as_in_a_training_for_its_threat_alone(place, start):
  begin = {'uniform': ATTACK.start, 'near': objectives._near, 'x': None}[start]
  several = dataclasses.replace(UNION, start=begin, hinges=Hinges(0.0, 0.4))
  size = ATTACK.step_size * THREATS[place].eps / THREATS[0].eps
  alone = dataclasses.replace(several, several=None, threat=THREATS[place], step_size=size)
  _, (metrics,), _ = run(1, seen=only(place), attack=several)
  _, (expected,), _ = run(1, attack=alone)
  for name in expected:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
  assert metrics['robust_loss'] > metrics['clean_loss']


def test_what_was_seen_is_a_fading_sum_and_draws_the_next():
  state, history, step_fn = run(40, seen=np.zeros((3, 2)))
  assert step_fn._cache_size() == 1
  seen, drawn = np.zeros((3, 2)), []
  for step, metrics in enumerate(history):
    key = jax.random.fold_in(jax.random.fold_in(ROOT_KEY, step), 5)
    error = 1 - seen[:, 0] / np.maximum(seen[:, 1], 1e-9)
    drawn.append(int(jax.random.categorical(key, np.log(np.float32(error / error.sum())))))
    seen[drawn[-1]] = 0.99 * seen[drawn[-1]] + [metrics['robust_accuracy'], 1]
    found = [metrics[f'robust_accuracy_{threat.norm}'] for threat in THREATS]
    with np.errstate(invalid='ignore'):
      np.testing.assert_allclose(found, seen[:, 0] / seen[:, 1], rtol=1e-4)
  assert set(drawn) == {0, 1, 2}
  np.testing.assert_allclose(state.seen, seen, rtol=1e-4)


def test_threats_are_drawn_by_the_share_that_does_not_withstand_them():
  odds = turns.odds(jnp.array([[9.0, 10.0], [8.0, 10.0], [0.0, 0.0]]))
  np.testing.assert_allclose(odds, [0.1 / 1.3, 0.2 / 1.3, 1 / 1.3], rtol=1e-5)
  np.testing.assert_allclose(turns.odds(jnp.ones((3, 2))), [1 / 3] * 3, rtol=1e-6)


def test_devices_and_a_resumed_run_change_nothing(tmp_path):
  whole, history, _ = run(6, seen=np.zeros((3, 2)))
  sharded, other, _ = run(6, seen=np.zeros((3, 2)), devices=4, accumulate=2)
  for a, b in zip(history, other, strict=True):
    np.testing.assert_allclose(a['robust_accuracy'], b['robust_accuracy'], atol=1e-6)
  np.testing.assert_allclose(whole.seen, sharded.seen, atol=1e-5)
  state, frozen, batch, step_fn = make_step(seen=np.zeros((3, 2)))
  for _ in range(3):
    state, _ = step_fn(state, frozen, batch, ROOT_KEY)
  checkpoints = checkpoints_lib.TrainingCheckpoints(tmp_path, keep=1)
  checkpoints.save(state, {})
  checkpoints.close()
  like, *_ = make_step(seen=np.zeros((3, 2)))
  state, _ = checkpoints_lib.TrainingCheckpoints(tmp_path, keep=1).restore(like)
  for _ in range(3):
    state, _ = step_fn(state, frozen, batch, ROOT_KEY)
  assert_same(copy(state), whole)


def test_a_step_that_is_taken_back_has_seen_nothing():
  bad = jax.tree.map(lambda leaf: leaf * jnp.nan, TRAINABLE)
  state, frozen, batch, step_fn = make_step(seen=np.ones((3, 2)))
  state = state._replace(trainable=mesh_lib.replicate(bad, mesh_lib.make_mesh(jax.devices()[:1])))
  after, metrics = step_fn(state, frozen, batch, ROOT_KEY)
  assert metrics['nonfinite'].any()
  np.testing.assert_array_equal(after.seen, np.ones((3, 2)))


def test_a_whole_run_says_what_it_trained_for(one_device, small_config, tmp_path, digits):
  small_config.threat.union = TEXT
  small_config.train.update(steps=6, eval_every=3, log_every=1)
  small_config.attack.eps_full = '0.5'
  result = run_lib.train_and_evaluate(small_config, tmp_path, digits)
  rows = read_metrics(tmp_path / 'metrics.jsonl')
  train = [row for row in rows if row['kind'] == 'train']
  assert all(f'robust_accuracy_{norm}' in row for row in train for norm in ('linf', 'l2', 'l1'))
  checked = [row for row in rows if row['kind'] == 'validation']
  best = max(checked, key=lambda row: row['robust_accuracy'])
  # `best` is chosen by the images that withstand all, evaluated anew from what was published.
  metadata = artefact.read_metadata(tmp_path / 'best')
  assert metadata['validation']['score'] == best['robust_accuracy']
  assert metadata['validation']['attack'] == 'pgd-2, the worst of linf, l2, l1'
  assert metadata['threat']['union'] == TEXT and metadata['threat']['norm'] == 'linf'
  finished, each = FinishedRun(small_config, tmp_path, digits), {}
  for norm, eps, size in (('linf', '0.1', 0.02), ('l2', '0.5', 0.1), ('l1', '2', 0.4)):
    plan = dataclasses.replace(Plan.of(small_config), norm=norm, eps=eps, step_size=str(size))
    evaluator = Evaluator(finished.apply, plan, finished.mesh)
    _, variables = finished.variables('best')
    each[norm] = evaluator.evaluate(variables, digits.validation, plan.attack('pgd-2'), 32).robust
    np.testing.assert_allclose(best[f'robust_accuracy_{norm}'], each[norm].mean())
  assert best['robust_accuracy'] == np.all(list(each.values()), axis=0).mean()
  assert best['robust_accuracy'] <= min(best[f'robust_accuracy_{norm}'] for norm in each)
  said = f'linf, eps 0.1, pixels in [0, 1]; trained for the union {TEXT}, one threat a batch, whose'
  assert said in (tmp_path / 'report.md').read_text()
  assert said in (tmp_path / 'report.html').read_text()
  assert result['config']['threat']['union'] == TEXT
  assert json.loads((tmp_path / 'base' / 'config.json').read_text())['threat']['union'] == ''


def changed(**fields):
  config = config_lib.default()
  config.threat.union = 'linf:8/255,l2:0.5,l1:12'
  config.eval.attacks = ('clean', 'pgd-20')
  config.update_from_flattened_dict({name.replace('__', '.'): v for name, v in fields.items()})
  return config


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'threat__union': 'l2:0.5, linf:0.03137254901960784'},
    {'threat__norm': 'l1', 'threat__eps': '12', 'attack__step_size': '3', 'eval__step_size': '3'},
    {'objective__name': 'trades', 'awp__gamma': 0.005, 'objective__beta': 3.0},
    {'attack__eps_full': '0.5', 'attack__eps_start': 'auto', 'attack__ard': 0.25},
    {'attack__restarts': 2, 'attack__on_overfitting': 'strengthen', 'ema__decay': 0.99},
  ],
)
def test_a_union_goes_with_what_one_threat_does(fields):
  checks.validate(changed(**fields), 1)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'threat__union': 'linf:8/255'}, 'threat.union linf:8/255: that is one threat'),
    ({'threat__union': 'linf:8/255,l2'}, "threat.union .*: 'l2' is no norm and radius"),
    ({'threat__union': 'linf:8/255,l3:1'}, "threat.union: unknown 'l3'; known: linf, l2, l1"),
    ({'threat__union': 'linf:8/255,linf:4/255'}, 'threat.union .*: linf stands there twice'),
    ({'threat__union': 'linf:8/255,l2:0'}, 'threat.union .*: l2:0 leaves nothing to attack'),
    (
      {'threat__union': 'linf:4/255,l2:0.5'},
      'threat.norm linf, threat.eps 8/255, in which evaluations attack, is none of them; make',
    ),
    ({'attack__carry': True}, 'one of several balls by PGD, but attack.carry is True; give'),
    ({'attack__name': 'n_fgsm'}, 'by PGD, but attack.name is n_fgsm; give attack.name pgd, or'),
    ({'method': 'standard'}, 'trains without an adversary, but threat.union is linf'),
    ({'eval__validation_attack': 'cw_linf'}, 'cw_linf needs threat.norm linf, but it is l2'),
  ],
)
def test_what_does_not_go_with_a_union_is_one_line(fields, message):
  with pytest.raises(UserError, match=message) as raised:
    checks.validate(changed(**fields), 1)
  assert '\n' not in str(raised.value)
