"""python -m fulllora_jax.main: what it prints, and bad input in one line."""

import json
import re
import sys

import pytest

import fulllora_jax


def the_error(process):
  """The one line that bad input is shown by; other lines are progress."""
  assert process.returncode == 2, process.stderr
  assert 'Traceback' not in process.stderr
  lines = process.stderr.splitlines()
  errors = [line for line in lines if line.startswith('error: ')]
  assert len(errors) == 1, process.stderr
  assert lines[-1] == errors[0]
  return errors[0]


def test_a_run_says_what_it_does(finished):
  for words in (
    'base: vit by method standard',
    'fulllora: adversarial finetuning',
    '890 parameters learn: 3',
    'step 12/12  loss ',
    'validation at step 5: clean',
    'base  clean',
    'last  pgd-2',
    'threat: linf, eps 0.1',
    f'report: {finished.workdir}/report.md',
  ):
    assert words in finished.stderr
  assert 'warning' not in finished.stderr


def test_a_report_says_how_the_run_was_started(finished):
  report = json.loads((finished.workdir / 'report.json').read_text())
  assert report['command'].startswith('python -m fulllora_jax.main --config=')
  assert report['command'].endswith(f'--workdir={finished.workdir}')
  for name in ('report.md', 'report.html'):
    assert report['command'] in (finished.workdir / name).read_text()


def test_training_imports_no_tensorflow(finished):
  assert {'jax', 'orbax', 'tensorflow_datasets', 'grain'} <= finished.modules
  wrong = ('tensorflow', 'torch', 'tensorboard')
  assert not [m for m in finished.modules if m.split('.')[0] in wrong]


@pytest.mark.parametrize(
  'flags, words',
  [
    (['--config.adapter.rnak=2'], 'unknown config field: .*"rank"'),
    (['--config.adapter.rank=four'], 'config.adapter.rank.*four'),
    (['--workdir=/proc/run'], '--workdir: cannot write to /proc/run'),
    (['--config.data.name=no_such_set'], 'no_such_set'),
  ],
)  # fmt: skip
def test_bad_input_is_one_line(run_here, small_command, tmp_path, flags, words):
  command = (*small_command, f'--workdir={tmp_path}/run', *flags)
  assert re.search(words, the_error(run_here(*command)))


@pytest.mark.parametrize(
  'module, file, field',
  [
    ('main', 'digits', 'config.threat'),
    ('compare', 'compare_digits', 'config.experiment.threat'),
    ('benchmark', 'digits', 'config.threat'),
  ],
)
def test_a_norm_without_a_radius_is_one_line(run_here, module, file, field):
  flags = (f'--config=configs/{file}.py', f'--{field}.norm=l2')
  done = run_here('-m', f'fulllora_jax.{module}', *flags)
  assert f'--{field}.norm: each norm has radii of' in the_error(done)
  assert f'give --{field}.eps too' in the_error(done)


def test_a_missing_config_is_one_line(run_here):
  done = run_here('-m', 'fulllora_jax.main', '--config=configs/none.py')
  assert "No such file or directory: 'configs/none.py'" in the_error(done)


def test_a_base_that_was_trained_on_test_images_is_refused(
  run_here, small_command, finished, tmp_path, one_device
):
  error = the_error(
    run_here(
      *small_command,
      f'--workdir={tmp_path}/run',
      f'--config.base.source={finished.workdir}/base',
      '--config.data.train_split=train[:90%]',
      '--config.data.test_split=train[90%:]',
    )
  )
  assert 'was trained on 144 of the 144 test images' in error and 'the splits of that run' in error


def test_a_run_that_diverges_ends_with_one_line(
  run_here, small_command, finished, tmp_path, one_device
):
  error = the_error(
    run_here(
      *small_command,
      f'--workdir={tmp_path}/run',
      f'--config.base.source={finished.workdir}/base',
      '--config.optimizer.learning_rate=1e30',
      '--config.optimizer.clip=0',
      '--config.schedule.warmup=0',
      '--config.train.max_skipped=0',
    )
  )
  assert 'step 2: the loss is nan' in error
  assert 'the gradient of lnlora/' in error


def test_import_is_lazy(run_python):
  code = 'import fulllora_jax, sys; print(sorted(sys.modules))'
  done = run_python('-c', code)
  for heavy in ('jax', 'flax', 'numpy', 'tensorflow', 'fulllora_jax.training.run'):
    assert f"'{heavy}'" not in done.stdout


def test_every_public_name_is_there():
  assert 'load' in fulllora_jax.__all__
  for name in fulllora_jax.__all__:
    assert getattr(fulllora_jax, name).__name__ == name
    assert name in dir(fulllora_jax)
  assert fulllora_jax.attacks.Threat is fulllora_jax.Threat
  for module in ('adapters', 'attacks', 'data', 'models'):
    assert getattr(fulllora_jax, module) is sys.modules[f'fulllora_jax.{module}']
  with pytest.raises(AttributeError, match="no attribute 'Thraet'"):
    _ = fulllora_jax.Thraet
