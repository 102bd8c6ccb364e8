"""What objective, awp, ema, attack.ard and attack.prm refuse, and report."""

import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.attacks import Threat
from fulllora_jax.core.errors import UserError
from fulllora_jax.reports import facts
from fulllora_jax.training import checks, objectives, train_step

_PLAIN = {'augment.mix_probability': 0.0}
_MART = {'objective.name': 'mart'} | _PLAIN
_TRADES = {'objective.name': 'trades'}


def changed(fields):
  config = config_lib.default()
  config.update_from_flattened_dict(fields)
  return config


@pytest.mark.parametrize(
  'fields',
  [
    _TRADES | {'attack.restarts': 2},
    _TRADES | {'train.accumulate': 2, 'objective.label_smoothing': 0.1},
    _MART | {'attack.loss': 'margin', 'attack.random_start': False},
    _MART | {'attack.name': 'n_fgsm', 'eval.attacks': ('clean',)},
    {'awp.gamma': 0.005, 'awp.warmup': 0.25, 'model.remat': 'dots'},
    {'attack.ard': 0.25, 'attack.prm': 1.0, 'train.accumulate': 2},
    {'method': 'standard', 'ema.decay': 0.99, 'objective.label_smoothing': 0.1},
  ],
)
def test_what_goes_together_is_let_through(fields):
  config = changed(fields)
  checks.validate(config, 1)
  checks.validate(config_lib.base_config(config), 1)


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'objective.name': 'tradse'}, 'tradse.*did you mean trades'),
    ({'objective.beta': -1.0}, 'objective.beta -1.0: .*at least 0'),
    ({'objective.beta': 3.0}, 'beta 3.0: pgd_at has no such weight'),
    ({'objective.label_smoothing': 1.0}, 'label_smoothing 1.0: .*below 1'),
    ({'awp.gamma': -0.1}, 'awp.gamma -0.1: .*at least 0'),
    ({'awp.gamma': float('nan')}, 'awp.gamma nan: .*at least 0'),
    ({'awp.gamma': 0.1, 'awp.warmup': 1.0}, 'awp.warmup 1.0: .*below 1'),
    ({'awp.warmup': 0.5}, 'awp.warmup 0.5: nothing starts.*awp.gamma is 0'),
    ({'ema.decay': 1.0}, 'ema.decay 1.0: .*below 1'),
    ({'attack.ard': 1.5}, 'attack.ard 1.5: .*in 0..1'),
    ({'attack.prm': -0.5}, 'attack.prm -0.5: .*in 0..1'),
    (
      {'attack.prm': 0.5, 'attack.name': 'fgsm_rs'},
      'attack.prm 0.5 .*each step of PGD, but attack.name is fgsm_rs',
    ),
    (
      {'awp.gamma': 0.1, 'train.accumulate': 2},
      'gradient of the whole batch, but train.accumulate is 2',
    ),
    (_TRADES | {'attack.name': 'n_fgsm'}, 'by PGD, but attack.name is n_fgsm'),
    (_TRADES | {'attack.loss': 'dlr'}, 'divergence.*attack.loss is dlr'),
    (_TRADES | {'attack.random_start': False}, 'no slope, but .* is False'),
    (
      _TRADES | _PLAIN | {'attack.carry': True, 'augment.crop_padding': 0, 'augment.flip': False},
      'no slope, but attack.carry is True',
    ),
    (
      {'objective.name': 'mart'},
      'mart needs hard labels, but augment.mix_probability is 0.3 with '
      'augment.mixup 0.8 and augment.cutmix 1.0',
    ),
    (
      _MART | {'objective.label_smoothing': 0.1},
      'mart needs hard labels, but objective.label_smoothing is 0.1',
    ),
    (
      _TRADES | {'method': 'standard'},
      'standard trains without an adversary, but objective.name is trades',
    ),
    ({'awp.gamma': 0.1, 'method': 'standard'}, 'adversary, but awp.gamma is 0.1'),
    ({'attack.ard': 0.1, 'method': 'standard'}, 'adversary, but attack.ard is 0.1'),
    ({'attack.prm': 0.1, 'method': 'standard'}, 'adversary, but attack.prm is 0.1'),
  ],
)
def test_what_does_not_is_refused_in_a_line(fields, words):
  with pytest.raises(UserError, match=words) as caught:
    checks.validate(changed(fields), 1)
  assert '\n' not in str(caught.value)


def test_the_base_is_trained_without_any_of_it():
  on = _TRADES | {
    'objective.beta': 1.0,
    'awp.gamma': 0.01,
    'awp.warmup': 0.1,
    'attack.ard': 0.25,
    'attack.prm': 0.25,
    'ema.decay': 0.99,
    'objective.label_smoothing': 0.1,
  }
  base, plain = config_lib.base_config(changed(on)), config_lib.default()
  for part in ('objective', 'awp', 'ema', 'attack'):
    assert base[part].to_dict() == plain[part].to_dict()
  checks.validate(base, 1)


def test_a_config_from_before_reads_as_off():
  old = config_lib.as_plain(config_lib.default())
  for part in ('objective', 'awp', 'ema'):
    del old[part]
  del old['attack']['ard'], old['attack']['prm']
  read = config_lib.from_mapping(old)
  assert read.to_dict() == config_lib.default().to_dict()
  assert list(facts.facts(old)) == []
  assert facts.weights_note(old) == ''


def test_a_report_lists_what_is_on():
  assert list(facts.facts(config_lib.as_plain(changed({})))) == []
  fields = _TRADES | {
    'awp.gamma': 0.005,
    'awp.warmup': 0.1,
    'attack.ard': 0.25,
    'attack.prm': 0.5,
    'ema.decay': 0.99,
    'objective.label_smoothing': 0.1,
  }
  plain = config_lib.as_plain(changed(fields))
  assert dict(facts.facts(plain)) == fields | {'objective.beta': 6.0}
  assert 'decay 0.99' in facts.weights_note(plain)


def test_the_alarm_names_the_attack_of_trades():
  for loss, label in (('ce', 'pgd-3'), (objectives.kl, 'pgd-3 on kl')):
    attack = train_step.InnerAttack(Threat(), 3, 0.1, 10, loss=loss)
    assert attack.label == label
