"""The comparisons of configs/: each plans its runs, and says its command."""

import pathlib
import runpy

import numpy as np
import pytest

from fulllora_jax.adapters import adapted, artefact
from fulllora_jax.adapters.methods import METHODS
from fulllora_jax.core import trees as trees_lib
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.compare import plan

ROOT = pathlib.Path(__file__).parents[3]
CONFIGS = ROOT / 'configs'
SCALE_BASE = ROOT / 'docs' / 'results' / 'digits' / 'scale_base.py'
FILES = sorted(CONFIGS.glob('compare_*.py'))
VARIANTS = (
  ('digits', ''),
  ('digits', 'rates'),
  ('digits', 'ablations'),
  ('digits', 'norm'),
  ('digits', 'tiny'),
  ('cifar10', ''),
  ('cifar10', 'deit_s'),
  ('cifar10', 'swin_t'),
  ('cifar10', 'small'),
  ('cifar10', 'cpu'),
  ('cifar10', 'cpu_rates'),
  ('cifar10', 'vit_ti'),
  ('cifar10', 'vit_ti_rates'),
  ('cifar10', 'vit_ti_schedules'),
  ('cifar10', 'vit_ti_ablations'),
  ('cifar10', 'ablations'),
  ('cifar100', ''),
  ('cifar100', 'vit_ti'),
  ('cifar100', 'vit_ti_rates'),
  ('cifar100', 'ablations'),
  ('imagenette', ''),
  ('imagenette', 'vit_ti'),
  ('imagenette', 'vit_ti_rates'),
  ('imagenette', 'ablations'),
)


def load(name, variant=''):
  file = CONFIGS / f'compare_{name}.py'
  return runpy.run_path(str(file))['get_config'](variant)


@pytest.mark.parametrize(('name', 'variant'), VARIANTS)
def test_every_comparison_plans_its_runs(name, variant, capsys):
  comparison = load(name, variant)
  found = plan.runs(comparison, 'runs/x')
  assert len(found) == len(comparison.rows) * len(comparison.seeds)
  assert capsys.readouterr().err == ''
  if variant.startswith(('ablations', 'norm', 'vit_ti')):  # no row is another row
    changes = [str(row.to_dict()) for row in comparison.rows.values()]
    assert len(set(changes)) == len(changes)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_comparison_says_its_command(file):
  assert f'--config configs/{file.name}' in file.read_text()
  with pytest.raises(UserError, match='config variant: unknown'):
    load(file.stem.removeprefix('compare_'), 'tin')


def test_a_scaled_base_computes_the_same(run_python, finished, tmp_path):
  base, scaled = finished.workdir / 'base', tmp_path / 'scaled'
  done = run_python(SCALE_BASE, base, scaled)  # compares the logits itself
  assert done.returncode == 0, done.stderr
  trees = [artefact.read_artefact(run / 'best')[0] for run in (base, scaled)]
  before, after = map(trees_lib.named_leaves, trees)
  changed = [p for p in before if not np.array_equal(before[p], after[p])]
  assert len(changed) == 9  # of one block


def test_digits_compares_every_method():
  rows = load('digits').rows
  assert {row.method for row in rows.values()} == set(METHODS) - {'standard'}


def test_the_small_vit_has_about_six_million_parameters():
  comparison = load('cifar10', 'small')
  built = adapted.build(comparison.experiment, num_classes=10)
  shapes = adapted.shapes(built, (32, 32, 3))
  counts = trees_lib.parameter_counts(shapes, built.mask(shapes))
  assert 5.5e6 < counts['base'] < 6.5e6
  assert counts['fraction'] < 0.06
