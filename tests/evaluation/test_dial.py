"""evaluate --dial: an adapter at several strengths, each attacked itself."""

import json

import jax
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, ensemble
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.evaluation import dial, measurements
from fulllora_jax.evaluation.finished_run import FinishedRun
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.reports import dial as dial_report
from fulllora_jax.serving import classifier
from fulllora_jax.training import checks
from fulllora_jax.training import run as run_lib

COUNT = 24


@pytest.fixture
def short(monkeypatch):
  """AutoAttack of two short attacks."""
  members = (ensemble.Member('apgd-ce', steps=3), ensemble.member('square-20'))
  monkeypatch.setitem(ensemble.VERSIONS, 'standard', members)


def right(logits_fn, x, labels):
  return np.asarray(logits_fn(x)).argmax(axis=1) == labels


def test_every_point_is_the_model_at_that_strength(
  evaluate, finished_copy, small_config, digits, short, capsys
):
  args = (f'--workdir={finished_copy}', f'--num_examples={COUNT}', '--attack=clean,autoattack')
  result = evaluate(*args, '--dial=1,0,1/2', '--weights=base,best')
  (found,) = result['dials']
  assert (found['weights'], found['attack'], found['num_examples']) == ('best', 'autoattack', COUNT)
  assert (found['norm'], found['eps']) == ('linf', '0.1')
  assert [point['strength'] for point in found['points']] == [0, 0.5, 1]
  measured = {(e['weights'], e['attack']): e for e in result['evaluations']}
  for place, weights in ((0, 'base'), (2, 'best')):  # which are attacked once
    for name, attack in (('clean', 'clean'), ('robust', 'autoattack')):
      record = measured[weights, attack]
      assert found['points'][place][name]['num_correct'] == record['num_correct']
  # In between, what is served at that strength classifies the saved images as the record says.
  many = classifier.load({'own': finished_copy})
  middle = found['points'][1]
  with np.load(finished_copy / 'evaluations' / middle['verified']['file']) as saved:
    x_adv, indices, robust = saved['x_adv'], saved['indices'], saved['robust']
  x, labels = digits.test.fetch(indices).astype(np.float32) / 255, digits.test.labels[indices]
  at_half = jax.jit(many.logits_fn('own', 0.5))
  assert '-best@0.5-autoattack-' in middle['verified']['file']
  finished = FinishedRun(small_config, finished_copy, digits)
  _, variables = finished.variables('best@0.5')
  np.testing.assert_allclose(
    finished.evaluator.logits(variables, x), at_half(x), rtol=1e-4, atol=1e-5
  )
  clean = right(at_half, x, labels)
  np.testing.assert_array_equal(clean & right(at_half, x_adv, labels), robust)
  assert middle['clean']['num_correct'] == clean.sum()
  assert middle['robust']['num_correct'] == robust.sum()
  assert middle['robust']['interval'] == list(wilson_interval(int(robust.sum()), COUNT))
  assert (middle['verified']['outside'], middle['verified']['mismatches']) == (0, 0)
  assert (Threat('linf', 0.1).distance(x, x_adv) <= 0.1001).all()
  # The attack was on that model: it moves images that an attack on either end moves otherwise.
  for place in (0, 2):
    file = finished_copy / 'evaluations' / found['points'][place]['verified']['file']
    with np.load(file) as saved:
      assert np.abs(saved['x_adv'] - x_adv).max() > 0.01
  said = capsys.readouterr().err
  assert 'best  strength 0.5: clean ' in said
  assert '\nThe dial: from the base to the adapter: ' in said  # the picture
  name = next(finished_copy.glob('evaluations/*-dial.svg'))
  assert 'strength' in name.read_text()


def test_a_finished_run_gets_it_killed_once_on_the_way(
  finished_copy, small_config, digits, one_device, short, monkeypatch
):
  before = json.loads((finished_copy / 'report.json').read_text())
  small_config.eval.dial = '0,0.5'
  small_config.eval.num_examples = before['config']['eval']['num_examples']
  calls, apply = [], ensemble.Member.find

  def dies(self, *args):
    calls.append(self.name)
    if self.name == 'square' and calls.count('square') == 2:
      raise KeyboardInterrupt
    return apply(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(ensemble.Member, 'find', dies)
    with pytest.raises(KeyboardInterrupt):
      run_lib.train_and_evaluate(small_config, finished_copy, digits)
  assert list((finished_copy / 'evaluations' / 'progress').iterdir())
  result = run_lib.train_and_evaluate(small_config, finished_copy, digits)
  assert [each['weights'] for each in result['dials']] == ['best', 'last']
  assert result['evaluations'] == before['evaluations']
  assert not measurements.lacking(small_config, result)
  text, page = ((finished_copy / f'report.{kind}').read_text() for kind in ('md', 'html'))
  assert '### The dial: from the base to the adapter. best, 2 strengths: autoattack, linf' in text
  assert '| strength | clean | robust |' in text and 'dial.svg' in text
  assert 'The dial: from the base to the adapter' in page and 'so 0 is the base' in page
  assert (finished_copy / 'dial.svg').exists()
  small_config.eval.dial = '0,0.25'
  assert measurements.lacking(small_config, result)


def test_where_the_base_has_no_head_the_trained_one_stays(
  finished, small_config, digits, one_device, monkeypatch
):
  run = FinishedRun(small_config, finished.workdir, digits)
  monkeypatch.setattr(run, 'weights', lambda: ('best', 'last'))
  name = run.at_strength('best', 0)
  leaves = trees.named_leaves(run.variables(name)[1])
  for path, leaf in trees.named_leaves(run.load('best').adapter).items():
    expected = np.zeros_like(leaf) if path.endswith('lora_b') else leaf
    np.testing.assert_array_equal(leaves[path], expected, err_msg=path)
  share = {'accuracy': 0.5, 'interval': [0.4, 0.6], 'num_correct': 1}
  verified = {'outside': 0, 'mismatches': 0}
  point = {'strength': 0.0, 'clean': share, 'robust': share, 'verified': verified}
  found = {'weights': 'best', 'attack': 'autoattack', 'norm': 'linf', 'eps': '0.1', 'split': 'test'}
  found |= {'num_examples': 2, 'base_head': False, 'points': [point]}
  (part,) = dial_report.parts({'dials': [found]})
  assert 'the trained head stays, for the base has none' in part.remarks[0]
  assert part.table[1][0] == '0' and 'so 0 is the base' not in part.remarks[0]


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('0,1.5', 'dial 1.5: it must be in 0..1'),
    ('-0.5,1', 'dial -0.5: it must be in 0..1'),
    ('0,half', "dial: cannot read 'half'; write e.g."),
    ('0,,1', "dial: cannot read ''"),
  ],
)
def test_what_is_no_strength_is_refused(evaluate, finished, text, match, tmp_path):
  with pytest.raises(UserError, match=match):
    evaluate(f'--workdir={finished.workdir}', '--attack=clean', f'--dial={text}')


def test_a_ball_of_no_size_leaves_nothing_to_attack():
  with pytest.raises(UserError, match='dial 0,1: threat.eps 0 leaves nothing to attack'):
    dial.asked(Plan(eps='0', dial='0,1'))


def test_a_function_has_no_branches(evaluate, tmp_path):
  logits = ('--logits=linear_digits:logits', '--data=digits', '--image_size=8')
  with pytest.raises(UserError, match='dial: a function has no branches to scale; leave --dial'):
    evaluate(*logits, f'--workdir={tmp_path}', '--attack=clean', '--dial=0,1')


@pytest.mark.parametrize(
  ('method', 'why'),
  [
    ('full', 'method full has no branches to scale'),
    ('linear', 'method linear has no branches to scale'),
    ('vpt', 'prompts change the base, whatever their numbers'),
  ],
)
def test_a_training_whose_adapter_has_no_strength_is_refused_at_once(small_config, method, why):
  small_config.method, small_config.eval.dial = method, '0,1'
  with pytest.raises(UserError, match=f"eval.dial 0,1: {why}; give eval.dial ''"):
    checks.validate(small_config, 1)
