"""The doctor: each check finds the fault it is for, and a healthy model is ok."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from five_blobs import (
  CLASSES,
  COUNT,
  FIRST_ROW_ZERO,
  IMAGES,
  LABELS,
  MEANS,
  examined,
  finding,
  healthy,
  with_gradient,
)
from jax.tree_util import Partial

from fulllora_jax.attacks import Threat
from fulllora_jax.evaluation.diagnosis import examine as diagnosis


@pytest.mark.parametrize('norm, eps', [('linf', 0.05), ('l2', 0.3), ('l1', 1.5)])
def test_a_healthy_model_passes_every_check(norm, eps):
  found = list(diagnosis.examine(examined(healthy, Threat(norm, eps))))
  assert [f.check for f in found] == ['finite logits', *diagnosis.CHECKS]
  assert [f for f in found if f.level != 'ok'] == []


def by_row(x):
  return healthy(x) + 9.0 * (jnp.arange(x.shape[0])[:, None] % 2) * jnp.arange(CLASSES)


def test_a_model_that_an_ensemble_refuses_is_examined_to_the_end():
  found = finding('output independent of the batch', by_row)
  assert found.level == 'wrong'
  checks = {'white box beats black box': diagnosis.CHECKS['white box beats black box']}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(diagnosis, 'CHECKS', checks)
    *_, found = diagnosis.examine(examined(by_row))
  assert (found.check, found.level) == ('white box beats black box', 'wrong')
  assert 'change by up to' in found.seen and 'with its row in the batch' in found.seen


def noisy(x, key):
  return healthy(x) + 0.3 * jax.random.normal(key, (x.shape[0], CLASSES))


def impure(x):
  """Noise of the host's, which is new in every call."""

  def draw(rows):
    return np.random.default_rng().normal(size=(rows.shape[0], 1)).astype('f4')

  shape = jax.ShapeDtypeStruct((x.shape[0], 1), jnp.float32)
  return healthy(x) + jax.pure_callback(draw, shape, x) * jnp.arange(5.0)


CLOCK_EPS = 0.25


def turns_back(x, gradient):
  """Leads away from the image for some 30 steps, and then back.

  The first row counts them: each of its pixels rises once the one before it
  has reached the surface of the ball around 0.
  """
  full = x[:, 0, :, 0] > 0.99 * CLOCK_EPS
  rises = jnp.cumprod(jnp.pad(full, ((0, 0), (1, 0)), constant_values=1), 1)
  back = rises[:, -1].astype(bool)[:, None, None, None]
  gradient = jnp.where(back, -gradient, gradient)
  return gradient.at[:, 0, :, 0].set(jnp.where(rises[:, :-1], 1.0, -1.0))


def depends_on_precision(x):
  if jax.config.jax_default_matmul_precision == 'highest':
    return healthy(x)
  return healthy(jnp.round(x * 4) / 4)


FAULTS = {
  'stochastic': ('deterministic output', noisy, {}),
  'impure': ('deterministic output', impure, {}),
  'batch statistics': (
    'output independent of the batch',
    lambda x: healthy(x - x.mean(axis=0) + 0.5),
    {},
  ),
  'softmax': ('logits, not probabilities', lambda x: jax.nn.softmax(healthy(x)), {}),
  'random labels': (
    'clean accuracy above chance',
    healthy,
    {'labels': np.random.default_rng(1).permutation(LABELS)},
  ),
  'expects -1 to 1': ('images on the scale the model expects', lambda x: healthy((x + 1) / 2), {}),
  'divided twice': (
    'images on the scale the model expects',
    healthy,
    {'x': IMAGES / 255, 'threat': Threat('linf', 0.01)},
  ),
  'an l1 radius divided by 255': ('eps in its unit', healthy, {'threat': Threat('l1', 12 / 255)}),
  'misleading in l1': (
    'white box beats black box',
    with_gradient(lambda x, g: -g),
    {'threat': Threat('l1', 3)},
  ),
  'eps divided twice': ('eps in its unit', healthy, {'threat': Threat('linf', 8 / 255 / 255)}),
  'quantised': ('gradients that are not zero', lambda x: healthy(jnp.round(x * 32) / 32), {}),
  'square root at black': (
    'gradients that are not zero',
    lambda x: healthy(jnp.sqrt(x) ** 2),
    {'x': IMAGES * FIRST_ROW_ZERO},
  ),
  'gradient upside down': (
    'gradients beat noise',
    with_gradient(lambda x, g: -g),
    {'threat': Threat('linf', 0.6)},
  ),
  'turns back': (
    'more steps are no weaker',
    with_gradient(turns_back),
    {'threat': Threat('linf', CLOCK_EPS), 'x': IMAGES * FIRST_ROW_ZERO},
  ),
  'masked': ('nothing withstands a large eps', with_gradient(lambda x, g: -g), {}),
  'misleading': (
    'white box beats black box',
    with_gradient(lambda x, g: -g),
    {'threat': Threat('linf', 0.2)},
  ),
  'low default precision': (
    'precision does not matter',
    depends_on_precision,
    {'threat': Threat('linf', 0.15)},
  ),
  'coarse arithmetic': (
    'precision does not matter',
    lambda x: healthy(jnp.round(x * 4) / 4),
    {'threat': Threat('linf', 0.15), 'exact_fn': healthy},
  ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_found_by_its_check(fault):
  check, logits_fn, changes = FAULTS[fault]
  found = finding(check, logits_fn, **changes)
  assert found.level == 'wrong', found
  assert found.seen and found.why and found.advice
  for text in (found.seen, found.why, found.advice):
    assert '\n' not in text


def test_gradients_that_are_no_numbers_are_counted():
  images = np.where(np.arange(COUNT)[:, None, None, None] < 7, IMAGES * FIRST_ROW_ZERO, IMAGES)

  def logits_fn(x):
    return healthy(jnp.sqrt(x) ** 2)

  found = finding('gradients that are not zero', logits_fn, x=images.astype(np.float32))
  assert found.seen.startswith('7 of 48 images have a gradient with NaN')


def test_logits_that_are_no_numbers_end_the_examination():
  def broken(x):
    return healthy(x).at[3, 0].set(jnp.nan)

  (found,) = diagnosis.examine(examined(broken))
  assert (found.check, found.level) == ('finite logits', 'wrong')
  assert '1 of 48 images' in found.seen


@pytest.mark.parametrize('classes', [2, 3])
def test_few_classes_are_noted(classes):
  rows = np.isin(LABELS, range(classes))
  found = finding(
    'enough classes', lambda x: healthy(x)[:, :classes], x=IMAGES[rows], labels=LABELS[rows]
  )
  assert found.level == 'note'
  assert f'{classes} classes' in found.seen
  assert 'its result is called autoattack-margin' in found.why
  assert finding('enough classes', healthy).level == 'ok'


@pytest.mark.parametrize('eps, seen', [(0.031, '8/255'), (0.5, 'above 32/255')])
def test_an_odd_eps_is_noted(eps, seen):
  found = finding('eps in its unit', healthy, Threat('linf', eps))
  assert found.level == 'note'
  assert seen in found.seen


def test_a_saturated_cross_entropy_is_noted():
  found = finding('gradients that are not zero', lambda x: 1e4 * healthy(x))
  assert found.level == 'note'
  assert 'cross entropy' in found.seen and 'a temperature below 1' in found.why


def test_sixteen_bits_are_noted():
  def low(x):
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    return healthy(x)

  found = finding('precision does not matter', low)
  assert found.level == 'note'
  assert '16 bits' in found.seen


def test_weights_may_be_arguments_of_the_program():
  def apply(means, x):
    return -jnp.square(x[:, None] - means[None]).sum(axis=(2, 3, 4))

  found = list(diagnosis.examine(examined(Partial(apply, jnp.array(MEANS)))))
  assert {f.level for f in found} == {'ok'}


def test_a_finding_is_four_lines():
  found = diagnosis.Finding('check', 'wrong', 'this', 'because', 'that')
  assert found.text().splitlines() == [
    'wrong  check',
    '       seen: this',
    '       why:  because',
    '       do:   that',
  ]
  assert diagnosis.Finding('check').text() == 'ok     check'


DOCTOR = ('-m', 'fulllora_jax.doctor')


@pytest.mark.slow
def test_the_command_examines_a_run(run_python, finished_copy):
  """The run is a tiny one: hardly trained, it may well be ill."""
  done = run_python(*DOCTOR, f'--workdir={finished_copy}', '--num_examples=16', '--eps=1/20')
  assert done.returncode in (0, 1), done.stderr
  lines = done.stdout.splitlines()
  checks = [line[7:] for line in lines if line[:5].strip() in LEVELS]
  assert checks == [
    'finite logits', *diagnosis.CHECKS, 'recorded results agree', 'recorded eps in its unit',
  ]  # fmt: skip
  wrong = sum(line.startswith('wrong') for line in lines)
  assert lines[-1] == (
    f'{wrong} of 22 checks found something wrong, on 16 test images at linf, eps 1/20'
  )
  assert done.returncode == (wrong > 0)


LEVELS = ('ok', 'note', 'wrong')


def test_the_command_examines_a_function(run_here, digits_dir, tmp_path, monkeypatch):
  (tmp_path / 'faulty.py').write_text(
    'import jax, jax.numpy as jnp\n'
    'def logits(x):\n'
    '  return jax.nn.softmax(x.reshape(len(x), -1)[:, :10])\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  done = run_here(
    *DOCTOR, '--logits=faulty:logits', '--data=digits', '--image_size=8',
    f'--data_dir={digits_dir}', '--num_examples=16', '--eps=0.1',
  )  # fmt: skip
  assert done.returncode == 1, done.stderr
  assert 'wrong  logits, not probabilities' in done.stdout


@pytest.mark.parametrize('order', [(1, 0, 2, 3, 4), (4, 3, 1, 0, 2)])
def test_classes_in_another_order_are_no_matter_of_scale(order):
  def swapped(x):
    return healthy(x)[:, jnp.array(order)]

  found = finding('classes in the order of the labels', swapped)
  moved = np.mean(np.array(order)[LABELS] != LABELS)
  assert found.level == 'wrong'
  assert f'clean accuracy is {1 - moved:.1%}, but 100.0% if the classes' in found.seen
  assert finding('images on the scale the model expects', swapped).level == 'ok'


def test_chance_is_no_other_order():
  guesses = np.random.default_rng(3).normal(size=(8 * 8, CLASSES)).astype(np.float32)

  def guessing(x):
    return jnp.sin(1e3 * x.reshape(len(x), -1) @ guesses)

  assert finding('classes in the order of the labels', guessing).level == 'ok'
  constant = finding(
    'classes in the order of the labels', lambda x: 0 * healthy(x) + jnp.arange(5.0)
  )
  assert constant.level == 'ok'


@pytest.mark.parametrize(
  'flags, message',
  [
    ([], 'give the work directory of a run, or --logits'),
    (['--workdir=nowhere'], 'holds no run'),
    (['--logits=json'], 'write module:function'),
    (['--logits=json:nothing'], 'json has no function nothing'),
    (['--logits=json:dumps', '--deployed=json'], '--deployed: write module:function, not'),
    (['--logits=json:dumps', '--deployed=no_such:f'], '--deployed: cannot import no_such'),
    (['--logits=no_such:logits'], 'cannot import no_such'),
    (['--logits=json:dumps', '--eps=x'], "cannot read 'x'"),
    (['--logits=json:dumps', '--norm=l2'], '--norm l2: eps 8/255 is a radius of linf; give'),
    (['--logits=json:dumps', '--seed=-1'], '--seed -1: it must be in 0..4294967295'),
    (['--logits=json:dumps', '--norm=l3'], "unknown norm 'l3'"),
    (['--logits=json:dumps', '--split=all'], "--split: unknown 'all'"),
  ],
)
def test_bad_input_is_one_line(run_here, digits_dir, flags, message):
  done = run_here(
    *DOCTOR, '--data=digits', '--image_size=8', f'--data_dir={digits_dir}',
    *flags,
  )  # fmt: skip
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert done.stderr.startswith('error: ')
  assert message in done.stderr
