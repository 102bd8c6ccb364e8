"""The plan of an evaluation: a value, of a config and at another radius."""

import dataclasses

import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation.settings import Plan


def test_a_plan_is_that_of_its_config():
  config = config_lib.default()
  config.seed, config.threat.norm, config.threat.eps = 3, 'l2', '0.5'
  config.eval.update(attacks=('clean', 'pgd-7'), step_size='0.1', restarts=2)
  plan = Plan.of(config)
  assert (plan.seed, plan.precision) == (3, 'highest')
  assert (plan.threat.norm, plan.threat.eps) == ('l2', 0.5)
  clean, pgd = plan.all_attacks()
  assert clean.name == 'clean'
  assert (pgd.label, pgd.step_size, pgd.restarts) == ('pgd-7', 0.1, 2)
  assert Plan.of(config, seed=0, precision='default') == dataclasses.replace(
    plan, seed=0, precision='default'
  )
  with pytest.raises(dataclasses.FrozenInstanceError):
    plan.eps = '8/255'


def test_another_radius_leaves_the_plan_as_it_was():
  plan = Plan(eps='8/255', step_size='2/255')
  half = plan.at('4/255')
  assert half.threat.eps == 4 / 255
  assert half.attack('pgd-3').step_size == pytest.approx(1 / 255)
  assert plan == Plan(eps='8/255', step_size='2/255')
  assert plan.at('4/255', scale_steps=False).step_size == '2/255'
  assert plan.at('8/255') == plan  # with the step size as it was written
  assert Plan(eps='0').at('4/255').step_size == '2/255'
  with pytest.raises(UserError, match='threat.eps: cannot read'):
    plan.at('much')
