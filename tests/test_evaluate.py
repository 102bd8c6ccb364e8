"""python -m fulllora_jax.evaluate."""

import json

EVALUATE = ('-m', 'fulllora_jax.evaluate')


def test_flags_say_what_is_evaluated(run_python, finished_copy):
  done = run_python(
    *EVALUATE,
    f'--workdir={finished_copy}',
    '--attack=clean,pgd-3',
    '--norm=l2',
    '--eps=1/2',
    '--step_size=0.2',
    '--restarts=2',
    '--weights=best',
    '--split=train',
    '--num_examples=40',
    '--batch_size=32',
    '--precision=default',
  )
  assert done.returncode == 0, done.stderr
  path = finished_copy / 'evaluations' / '001.json'
  assert f'result: {path}' in done.stderr
  clean, attacked = json.loads(path.read_text())['evaluations']
  assert clean['attack'] == 'clean'
  said = {
    'attack': 'pgd', 'steps': 3, 'norm': 'l2', 'eps': '1/2', 'eps_value': 0.5,
    'step_size': 0.2, 'restarts': 2, 'weights': 'best', 'split': 'train',
    'num_examples': 40, 'matmul_precision': 'default',
  }  # fmt: skip
  assert said.items() <= attacked.items()
  assert attacked['num_correct'] <= clean['num_correct']


def test_no_run_is_one_line(run_python, tmp_path):
  done = run_python(*EVALUATE, f'--workdir={tmp_path}/nowhere')
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert done.stderr.startswith('error: --workdir: ')
  assert 'holds no run' in done.stderr
