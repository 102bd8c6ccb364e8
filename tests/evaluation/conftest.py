"""Fixtures of evaluations: the linear model of digits."""

import pytest

LINEAR = ('--logits=linear_digits:logits', '--data=digits', '--image_size=8')


@pytest.fixture
def linear(request, evaluate, tmp_path):
  """Evaluates the linear model, in tmp_path/run unless said, under what ALWAYS of the file says."""
  always = getattr(request.module, 'ALWAYS', ())

  def run(*args, workdir='run'):
    return evaluate(*LINEAR, f'--workdir={tmp_path / workdir}', *always, *args)

  run.arguments = (*LINEAR, *always)
  run.folder = tmp_path / 'run' / 'evaluations'
  return run
