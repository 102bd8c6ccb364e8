import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fulllora_jax.attacks import Attack, Threat, losses, parse, pgd
from fulllora_jax.core.errors import UserError

LINF = Threat('linf', 0.1)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.uniform(size=(4, 3, 3, 1)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 0])
KEYS = jax.random.split(jax.random.key(0), 4)
W = jnp.asarray(RNG.normal(size=(9, 3)), jnp.float32)


def network(x):
  return jnp.tanh(x.reshape(x.shape[0], -1) @ W)


@pytest.mark.parametrize(
  ('text', 'attack', 'label'),
  [
    ('clean', Attack('clean', 0, 0.0, 0), 'clean'),
    ('fgsm', Attack('fgsm', 1, 0.1, 0), 'fgsm'),
    ('pgd-20', Attack('pgd', 20, 0.02, 3), 'pgd-20'),
    (' pgd-1 ', Attack('pgd', 1, 0.02, 3), 'pgd-1'),
    ('pgd', Attack('pgd', 20, 0.02, 3), 'pgd-20'),
    ('cw_linf-100', Attack('cw_linf', 100, 0.02, 3), 'cw_linf-100'),
    ('cw_linf', Attack('cw_linf', 20, 0.02, 3), 'cw_linf-20'),
  ],
)
def test_parse_reads(text, attack, label):
  found = parse(text, LINF, 0.02, restarts=3)
  assert found == attack
  assert found.label == label


@pytest.mark.parametrize('label', ['clean', 'fgsm', 'pgd-7', 'cw_linf-7'])
def test_a_label_reads_as_its_attack(label):
  assert parse(label, LINF, 0.02).label == label


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('auto', "unknown attack 'auto'; known: clean, fgsm, pgd, .*autoattack.*, "),
    ('autoattack-20', "unknown attack 'autoattack-20'"),
    ('apgd-ce-5', "unknown attack 'apgd-ce-5'"),
    ('square-', "'square-' has no number of queries; write square-5000"),
    ('square-0', "'square-0' has no number of queries"),
    ('square-²', 'has no number of queries'),
    ('', "unknown attack ''"),
    ('PGD-20', "unknown attack 'PGD-20'"),
    ('fgsm-3', "fgsm takes no steps, but got 'fgsm-3'"),
    ('clean-1', 'clean takes no steps'),
    ('pgd-0', "'pgd-0' has no number of steps; write pgd-20"),
    ('pgd-x', "'pgd-x' has no number of steps"),
    ('pgd-', "'pgd-' has no number of steps"),
    ('pgd--5', "'pgd--5' has no number of steps"),
    ('pgd-²', 'has no number of steps'),
    ('cw_linf-1.5', 'has no number of steps; write cw_linf-20'),
  ],
)
def test_parse_refuses(text, message):
  with pytest.raises(UserError, match=f'^attack: .*{message}'):
    parse(text, LINF, 0.02)


def test_cw_linf_needs_the_linf_ball():
  with pytest.raises(UserError, match='cw_linf needs threat.norm linf.* l2'):
    parse('cw_linf-20', Threat('l2', 0.5), 0.02)


def test_restarts_must_be_positive():
  with pytest.raises(UserError, match='restarts must be at least 1, .* 0'):
    parse('pgd-20', LINF, 0.02, restarts=0)


def test_clean_is_x_itself():
  assert parse('clean', LINF, 0.02)(KEYS, network, X, LABELS, LINF) is X


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_fgsm_is_one_step_of_size_eps_along_the_gradient(norm):
  threat = Threat(norm, 0.1)
  found = parse('fgsm', threat, 0.02)(KEYS, network, X, LABELS, threat)
  gradient = jax.grad(
    lambda x: losses.cross_entropy(network(x), LABELS).sum()
  )(X)  # fmt: skip
  if norm == 'linf':
    step = jnp.sign(gradient)
  else:
    norms = jnp.linalg.norm(gradient.reshape(4, -1), axis=1)
    step = gradient / norms.reshape(4, 1, 1, 1)
  expected = jnp.clip(X + 0.1 * step, 0, 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(('text', 'loss'), [('pgd-3', 'ce'), ('cw_linf-3', 'margin')])
def test_pgd_and_cw_linf_are_pgd_on_their_loss(text, loss):
  found = parse(text, LINF, 0.02, restarts=2)(KEYS, network, X, LABELS, LINF)
  expected = pgd(
    KEYS, network, X, LABELS, LINF,
    steps=3, step_size=0.02, restarts=2, loss=loss,
  )  # fmt: skip
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ('text', 'version'),
  [
    ('autoattack', 'standard'),
    ('autoattack-plus', 'plus'),
    ('autoattack-rand', 'rand'),
    ('autoattack-second', 'second'),
    ('autoattack-margin', 'margin'),
    ('autoattack-margin-second', 'margin-second'),
    ('pma', ('pma',)),
    ('malt', ('malt',)),
    ('apgd-t', ('apgd-t',)),
    (' fab ', ('fab',)),
    ('square', ('square',)),
    ('square-1000', ('square-1000',)),
  ],
)
def test_parse_reads_ensembles_and_their_attacks(text, version):
  found = parse(text, LINF, 0.02, restarts=3)
  assert found == Attack(text.strip(), 0, 0.0, 0, version)
  assert found.label == text.strip()


@pytest.mark.parametrize('text', ['pgd-20', 'clean', 'fgsm', 'cw_linf'])
def test_attacks_that_can_be_called_have_no_version(text):
  assert not parse(text, LINF, 0.02).version


def test_few_classes_give_autoattack_another_name_and_nothing_else():
  for text, few in (
    ('autoattack', 'autoattack-margin'),
    ('autoattack-second', 'autoattack-margin-second'),
    ('autoattack-margin-plus', 'autoattack-margin-plus'),
  ):
    found = parse(text, LINF, 0.02)
    assert found.for_classes(4) == found
    assert found.for_classes(3) == found.for_classes(2) == parse(few, LINF, 0.02)
  for text in ('apgd-t', 'pgd-20', 'clean', 'square-10'):
    assert parse(text, LINF, 0.02).for_classes(2) == parse(text, LINF, 0.02)


def test_a_second_opinion_has_an_autoattack_within_it():
  second = parse('autoattack-second', LINF, 0.02)
  assert second.within == parse('autoattack', LINF, 0.02)
  assert second.for_classes(2).within == parse('autoattack-margin', LINF, 0.02)
  for text in ('autoattack', 'pma', 'pgd-20', 'clean'):
    assert parse(text, LINF, 0.02).within is None


@pytest.mark.parametrize(
  'text', ['apgd-ce', 'apgd-t', 'clean', 'autoattack', 'square-10', 'fab-t', 'malt']
)
def test_l1_knows_the_attacks_of_autoattack(text):
  assert parse(text, Threat('l1', 1.0), 0.02).label == text


def test_l1_knows_pgd_but_not_that_of_linf_alone():
  assert parse('pgd-20', Threat('l1', 1.0), 0.25).step_size == 0.25
  assert parse('fgsm', Threat('l1', 1.0), 0.25).step_size == 1.0
  with pytest.raises(UserError, match='^attack: cw_linf needs threat.norm linf, but it is l1$'):
    parse('cw_linf', Threat('l1', 1.0), 0.02)
