"""Robustness at several radii: against the evaluator, and how images rank."""

import jax
import numpy as np
import pytest

from fulllora_jax import attacks, data
from fulllora_jax.attacks import Threat
from fulllora_jax.distributed import mesh as mesh_lib
from fulllora_jax.evaluation.eps_sweep import Climb, EpsSweep, Outcome, extremes
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.settings import Plan

THREAT = Threat(norm='linf', eps=0.1)
WEIGHTS = np.random.default_rng(0).normal(0, 1, (64, 10)).astype(np.float32)


def apply(variables, images):
  return images.reshape(len(images), -1) @ variables


def tried(digits, devices=1, batch_size=16):
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  evaluator = Evaluator(apply, Plan(eps='0.1', batch_size=batch_size), mesh)
  attack = attacks.parse('pgd-3', THREAT, 0.04)
  split = digits.test
  variables = jax.device_put(fitted(digits), mesh_lib.replicated(mesh))
  return evaluator, EpsSweep(evaluator, split, attack), attack, variables


def fitted(digits):
  x = digits.train.fetch(np.arange(400)).reshape(400, -1) / 255
  targets = np.eye(10)[digits.train.labels[:400]]
  return np.linalg.lstsq(x, targets, rcond=0.02)[0].astype(np.float32)


def test_at_eps_it_is_the_evaluation(digits):
  evaluator, sweep, attack, variables = tried(digits)
  expected = evaluator.evaluate(variables, digits.test, attack, 40)
  chosen = data.choose_examples(len(digits.test), 40, 0)
  outcome = sweep.outcome(variables, chosen, 1.0)
  labels = digits.test.labels[chosen]
  np.testing.assert_array_equal(outcome.clean == labels, expected.clean)
  robust = (outcome.clean == labels) & (outcome.attacked == labels)
  np.testing.assert_array_equal(robust, expected.robust)
  assert 0 < robust.sum() < expected.clean.sum()
  # The margin says the same.
  assert ((outcome.margin > 0) == (outcome.attacked == labels)).all()


@pytest.mark.parametrize('devices, batch_size', [(1, 16), (8, 24)])
def test_the_images_are_those_of_the_outcome(digits, devices, batch_size):
  _, sweep, _, variables = tried(digits, devices, batch_size)
  chosen = np.arange(3, 43)
  outcome = sweep.outcome(variables, chosen, 0.5)
  x_adv = sweep.adversarial(variables, chosen, 0.5)
  x = digits.test.fetch(chosen) / 255
  assert x_adv.shape == x.shape and x_adv.dtype == np.float32
  assert 0.04 < np.abs(x_adv - x).max() <= 0.05 + 1e-6
  classes = np.asarray(apply(fitted(digits), x_adv)).argmax(axis=1)
  np.testing.assert_array_equal(classes, outcome.attacked)
  assert (outcome.attacked != outcome.clean).any()


def test_a_radius_of_nothing_changes_nothing(digits):
  _, sweep, _, variables = tried(digits)
  outcome = sweep.outcome(variables, np.arange(20), 0.0)
  np.testing.assert_array_equal(outcome.clean, outcome.attacked)


LABELS = np.zeros(6, int)
OUTCOMES = [  # broken never, at 1, at 0, at 0 with less margin, clean, at 1
  Outcome(
    np.array([0, 0, 0, 0, 1, 0]),
    np.array([0, 0, 1, 1, 1, 0]),
    np.array([9.0, 5.0, -1.0, -2.0, -9.0, 1.0]),
  ),
  Outcome(
    np.array([0, 0, 0, 0, 1, 0]),
    np.array([0, 1, 1, 0, 1, 1]),
    np.array([3.0, -1.0, -3.0, 1.0, -9.0, -5.0]),
  ),
]


class Played(EpsSweep):
  """A sweep whose outcomes are those above, at radius 1 and 2."""

  def __init__(self):
    self.split = data.Split('test', LABELS, None)
    self.attacked = []

  def outcome(self, variables, chosen, factor):
    self.attacked.append(chosen.tolist())
    return Outcome(*(part[chosen] for part in OUTCOMES[int(factor) - 1]))


def climbed(factors=(1.0, 2.0), begun=None):
  sweep = Played()
  *_, climb = sweep.climb(None, np.arange(6), factors, begun)
  return sweep, climb


def test_an_image_that_is_broken_stays_so_and_is_not_attacked_again():
  sweep, climb = climbed()
  # Image 3 is broken at the first radius and not at the second.
  assert climb.first.tolist() == [2, 1, 0, 0, -1, 1]
  assert sweep.attacked == [[0, 1, 2, 3, 4, 5], [0, 1, 5]]
  assert climb.margin.tolist() == [3.0, -1.0, -1.0, -2.0, -9.0, -5.0]
  curve = climb.curve(['4/255', '8/255'], 8 / 255)
  assert [point['num_correct'] for point in curve] == [5, 3, 1]
  assert [point['eps'] for point in curve] == ['0', '4/255', '8/255']


def test_a_climb_goes_on_where_its_radii_begin_the_same():
  _, begun = climbed((1.0,))
  sweep, climb = climbed(begun=begun)
  assert sweep.attacked == [[0, 1, 5]]
  for ours, whole in zip(climb, climbed()[1], strict=True):
    np.testing.assert_array_equal(ours, whole)
  sweep, _ = climbed(begun=begun._replace(factors=np.array([0.5])))
  assert len(sweep.attacked) == 2


def test_where_all_are_broken_nothing_is_attacked():
  _, climb = climbed()
  sweep = Played()
  broken = climb._replace(first=np.zeros(6, int), factors=np.array([1.0]))
  *_, climb = sweep.climb(None, np.arange(6), (1.0, 2.0), broken)
  assert sweep.attacked == [] and climb.first.tolist() == [0] * 6


def test_extremes_are_ranked_by_radius_and_then_by_margin():
  _, climb = climbed()
  most, least = extremes(climb, 4)
  assert (most.tolist(), least.tolist()) == ([0, 1], [3, 2])
  most, least = extremes(climb, 1)
  assert (most.tolist(), least.tolist()) == ([0], [3])


def test_no_image_is_right():
  most, least = extremes(Climb(np.ones(1), *np.full((3, 6), -1), np.zeros(6)), 4)
  assert len(most) == len(least) == 0
