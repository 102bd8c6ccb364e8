"""Certificates and attacks of a smoothed linear model, of which everything is known exactly."""

import json
import re
import shutil
from statistics import NormalDist

import jax
import numpy as np
import pytest

from fulllora_jax import config as config_lib
from fulllora_jax import data
from fulllora_jax.core import files
from fulllora_jax.core.statistics import clopper_pearson
from fulllora_jax.distributed import mesh
from fulllora_jax.evaluation import certificate, checks, measurements
from fulllora_jax.evaluation.certificate import Certifier, State
from fulllora_jax.evaluation.diagnosis import examine, records
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.evaluation.smoothing import Smoothing
from fulllora_jax.reports import results
from fulllora_jax.training import run as run_lib

COUNT, SIGMA = 40, 0.06
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=48).astype(np.float32)
IMAGES = RNG.integers(90, 166, (COUNT, 4, 4, 3), np.uint8)  # far from the box
SIGNED = (IMAGES.reshape(COUNT, -1) / 255 - 0.5) @ WEIGHTS.astype(float)
OWN = np.abs(SIGNED) / np.linalg.norm(WEIGHTS)  # the radius of each image
LABELS = ((SIGNED > 0) ^ (np.arange(COUNT) % 10 == 0)).astype(np.int32)  # each tenth is wrong
RIGHT = (SIGNED > 0) == LABELS
SPLIT = data.Split('test', LABELS, IMAGES.__getitem__)
SHARES = np.array([NormalDist().cdf(own / SIGMA) for own in OWN])  # of the noisy copies


def apply(variables, images):
  gap = (images.reshape(len(images), -1) - 0.5) @ variables
  return jax.numpy.stack([0 * gap, gap], axis=1)


def certifier_of(batch_size=2000, devices=1, function=apply, seed=0, **asked):
  """Returns what certifies the linear model, and its weights."""
  used = mesh.make_mesh(jax.devices()[:devices])
  evaluator = Evaluator(function, Plan(batch_size=batch_size, seed=seed), used)
  smoothing = Smoothing(SIGMA, **{'n0': 100, 'n': 2000} | asked)
  certifier = Certifier(evaluator, SPLIT, np.arange(COUNT), smoothing)
  return certifier, mesh.replicate(WEIGHTS, used)


def counted(**asked):
  """Returns the state and the record before any attack."""
  certifier, variables = certifier_of(**asked)
  state = State.new(COUNT, 2)
  for _ in certifier.run(variables, state, 'model'):
    if state.done[0] == COUNT * (certifier.smoothing.n0 + certifier.smoothing.n):
      return state, certifier.record(state)


@pytest.fixture(scope='module')
def whole():
  """What certifies the linear model, its weights, the finished state, and what was drawn for."""
  certifier, variables = certifier_of()
  count, purposes, state = certifier._count, [], State.new(COUNT, 2)

  def seen(*args, **kwargs):
    purposes.append(args[4])
    return count(*args, **kwargs)

  certifier._count = seen
  for _ in certifier.run(variables, state, 'model'):
    pass
  del certifier._count
  return certifier, variables, state, purposes


@pytest.fixture(scope='module')
def linear(whole):
  certifier, _, state, _ = whole
  return state, certifier.record(state)


def radii(record):
  return np.array([np.nan if i['radius'] is None else i['radius'] for i in record['images']])


def certified(shares, n, alpha=0.001):
  """Returns the radius that a share of n draws would prove."""
  return Smoothing(SIGMA, 1, n, alpha).radii(np.round(shares * n).astype(int))


def test_the_classes_of_noisy_copies_have_their_closed_form(linear):
  state, _ = linear
  taken = state.counts[np.arange(COUNT), 1, (SIGNED > 0).astype(int)]
  spread = np.sqrt(2000 * SHARES * (1 - SHARES)) + 1
  assert (np.abs(taken - 2000 * SHARES) < 4.5 * spread).all()
  assert (np.abs(taken - 2000 * SHARES) / spread).mean() > 0.2  # and they are random
  assert (state.counts.sum(axis=2) == [100, 2000]).all()


def test_the_radius_comes_to_the_distance_of_the_boundary():
  gaps = []
  for n in (500, 8000):
    _, record = counted(n=n)
    found = radii(record)
    sure = ~np.isnan(found)
    assert (found[sure] <= OWN[sure]).all()  # all but one in a thousand
    spread = 4.5 * np.sqrt(SHARES * (1 - SHARES) / n)
    low = np.nan_to_num(certified(np.clip(SHARES - spread, 0, 1), n), nan=0.0)
    steady = SHARES > 0.7  # 100 draws choose the right class
    assert (found[steady] >= low[steady] - 1e-9).all() and steady.sum() > 15
    likely = (OWN > 0.3 * SIGMA) & (OWN < 2 * SIGMA)
    gaps.append(np.nanmean(OWN[likely] - found[likely]))
    assert [i['class'] for i in record['images'] if i['radius'] and i['radius'] > 0.02] == [
      int(SIGNED[i['index']] > 0) for i in record['images'] if i['radius'] and i['radius'] > 0.02
    ]
  assert gaps[1] < 0.006 < 0.01 < gaps[0]


def test_both_bounds_hold_the_exact_accuracy_between_them(linear):
  _, record = linear
  own = np.where(RIGHT, OWN, -1)
  for point in record['curve']:
    exact = (own >= point['radius']).mean()
    assert point['certified'] <= exact <= point.get('attacked', 1)
    assert point['certified'] >= exact - 0.2
  attacked = [p for p in record['curve'] if 'attacked' in p]
  np.testing.assert_allclose([p['radius'] / SIGMA for p in attacked], [0, *certificate.RADII])
  assert attacked[-1]['attacked'] <= 0.1 and attacked[0]['attacked'] >= 0.9
  for low, high, point in zip(
    *np.array([p['attacked_interval'] for p in attacked]).T, attacked, strict=True
  ):
    assert low <= point['attacked'] <= high


def test_the_attack_breaks_what_it_reaches_and_nothing_inside_a_radius(linear):
  state, record = linear
  reached = np.array(certificate.RADII) * SIGMA
  for image, own, right in zip(record['images'], OWN, RIGHT, strict=True):
    if not right:
      assert image['broken_at'] in (0, None) and image['attacks'] in (0, 1)
    elif image['broken_at'] is not None:
      assert own - 1e-6 < image['broken_at'] <= reached[image['attacks'] - 1] * (1 + 1e-5)
      assert image['taken_for'] == 1 - image['label']
      # Of 1,000 draws 8 in a hundred more are enough.
      clear = reached > own + 0.2 * SIGMA
      assert image['attacks'] <= np.argmax(clear) + 1
  assert certificate.chance(record) == ('', False) and record['notes'] == []
  assert (state.first[RIGHT] >= 0).all()


def test_neither_the_batch_nor_the_devices_count(linear):
  state, record = linear
  certifier, variables = certifier_of(batch_size=512, devices=8)
  other = State.new(COUNT, 2)
  for _ in certifier.run(variables, other, 'model'):
    pass
  for ours, theirs in zip(other[:2], state[:2], strict=True):
    np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_allclose(other.distance, state.distance, rtol=1e-5)
  assert certifier.record(other)['curve'] == record['curve']
  another, _ = counted(seed=1, n=200)
  same, _ = counted(n=200)
  assert (another.counts != same.counts).any()
  np.testing.assert_array_equal(same.counts[:, 0], state.counts[:, 0])


def test_the_draws_that_choose_bound_and_judge_are_others(whole):
  state, _ = counted(n0=500, n=500)
  assert (state.counts[:, 0] != state.counts[:, 1]).any()
  certifier, variables, *_, purposes = whole
  assert set(purposes) == {'certify', *(f'judge {n}' for n in range(5))}
  found = np.zeros((2, COUNT, 2, 2), int)
  for number, counts in enumerate(found):
    images = (certifier._images, certifier.chosen, counts)
    list(certifier._count(variables, *images, f'judge {number}', range(100, 600)))
  assert (found[:, :, 1].sum(axis=2) == 500).all() and (found[0] != found[1]).any()
  assert len(certificate.RADII) == 5


def test_each_program_compiles_once(whole):
  certifier, variables, *_ = whole
  for _, _ in zip(
    range(60), certifier.run(2 * variables, State.new(COUNT, 2), 'other'), strict=False
  ):
    pass
  assert certifier._classify._cache_size() == certifier._attack._cache_size() == 1


def test_a_killed_one_goes_on_from_any_place(whole):
  certifier, variables, finished, _ = whole
  state = State.new(COUNT, 2)
  for count in (1, 1, 17, 23, 1, 2, 1, 30):  # in every phase
    for _, _ in zip(range(count), certifier.run(variables, state, 'model'), strict=False):
      pass
    state = State(*(part.copy() for part in state))  # as it is kept
  for ours, other in zip(state, finished, strict=True):
    np.testing.assert_array_equal(ours, other)


def test_copies_whose_logits_are_no_number_count_for_no_class():
  def broken(variables, images):
    return apply(variables, images) + jax.numpy.where(images[:, 0, 0, :1] > 0.6, np.nan, 0)

  state, record = counted(function=broken, n=500)
  share = state.counts[:, 1].sum(axis=1) / 500
  expected = [NormalDist().cdf((0.6 - x) / SIGMA) for x in IMAGES[:, 0, 0, 0] / 255]
  np.testing.assert_allclose(share, expected, atol=0.1)
  assert 'images have noisy copies with NaN or infinite logits' in record['notes'][0]
  lost = share < 0.5
  assert lost.any() and np.isnan(radii(record)[lost]).all()


def faulty(record, count, inside=0.5):
  """Returns the record with as many images broken inside their radius."""
  record = json.loads(json.dumps(record))
  there = [i for i in record['images'] if i['radius'] and i['class'] == i['label']]
  for image in record['images']:
    image['broken_at'] = None
  for image in there[:count]:
    image |= {'broken_at': inside * image['radius'], 'taken_for': 1 - image['label']}
  return {'weights': 'model', 'split': 'test'} | record


def test_the_doctor_believes_a_sound_one_and_not_one_that_an_attack_contradicts(linear):
  _, record = linear
  assert records.certified([faulty(record, 0)]) is None
  assert records.certified([faulty(record, 9, inside=1.0)]) is None  # not strictly inside
  # 1 of some 150 certificates and verdicts happens at alpha 0.001; 9 do not.
  one, nine = (records.certified([faulty(record, count)]) for count in (1, 9))
  assert (one.level, nine.level) == ('note', 'wrong')
  assert 'breaks 9 of 40 images strictly inside their certified radius, more than' in nine.seen
  assert 'verdicts is false with probability 0.001 at most' in nine.seen
  assert 'radius, no more than chance explains' in one.seen
  tried = sum(1 + i['attacks'] for i in record['images'])
  assert clopper_pearson(1, tried, 0.001) < 0.001 < clopper_pearson(9, tried, 0.001)


def test_a_planted_fault_is_found_by_the_attack(monkeypatch, whole):
  """A radius that is twice what the draws prove."""
  honest = Smoothing.radii
  monkeypatch.setattr(Smoothing, 'radii', lambda self, counts: 2 * honest(self, counts))
  certifier, _, state, _ = whole
  record = certifier.record(state)
  assert records.certified([{'weights': 'model'} | record]).level == 'wrong'


LINEAR = ('--logits=linear_digits:logits', '--data=digits', '--image_size=8', '--num_examples=12')
ASKED = (*LINEAR, '--attack=clean', '--eps=0.1', '--batch_size=256')
CERTIFY = '--certify=sigma=0.25,n0=20,n=200'


def test_the_command_certifies_and_a_killed_one_goes_on(evaluate, tmp_path, capsys, monkeypatch):
  whole = evaluate(*ASKED, CERTIFY, f'--workdir={tmp_path}/whole')
  [found] = whole['certificates']
  assert {'weights': 'model', 'sigma': 0.25, 'n0': 20, 'n': 200, 'alpha': 0.001}.items() <= (
    found.items()
  )
  assert len(found['images']) == found['num_examples'] == 12
  said = capsys.readouterr().err
  assert 'model, sigma 0.25: bounds on the L2 robust accuracy of 12 test images' in said
  assert 'it is another model than that of the other tables' in said
  folder = tmp_path / 'whole' / 'evaluations'
  assert f'Certified and attacked: the smoothed model: {folder}/001-certified.svg' in said
  assert 'certified (at least)' in (folder / '001-certified.svg').read_text()
  # Killed in the draws, then in the attack.
  monkeypatch.setattr(certificate, '_KEPT_EVERY', 0.0)
  calls, left, count = [], [6, 20], Certifier._count

  def killed(*args, **kwargs):
    for done in count(*args, **kwargs):
      calls.append(done)
      if left and len(calls) == left[0]:
        left.pop(0), calls.clear()
        raise KeyboardInterrupt
      yield done

  monkeypatch.setattr(Certifier, '_count', killed)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      evaluate(*ASKED, CERTIFY, f'--workdir={tmp_path}/killed')
    [kept] = (tmp_path / 'killed').rglob('state.npz')
  with files.load_arrays(kept) as saved:
    assert saved['done'][0] == 2640 and saved['done'][2] > 0
  assert evaluate(*ASKED, CERTIFY, f'--workdir={tmp_path}/killed')['certificates'] == [found]
  assert not kept.exists()


def test_progress_is_told_with_rate_and_time_left(whole, capsys, monkeypatch):
  certifier, variables, *_ = whole
  monkeypatch.setattr(certificate.Progress, 'due', lambda self: True)
  for _ in certifier.run(variables, State.new(COUNT, 2), 'best'):
    pass
  said = capsys.readouterr().err
  draws = 40 * 2100
  assert re.search(rf'best certificate, draws \d+/{draws}, [\d.]+/s, \d+s left', said)
  assert re.search(r'best attack at 0.5 sigma, \d+/\d+, [\d.]+/s, \d+s left', said)


def test_it_is_measured_once_and_only_where_asked(evaluate, tmp_path):
  swept = evaluate(*ASKED[:-1], '--eps=0.05,0.1', CERTIFY, f'--workdir={tmp_path}')
  assert len(swept['certificates']) == 1
  assert 'certificates' not in evaluate(*ASKED, f'--workdir={tmp_path}')
  table = results.table(swept)
  assert not any('smooth' in str(cell) or 'certif' in str(cell) for row in table for cell in row)


def test_the_doctor_reads_what_was_written(run_here, evaluate, tmp_path, monkeypatch, digits_dir):
  evaluate(*ASKED, CERTIFY, f'--workdir={tmp_path}')
  path = tmp_path / 'evaluations' / '001.json'
  monkeypatch.setattr(examine, 'CHECKS', {})
  ask = ('-m', 'fulllora_jax.doctor', *LINEAR[:3], '--num_examples=8', f'--workdir={tmp_path}')
  ask = (*ask, f'--data_dir={digits_dir}', '--eps=0.1')
  healthy = run_here(*ask)
  assert healthy.returncode == 0 and 'ok     no attack inside a certified' in healthy.stdout
  result = json.loads(path.read_text())
  for image in result['certificates'][0]['images']:
    image |= {'class': image['label'], 'radius': 1.0, 'broken_at': 0.5}
  path.write_text(json.dumps(result))
  sick = run_here(*ask)
  assert sick.returncode == 1 and 'wrong  no attack inside a certified radius' in sick.stdout


@pytest.fixture
def short(monkeypatch):
  """Makes attacks short and their judges few."""
  for name in ('STEPS', 'DRAWS'):
    monkeypatch.setattr(certificate, name, 2)
  monkeypatch.setattr(certificate, 'JUDGE', 10)


@pytest.mark.usefixtures('one_device', 'short')
def test_a_finished_run_gets_it_when_it_is_asked_for(finished_copy, small_config, digits):
  before = json.loads((finished_copy / 'report.json').read_text())
  small_config.eval.update(closer_look=False, certify='sigma=0.1,n0=10,n=20')
  result = run_lib.train_and_evaluate(small_config, finished_copy, digits)
  assert result['evaluations'] == before['evaluations']
  assert [found['weights'] for found in result['certificates']] == ['base', 'best', 'last']
  text, page = ((finished_copy / f'report.{kind}').read_text() for kind in ('md', 'html'))
  assert '| L2 radius | certified (at least) | attacked (at most) |' in text
  assert '![Certified and attacked: the smoothed model](certified.svg)' in text
  assert 'best, smoothed with sigma 0.1 (%)' in (finished_copy / 'certified.svg').read_text()
  assert 'Certified and attacked: the smoothed model' in page and 'another model than' in page
  assert 'smooth' not in results.headline(result)
  # Once it is there, it is not measured again; with another noise it is.
  assert not measurements.lacking(small_config, result)
  small_config.eval.certify = 'sigma=0.2,n0=10,n=20'
  assert measurements.lacking(small_config, result)


@pytest.mark.usefixtures('short')
def test_published_weights_alone_are_certified(evaluate, finished_copy):
  shutil.rmtree(finished_copy / 'last')
  asked = (f'--workdir={finished_copy}', '--attack=clean', '--weights=best', '--num_examples=8')
  [found] = evaluate(*asked, '--batch_size=256', '--certify=sigma=0.1,n0=10,n=60')['certificates']
  assert found['weights'] == 'best' and len(found['images']) == 8


@pytest.mark.parametrize(
  ('asked', 'words'),
  [
    ('sigma=0', 'certify sigma 0: it must be above 0'),
    ('sigma=-0.25', 'certify sigma -0.25: it must be above 0'),
    ('sigma=loud', "certify sigma: cannot read 'loud'"),
    ('n=1000', "certify 'n=1000': say how much noise, as in sigma=0.25"),
    ('sigma=0.25,n=50', 'certify n 50: it must be at least n0, which is 100; give n=100 or more'),
    ('sigma=0.25,n=1000.5', 'certify n 1000.5: it must be a whole number at least 1'),
    ('sigma=0.25,n0=1e2', 'certify n0 1e2: it must be a whole number at least 1'),
    ('sigma=0.25,n0=0', 'certify n0 0: it must be at least 1'),
    ('sigma=0.25,alpha=0', 'certify alpha 0: it must be above 0 and below 1'),
    ('sigma=0.25,alpha=1', 'certify alpha 1: it must be above 0 and below 1'),
    (
      'sigma=0.25,alfa=.1',
      "certify: unknown 'alfa'; known: sigma, n0, n, alpha; did you mean alpha?",
    ),
    ('0.25', "certify '0.25': write each key once, as in sigma=0.25"),
    ('sigma=0.25,sigma=0.5', 'write each key once'),
  ],
)
def test_what_cannot_be_certified_is_one_line(run_here, linear_digits, tmp_path, asked, words):
  done = run_here(
    '-m', 'fulllora_jax.evaluate', *LINEAR, f'--workdir={tmp_path}/none', f'--certify={asked}'
  )
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert words in done.stderr and not (tmp_path / 'none').exists()


def test_a_random_function_is_refused():
  with pytest.raises(ValueError, match='certify: .* autoattack-rand .* leave one of them out'):
    checks.validate_plan(Plan(certify='sigma=1', attacks=('autoattack-rand',)))


def test_the_base_of_a_run_is_trained_without_it(small_config):
  small_config.eval.certify = 'sigma=1'
  assert config_lib.base_config(small_config).eval.certify == ''
