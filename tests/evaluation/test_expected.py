"""Expected robustness: against linear models, whose every radius is known."""

import json

import jax
import numpy as np
import pytest

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.core.errors import UserError
from fulllora_jax.core.statistics import wilson_interval
from fulllora_jax.distributed import mesh
from fulllora_jax.evaluation import checks, eps_sweep, expected, measurements
from fulllora_jax.evaluation.eps_sweep import Climb
from fulllora_jax.evaluation.evaluations import Evaluations
from fulllora_jax.evaluation.kept import Kept
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.reports import report as report_lib
from fulllora_jax.reports import results
from fulllora_jax.training import run as run_lib

COUNT = 60
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=48).astype(np.float32)
IMAGES = RNG.integers(90, 166, (COUNT, 4, 4, 3), np.uint8)  # far from the box
SIGNED = (IMAGES.reshape(COUNT, -1) / 255 - 0.5) @ WEIGHTS.astype(float)
LABELS = ((SIGNED > 0) ^ (np.arange(COUNT) % 10 == 0)).astype(np.int32)  # each tenth is wrong


def apply(variables, images):
  gap = (images.reshape(len(images), -1) - 0.5) @ variables
  return jax.numpy.stack([0 * gap, gap], axis=1)


class Linear(Evaluations):
  """The linear model, whose every radius is |w.x + b| / ||w||_q."""

  def __init__(self, plan, folder):
    splits = [data.Split('test', LABELS, IMAGES.__getitem__)] * 3
    dataset = data.Dataset('made', (4, 4, 3), ('a', 'b'), *splits)
    config = config_lib.default()
    super().__init__(config, dataset, apply, plan, folder=folder, name='001')

  def variables(self, weights):
    return (weights,), mesh.replicate(WEIGHTS, self.mesh)


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize(
  ('norm', 'eps', 'radii'),
  [
    ('linf', '8/255', [1, 2, 3, 4, 5, 6, 7, 8]),
    ('linf', '3.25/255', [1, 2, 3, 3.25]),
    ('linf', '0.01', [1, 2, 2.55]),
    ('linf', '0.5/255', [0.5]),
    ('l2', '0.2', [0.2 * 255 * number / 8 for number in range(1, 9)]),
  ],
)
def test_it_is_that_of_the_exact_radii_of_a_linear_model(tmp_path, norm, eps, radii):
  points = np.array([0.0, *radii]) / 255
  plan = Plan(norm=norm, eps=eps, step_size=str(points[-1] / 4), expected='pgd-40', batch_size=32)
  record = expected.measure(Linear(plan, tmp_path), 'model', 'test')[0]
  own = np.abs(SIGNED) / np.linalg.norm(WEIGHTS, 1 if norm == 'linf' else 2)
  own = np.where((SIGNED > 0) == LABELS, own, -1.0)  # of what is wrong without an attack
  right = (own[:, None] > points).mean(axis=0)
  assert [point['accuracy'] for point in record['curve']] == right.tolist()
  np.testing.assert_allclose([p['eps_value'] for p in record['curve']], points)
  assert record['value'] == pytest.approx(np.trapezoid(right, points) / points[-1])
  exact = np.clip(own / points[-1], 0, 1).mean()  # without steps
  assert abs(record['value'] - exact) <= np.diff(points).max() / points[-1] / 2
  assert 0 < record['value'] < 0.9 or len(radii) == 1
  assert record['step'] == ('1/255' if norm == 'linf' else 'eps/8')
  assert (record['num_examples'], record['attack'], record['steps']) == (COUNT, 'pgd', 40)


def test_the_radii_are_written_as_they_are_meant():
  assert list(expected.radii(Plan(eps='2.5/255')).values()) == ['1/255', '2/255', '2.5/255']
  assert list(expected.radii(Plan(eps=str(8 / 255))).values())[-2:] == ['7/255', str(8 / 255)]
  l2 = expected.radii(Plan(norm='l2', eps='0.5'))
  assert list(l2.items())[0] == (0.125, '0.0625') and list(l2.items())[-1] == (1.0, '0.5')


def test_each_image_gives_its_own_area():
  climb = Climb(np.array([0.4, 0.8, 1.0]), np.array([-1, 0, 1, 2, 3]), *np.zeros((3, 5)))
  assert expected.areas(climb).tolist() == pytest.approx([0, 0.2, 0.6, 0.9, 1])


def test_the_interval_of_shares_covers_more_than_it_says():
  rng = np.random.default_rng(1)
  drawn = rng.choice([0, 0.1, 0.5, 0.9, 1], (4000, 50), p=[0.35, 0.1, 0.1, 0.1, 0.35])
  ends = np.array([wilson_interval(total, 50) for total in drawn.sum(axis=1)])
  covered = ((ends[:, 0] <= 0.5) & (ends[:, 1] >= 0.5)).mean()
  assert 0.95 <= covered < 1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'expected': 'autoattack'}, 'eval.expected autoattack: it attacks at many radii; give fgsm'),
    ({'expected': 'clean'}, 'eval.expected clean: it attacks at many radii'),
    ({'expected': 'best'}, "unknown attack 'best'"),
    ({'eps': '0'}, 'eval.expected pgd-20: threat.eps 0 leaves nothing to attack'),
    ({'attacks': ('autoattack-rand',)}, 'it cannot be measured with autoattack-rand; leave'),
  ],
)
def test_what_cannot_be_measured_is_one_line(changes, message):
  with pytest.raises(UserError, match=message):
    checks.validate_plan(Plan(**{'expected': 'pgd-20'} | changes))


def test_the_base_of_a_run_is_trained_without_it(small_config):
  small_config.eval.expected = 'pgd-20'
  assert config_lib.base_config(small_config).eval.expected == ''


LINEAR = ('--logits=linear_digits:logits', '--data=digits', '--image_size=8', '--num_examples=40')
ASKED = (*LINEAR, '--attack=clean,pgd-3', '--eps=4.5/255', '--expected=pgd-3')


@pytest.fixture
def attacked(monkeypatch):
  """Which radii are attacked; after `left` of them it is interrupted."""
  outcome = eps_sweep.EpsSweep.outcome

  class Attacked(list):
    left = -1

  found = Attacked()

  def counted(sweep, variables, chosen, factor):
    if len(found) == found.left:
      raise KeyboardInterrupt
    found.append(round(4.5 * float(factor), 3))
    return outcome(sweep, variables, chosen, factor)

  monkeypatch.setattr(eps_sweep.EpsSweep, 'outcome', counted)
  return found


def test_the_command_measures_it_and_a_killed_one_goes_on(evaluate, attacked, tmp_path, capsys):
  whole = evaluate(*ASKED, f'--workdir={tmp_path}/whole')
  assert attacked == [1, 2, 3, 4, 4.5]
  [found] = whole['expected']
  assert [point['eps'] for point in found['curve']] == [
    '0', '1/255', '2/255', '3/255', '4/255', '4.5/255',
  ]  # fmt: skip
  clean, at_eps = whole['evaluations']
  assert found['curve'][0]['num_correct'] == clean['num_correct']
  assert found['curve'][-1]['num_correct'] <= at_eps['num_correct']
  shown = f'{100 * found["value"]:.1f} ['
  said = capsys.readouterr().err
  assert any(line.startswith(f'expected robustness, pgd-3  {shown}') for line in said.splitlines())
  assert 'Expected robustness is the mean accuracy over eps from 0 to 4.5/255' in said
  attacked.clear()
  attacked.left = 3
  with pytest.raises(KeyboardInterrupt):
    evaluate(*ASKED, f'--workdir={tmp_path}/killed')
  [kept] = (tmp_path / 'killed').rglob('state.npz')
  attacked.clear()
  attacked.left = -1
  assert evaluate(*ASKED, f'--workdir={tmp_path}/killed')['expected'] == whole['expected']
  assert attacked == [4, 4.5]
  assert not (tmp_path / 'killed' / 'evaluations' / 'progress').exists() and not kept.exists()


def test_what_is_kept_of_another_model_is_not_taken_up(tmp_path):
  climb = Climb(np.array([0.5]), *np.ones((3, 2), int), np.ones(2))
  kept = Kept(tmp_path, np.eye(2, dtype=np.float32), Climb)
  assert kept.read() is None
  kept.write(climb)
  for ours, whole in zip(kept.read(), climb, strict=True):
    np.testing.assert_array_equal(ours, whole)
  assert Kept(tmp_path, 1 - np.eye(2, dtype=np.float32), Climb).read() is None
  (tmp_path / 'state.npz').write_bytes(b'torn')
  assert kept.read() is None


def test_images_whose_logits_are_no_number_are_counted_and_said(evaluate, tmp_path):
  asked = ('--logits=linear_digits:not_a_number', *LINEAR[1:], '--attack=clean', '--eps=1/255')
  result = evaluate(*asked, '--expected=fgsm', f'--workdir={tmp_path}')
  [found] = result['expected']  # all but the first two rows of each batch
  assert found['value'] <= 4 / 40
  assert f'model, {found["notes"][0]}' in results.notes(result)
  assert 'of 40 images have NaN or infinite logits at one of the radii' in found['notes'][0]


def test_several_eps_have_a_row_each_and_with_attacks_alone_there_is_none(evaluate, tmp_path):
  asked = (*LINEAR, '--attack=clean', f'--workdir={tmp_path}')
  result = evaluate(*asked, '--eps=1/255,2/255', '--expected=fgsm')
  assert [row[0] for row in results.table(result)[-2:]] == [
    'expected robustness, fgsm eps 1/255', 'expected robustness, fgsm eps 2/255',
  ]  # fmt: skip
  assert 'expected' not in evaluate(*asked, '--eps=1/255')


@pytest.mark.usefixtures('one_device')
def test_a_finished_run_gets_it_when_it_is_asked_for(finished_copy, small_config, digits):
  before = json.loads((finished_copy / 'report.json').read_text())
  small_config.eval.update(closer_look=False, expected='pgd-2')
  result = run_lib.train_and_evaluate(small_config, finished_copy, digits)
  assert result['evaluations'] == before['evaluations']
  assert result['passes'] == before['passes']
  assert [found['weights'] for found in result['expected']] == ['base', 'best', 'last']
  assert json.loads((finished_copy / 'report.json').read_text())['expected'] == result['expected']
  text = (finished_copy / 'report.md').read_text()
  [row] = [line for line in text.splitlines() if line.startswith('| expected robustness, pgd-2')]
  best = f'{100 * result["expected"][1]["value"]:.1f} ['
  assert row.split('|')[3].strip().startswith(best)
  assert '- Expected robustness is the mean accuracy over eps from 0 to 0.1 (trapezoid' in text
  page = (finished_copy / 'report.html').read_text()
  assert '<dt>Expected robustness</dt>' in page and '25/255' in page
  assert (finished_copy / 'examples.svg').exists()
  # Once it is there, it is not measured again.
  assert not measurements.lacking(small_config, result)
  report_lib.write_numbers(finished_copy, result | {'seed': 'kept'})
  assert run_lib.train_and_evaluate(small_config, finished_copy, digits)['seed'] == 'kept'
