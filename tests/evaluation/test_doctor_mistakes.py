"""The doctor on mistakes of public evaluations: each is found where it was planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from five_blobs import (
  CLASSES,
  COUNT,
  IMAGES,
  LABELS,
  MEANS,
  examined,
  finding,
  healthy,
  straight_through,
  with_gradient,
)

from fulllora_jax.attacks import Threat
from fulllora_jax.evaluation.diagnosis import examine as diagnosis

ROUNDED = 'images are not rounded on their way'
WARM = 'logits without a temperature'
FIRST = 'a first gradient'
TRANSFER = 'white box beats transfer from the base'
DEPLOYED = 'the attacked function is the deployed one'
SMALL, WIDE = Threat('linf', 8 / 255), Threat('linf', 0.2)


def rounding_by(forward):
  return lambda x: healthy(straight_through(x, forward(x)))


@pytest.mark.parametrize(
  ('forward', 'threat', 'level', 'name', 'most'),
  [
    (lambda x: jnp.round(255 * x) / 255, SMALL, 'wrong', '8 bits', 0.5 / 8),
    (lambda x: jnp.round(255 * x) / 255, Threat('linf', 0.1), 'note', '8 bits', 0.5 / 25.5),
    (lambda x: jax.lax.reduce_precision(x, 8, 7), SMALL, 'wrong', 'bfloat16', 255 / 8 / 2**9),
    (lambda x: jax.lax.reduce_precision(x, 5, 10), SMALL, 'note', 'float16', 255 / 8 / 2**12),
  ],
)
def test_rounding_before_the_model_is_found(forward, threat, level, name, most):
  found = finding(ROUNDED, rounding_by(forward), threat)
  assert found.level == level
  assert f'between the values of {name} have the logits of the nearest' in found.seen
  share = float(found.seen.split('up to ')[1].split('%')[0]) / 100
  assert 0.9 * most < share <= most + 5e-4
  assert 'leave the rounding out of the function' in found.advice
  quiet = [ROUNDED, 'gradients that are not zero', 'gradients beat noise']
  assert [finding(check, healthy, threat).level for check in quiet] == ['ok'] * 3


def test_a_constant_is_not_rounded():
  assert finding(ROUNDED, lambda x: 0 * healthy(x) + jnp.arange(5.0)).level == 'ok'


# One pixel says the class, the mean of the others brings the first other class nearer, and takes
# the second one further away than that.
MARKED = np.full((COUNT, 8, 8, 1), 0.5, np.float32)
MARKED[:, 0, 0, 0] = 0.1 + 0.8 * (np.arange(COUNT) % 2)


def torn(x):
  marked, mean = x[:, 0, 0, 0] > 0.5, x[:, 1:].mean((1, 2, 3)) - 0.5
  near, far = mean - 0.02, -10 * mean - 5
  first, second = jnp.where(marked, near, 0), jnp.where(marked, 0, near)
  return jnp.stack([first, second, far], axis=1)


@pytest.mark.parametrize('temperature', [1e3, 1e6])
def test_a_temperature_that_misleads_the_cross_entropy_is_wrong(temperature):
  images = {'x': MARKED, 'labels': np.arange(COUNT) % 2}
  found = finding(WARM, lambda x: torn(x) / temperature, **images)
  assert found.level == 'wrong'
  assert 'the softmax gives the right class 0.33' in found.seen
  assert 'PGD-20 on the cross entropy leaves 100.0% right, and 0.0% with' in found.seen
  assert f'logits {5 / 0.02 * temperature:.2g} times as large' in found.seen
  assert 'divided by a temperature' in found.why and 'without the temperature' in found.advice
  assert finding(WARM, torn, **images).level == 'ok'


def test_a_temperature_that_misleads_nothing_is_noted():
  assert finding(WARM, lambda x: healthy(x) / 1e4).level == 'note'
  assert finding(WARM, healthy).level == 'ok'


def test_a_model_that_knows_nothing_has_no_temperature():
  assert finding(WARM, lambda x: 0 * healthy(x)).level == 'ok'


def test_a_first_gradient_of_zero_is_wrong():
  def at_an_image(x, gradient):
    there = (x[:, None] == IMAGES[None, :40]).all((2, 3, 4)).any(1)
    return jnp.where(there[:, None, None, None], 0, gradient)

  found = finding(FIRST, with_gradient(at_an_image))
  assert found.level == 'wrong'
  assert found.seen.startswith('40 of 48 images have no gradient of the margin at the image itself')
  assert 'begin at a random point' in found.advice
  assert finding('gradients that are not zero', with_gradient(at_an_image)).level == 'ok'
  assert finding(FIRST, healthy).level == 'ok'
  assert finding(FIRST, lambda x: 0 * healthy(x)).level == 'ok'  # zero everywhere: another fault


def test_a_base_that_breaks_more_than_the_white_box_is_wrong():
  masked = with_gradient(lambda x, g: -g)
  model = examined(masked, WIDE, base_fn=healthy)
  broken = ~examined(healthy, WIDE).after_pgd(20)
  lost = int((model.white_box & broken).sum())
  found = diagnosis.CHECKS[TRANSFER](model)
  assert lost > 10 and found.level == 'wrong'
  assert f'PGD-20 on the bare base breaks {lost} of 48 images that APGD' in found.seen


@pytest.mark.parametrize('base', [None, healthy, lambda x: healthy(jnp.roll(x, 1, axis=1))])
def test_a_base_whose_images_do_no_more_is_no_finding(base):
  assert finding(TRANSFER, healthy, WIDE, base_fn=base).level == 'ok'


def in_numpy(images):
  assert isinstance(images, np.ndarray) and images.dtype == np.float32
  return -4.0 * np.square(images[:, None] - MEANS[None]).sum(axis=(2, 3, 4))


def test_what_is_deployed_may_be_of_any_framework():
  assert finding(DEPLOYED, healthy, deployed=[('own:logits', in_numpy)]).level == 'ok'
  assert finding(DEPLOYED, healthy).level == 'ok'


def swapped(images):
  return in_numpy(images)[:, [1, 0, 2, 3, 4]]


def broken(images):
  raise OSError('no weights here')


@pytest.mark.parametrize(
  ('function', 'level', 'words'),
  [
    # 20 of the 48 images are of a class that is swapped, in two copies: clean, and in the ball
    (swapped, 'wrong', 'another class for 40 of 96 images, clean and in their balls'),
    (lambda x: in_numpy(x) / 2, 'note', 'another class for 0 of 96 images'),
    (broken, 'wrong', 'OSError: no weights here'),
    (lambda x: in_numpy(x)[:, :4], 'wrong', 'logits [96, 4], expected [96, 5]'),
    (lambda x: np.nan * in_numpy(x), 'wrong', 'gives logits up to nan apart'),
  ],
)
def test_what_is_deployed_and_answers_otherwise_is_found(function, level, words):
  sound = ('sound:logits', in_numpy)
  found = finding(DEPLOYED, healthy, deployed=[sound, ('own:logits', function)])
  assert found.level == level
  assert 'own:logits' in found.seen and words in found.seen
  assert np.isin(LABELS, [0, 1]).sum() == 20 and CLASSES == 5


def test_a_random_function_is_examined_to_the_end():
  def noisy(x, key):
    return healthy(x) + 0.001 * jax.random.normal(key, (x.shape[0], CLASSES))

  found = list(diagnosis.examine(examined(noisy)))
  assert [f.check for f in found] == ['finite logits', *diagnosis.CHECKS]


COMMAND = ('-m', 'fulllora_jax.doctor', '--logits=linear_digits:logits', '--data=digits')


@pytest.mark.parametrize(
  ('name', 'status', 'said'),
  [
    ('logits', 0, f'ok     {DEPLOYED}'),
    ('nothing', 1, 'linear_digits:nothing cannot be compared: TypeError'),
  ],
)
def test_the_command_compares_what_is_deployed(
  run_here, digits_dir, linear_digits, monkeypatch, name, status, said
):
  monkeypatch.syspath_prepend(linear_digits)
  monkeypatch.setattr(diagnosis, 'CHECKS', {DEPLOYED: diagnosis.CHECKS[DEPLOYED]})
  done = run_here(
    *COMMAND, '--image_size=8', f'--data_dir={digits_dir}', '--num_examples=16', '--eps=0.1',
    f'--deployed=linear_digits:{name}',
  )  # fmt: skip
  assert done.returncode == status and said in done.stdout
