"""What is measured beside the attacks is one list, which everything walks."""

import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.evaluation import measurements
from fulllora_jax.evaluation.measurements import MEASUREMENTS
from fulllora_jax.evaluation.settings import Plan

# For each, two texts that ask for the same, and one that asks for something else.
ASKED = {
  'expected': ('pgd-20', 'pgd-20', 'pgd-10'),
  'union': ('linf:0.1,l2:1', 'linf:0.1, l2:1', 'linf:0.1,l2:2'),
  'dial': ('0,0.5,1', '1, 0, 1/2', '0,1'),
  'certify': ('sigma=0.25', 'sigma=1/4,n0=100', 'sigma=0.5'),
  'corruptions': ('fog,frost', 'frost, fog', 'all'),
  'shifts': ('a,b', 'a, b', 'a'),
}


def test_every_measurement_has_a_flag_a_field_and_a_row_here():
  fields = [each.field for each in MEASUREMENTS]
  assert sorted(fields) == sorted(config_lib.BESIDE) == sorted(ASKED)
  assert len({each.key for each in MEASUREMENTS}) == len(fields)
  assert all(getattr(Plan(), field) == '' for field in fields)


@pytest.mark.parametrize('each', MEASUREMENTS, ids=lambda each: each.field)
def test_a_finished_run_lacks_what_it_was_not_asked_for(each):
  config = config_lib.default()
  config.eval.attacks = ('clean',)
  for field in ASKED:
    config.eval[field] = ''
  result = {'evaluations': [], 'config': config_lib.as_plain(config)}
  assert measurements.lacking(config, result) == []
  before, same, other = ASKED[each.field]
  config.eval[each.field] = before
  assert measurements.lacking(config, result) == [each]
  result = {'evaluations': [], 'config': config_lib.as_plain(config)}
  assert measurements.lacking(config, result) == [each]  # it says so, but has no records
  result[each.key] = []
  assert measurements.lacking(config, result) == []
  config.eval[each.field] = same
  for field in ASKED.keys() - {each.field}:  # what else is asked for does not count
    config.eval[field] = ASKED[field][0]
  assert each not in measurements.lacking(config, result)
  config.eval[each.field] = other
  assert each in measurements.lacking(config, result)
  del result['evaluations']  # it diverged
  assert measurements.lacking(config, result) == []


def test_the_base_of_a_run_is_trained_without_any_and_for_no_union():
  config = config_lib.default()
  config.eval.update(dict.fromkeys(config_lib.BESIDE, 'asked'))
  config.threat.union = 'linf:8/255,l2:0.5'
  base = config_lib.base_config(config)
  assert [base.eval[field] for field in config_lib.BESIDE] == [''] * len(ASKED)
  assert base.threat.union == ''
