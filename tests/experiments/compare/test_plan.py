import pathlib

import pytest
import small_digits

from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.compare import plan


@pytest.fixture
def small():
  c = plan.default(small_digits.get_config())
  c.name = 'small'
  c.rows['fulllora'] = {'method': 'fulllora'}
  c.rows['full'] = {'method': 'full', 'optimizer': {'learning_rate': 1e-3}}
  c.seeds, c.references = (3, 5), ('full',)
  return c


def test_runs_are_rows_times_seeds(small):
  found = plan.runs(small, 'runs/x')
  assert [(r.row, r.seed) for r in found] == [
    ('full', 3), ('fulllora', 3), ('full', 5), ('fulllora', 5),
  ]  # fmt: skip
  names = {run.config.name for run in found}
  assert len(names) == len({run.workdir for run in found}) == 4


def test_a_run_is_the_experiment_with_its_row(small):
  small.experiment.seed = 7
  (run,) = plan.runs(small, 'runs/x', ['full'], [5])
  assert run.title == 'full, seed 5'
  assert run.workdir == pathlib.Path('runs/x/runs/full-5')
  config = run.config
  assert (config.method, config.optimizer.learning_rate) == ('full', 1e-3)
  assert (config.seed, config.data.seed) == (5, 7)  # the split is the base's
  assert config.base.source == 'runs/x/base'
  assert config.train.to_dict() == small.experiment.train.to_dict()
  assert small.experiment.method == 'fulllora'  # it is not changed


def test_a_comparison_may_live_in_a_bucket(small):
  (run,) = plan.runs(small, 'gs://bucket/x', ['full'], [5])
  assert str(run.workdir) == 'gs://bucket/x/runs/full-5'
  assert run.config.base.source == 'gs://bucket/x/base'


def test_the_base_is_the_experiments(small):
  config = plan.base_config(small)
  assert config.base.source == small.experiment.base.source == 'train'
  assert config.seed == small.experiment.seed and config.data.seed is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'threat': {'eps': '0.2'}}, r'rows\.bad: it changes threat\.eps to .0\.2'),
    ({'data': {'image_size': 4}}, r'rows\.bad: it changes data\.image_size'),
    ({'eval': {'attacks': ('clean',)}}, r'rows\.bad: it changes eval\.attacks'),
    ({'base': {'source': 'x'}}, r'rows\.bad: it changes base\.source'),
    ({'model': {'depth': 9}}, r'rows\.bad: it changes model\.depth'),
    ({'seed': 1}, r'rows\.bad: it changes seed'),
    (
      {'optimizer': {'learning_rat': 1.0}},
      r'unknown field optimizer\.learning_rat; did you mean optimizer\.learn',
    ),
    ({'adaptor': {'rank': 1}}, r'unknown field adaptor\.rank; did you mean'),
    ({'adapter': {'rank': 'two'}}, r'rows\.bad: adapter\.rank: '),
    ({'method': 'fulllore'}, r'rows\.bad: method: unknown .*did you mean full'),
    ({'attack': {'steps': 0}}, r'rows\.bad: attack\.steps'),
  ],
)
def test_a_row_that_is_wrong_is_named(small, changes, message):
  small.rows['bad'] = changes
  with pytest.raises(UserError, match=message):
    plan.runs(small, 'runs/x')


def test_how_a_model_is_computed_is_free(small):
  small.rows['remat'] = {'model': {'remat': 'blocks'}}
  assert len(plan.runs(small, 'runs/x', ['remat'])) == 2


@pytest.mark.parametrize(
  ('rows', 'seeds', 'message'),
  [
    (['fullora'], (), r"--rows: unknown 'fullora'; known: .*; did you mean fulllora"),
    ((), [4], "--seeds: unknown '4'; known: 3, 5"),
  ],
)
def test_unknown_parts_are_refused(small, rows, seeds, message):
  with pytest.raises(UserError, match=message):
    plan.runs(small, 'runs/x', rows, seeds)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('seeds', (), 'seeds .*give at least one'),
    ('seeds', (0, -1), 'seeds -1: it must be in 0..4294967295'),
    ('seeds', (2**32,), 'seeds 4294967296: it must be in'),
    ('seeds', ('0',), 'seeds 0: it must be a whole number'),
    ('seeds', (1, 1), 'seeds .*each once'),
    ('references', ('ful',), "references: unknown 'ful'; known: .*; did you mean full"),
    ('headline', 'pgd-9', "headline: unknown 'pgd-9'; known: clean, pgd-2"),
  ],
)
def test_a_comparison_that_is_wrong_is_refused(small, field, value, message):
  small[field] = value
  with pytest.raises(UserError, match=message):
    plan.runs(small, 'runs/x')


@pytest.mark.parametrize('label', ['', ' ', 'a/b', '/tmp/a', 'a\nb', 'a\0'])
def test_a_label_that_is_no_name_of_a_folder_is_refused(small, label):
  small.rows[label] = {'method': 'linear'}
  with pytest.raises(UserError, match='rows: label .* names folders too') as caught:
    plan.runs(small, 'runs/x')
  assert '\n' not in str(caught.value)


def test_no_rows_and_no_attack_are_refused(small):
  empty = plan.default(small_digits.get_config())
  with pytest.raises(UserError, match='rows: the comparison has none'):
    plan.runs(empty, 'runs/x')
  small.experiment.method = 'standard'
  with pytest.raises(UserError, match='method standard: it trains without'):
    plan.runs(small, 'runs/x')
