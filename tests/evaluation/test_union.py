"""evaluate --union: what withstands each threat, and all of them."""

import json

import linear_oracle
import numpy as np
import pytest

from fulllora_jax.attacks import ensemble
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.evaluation import measurements, union
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.training import run as run_lib

EPS = {'linf': '0.035', 'l2': '0.15', 'l1': '0.4'}
TEXT = ', '.join(f'{norm}:{eps}' for norm, eps in EPS.items())
COUNT = 40
ALWAYS = (f'--num_examples={COUNT}',)


def withstands(folder, digits, indices):
  """Returns for each norm, from the exact distances, which of these test images do, bool [n]."""
  weights = np.load(folder / 'weights.npy')
  x = digits.test.fetch(indices).astype(np.float32) / 255
  model = linear_oracle.Linear(weights, weights.sum(axis=0, dtype=float) / 2, x[..., :1])
  right = model.labels == digits.test.labels[indices]
  distances = {norm: model.distances(norm) for norm in EPS}
  for norm, eps in EPS.items():  # no verdict hangs on rounding
    assert np.abs(distances[norm] / float(eps) - 1).min() > 1e-3
  return {norm: right & (distances[norm] > float(eps)) for norm, eps in EPS.items()}


def test_every_share_is_the_exact_one(linear, linear_digits, digits, tmp_path, capsys):
  result = linear('--attack=clean', f'--union={TEXT}')
  (found,) = result['unions']
  with np.load(tmp_path / 'run' / 'evaluations' / found['threats'][0]['verified']['file']) as saved:
    exact = withstands(linear_digits, digits, saved['indices'])
  whole = np.all(list(exact.values()), axis=0)
  assert 0 < whole.sum() < min(each.sum() for each in exact.values())  # no ball holds the others
  assert (found['num_correct'], found['num_examples']) == (whole.sum(), COUNT)
  assert found['accuracy'] == whole.mean()
  assert found['interval'] == list(wilson_interval(int(whole.sum()), COUNT))
  assert (found['weights'], found['split'], found['attack']) == ('model', 'test', 'autoattack')
  for threat, (norm, each) in zip(found['threats'], exact.items(), strict=True):
    others = [mask for name, mask in exact.items() if name != norm]
    assert (threat['norm'], threat['eps']) == (norm, EPS[norm])
    assert threat['num_correct'] == each.sum()
    assert threat['broken_alone'] == (~each & np.all(others, axis=0)).sum()
    assert (threat['verified']['outside'], threat['verified']['mismatches']) == (0, 0)
  assert result['threat']['norm'] == 'linf' and len(result['evaluations']) == 1
  said = capsys.readouterr().err
  assert 'withstand all\n' in said and f'  l1, eps {EPS["l1"]}' in said


def test_a_threat_that_was_measured_is_not_attacked_again(linear, capsys):
  args = ('--attack=autoattack', '--eps=0.02')
  result = linear(*args, '--union=linf:0.02,l2:0.2')
  (measured,) = result['evaluations']
  threat = result['unions'][0]['threats'][0]
  assert threat['num_correct'] == measured['num_correct']
  assert threat['verified'] == measured['verified']
  assert capsys.readouterr().err.count('robust after square') == 2


def test_each_threat_has_the_second_opinions_own_record(linear, tmp_path, monkeypatch):
  few = (ensemble.Member('apgd-ce', steps=2),)
  pma = ensemble.Member('pma', restarts=2, steps=4)
  monkeypatch.setitem(ensemble.VERSIONS, 'standard', few)
  monkeypatch.setitem(ensemble.VERSIONS, 'second', (*few, pma))
  args = ('--attack=autoattack-second', '--eps=0.02', '--num_examples=8')
  (found,) = linear(*args, '--union=l2:0.2,linf:0.02')['unions']
  assert found['attack'] == 'autoattack-second'
  for threat in found['threats']:
    assert '-autoattack-second-' in threat['verified']['file']
    with np.load(tmp_path / 'run' / 'evaluations' / threat['verified']['file']) as saved:
      assert threat['num_correct'] == saved['robust'].sum()
      assert saved['attacks'].tolist() == ['clean', 'apgd-ce', 'pma']


def test_the_second_opinion_is_taken_over():
  plans = union.plans(Plan(attacks=('clean', 'autoattack-second'), union='l2:0.5,l1:12'))
  assert [(p.norm, p.eps, p.attacks) for p in plans] == [
    ('l2', '0.5', ('autoattack-second',)),
    ('l1', '12', ('autoattack-second',)),
  ]


def test_a_finished_run_gets_it(finished_copy, small_config, digits, one_device):
  before = json.loads((finished_copy / 'report.json').read_text())
  small_config.eval.union = 'linf:0.05,l2:0.2'
  small_config.eval.num_examples = before['config']['eval']['num_examples']
  result = run_lib.train_and_evaluate(small_config, finished_copy, digits)
  assert result['evaluations'] == before['evaluations']
  assert [found['weights'] for found in result['unions']] == ['base', 'best', 'last']
  text, page = ((finished_copy / f'report.{kind}').read_text() for kind in ('md', 'html'))
  assert '### The union of several threats (autoattack, worst case), best: ' in text
  assert '| l2, eps 0.2 |' in text and 'images withstand all' in page
  assert not measurements.lacking(small_config, result)
  small_config.eval.union = 'linf:0.05,l2:0.3'
  assert measurements.lacking(small_config, result)


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('linf:0.1,linf:0.2', 'union linf:0.1,linf:0.2: linf stands there twice; its larger ball'),
    ('linf:0.1', 'that is one threat; give two or more, or --norm and --eps'),
    ('linf:0.1,l2', "'l2' is no norm and radius; write linf:8/255,l2:0.5"),
    ('linf:0.1,', "'' is no norm and radius"),
    ('linf:0.1,l3:1', "union: unknown 'l3'; known: linf, l2, l1"),
    ('linf:0.1,l2:x', "cannot read 'x'"),
    ('linf:0.1,l2:0', 'l2:0 leaves nothing to attack'),
    ('linf:0.1,l2:-1', 'threat.eps: -1 is negative'),
    ('linf:8,l2:1', 'did you mean 8/255'),
  ],
)
def test_what_is_no_union_is_refused(linear, text, match, tmp_path):
  with pytest.raises(UserError, match=match):
    linear('--attack=clean', f'--union={text}')
  assert not list((tmp_path / 'run').glob('evaluations/*.json'))


def test_noise_is_refused():
  with pytest.raises(UserError, match='cannot be measured with autoattack-rand'):
    union.plans(Plan(attacks=('autoattack-rand',), union=TEXT))
