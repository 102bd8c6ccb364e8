"""Trainings in this process that a test may kill after some steps."""

from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.training.loop import Training
from fulllora_jax.training.stepper import Stepper


class Killed(BaseException):
  """Stands for the end of the process."""


def trainer(monkeypatch, programs, key_of, config, dataset, base):
  """Returns train(workdir, kill_after=None) -> Training.

  Args:
    monkeypatch: undoes what is changed for it.
    programs: a dict that keeps each program, so that it is compiled once.
    key_of: algorithm -> what its program is kept under.
    config: the run's; a test may change it before each training.
    dataset: what it learns.
    base: the artefact of the base.
  """
  compile_step, step_of = Stepper.compile, Evaluator._step
  state = {'steps': 0, 'kill_after': None}

  def compile_once(stepper, algorithm, *args):
    key = key_of(algorithm)
    if key not in programs:
      programs[key] = compile_step(stepper, algorithm, *args)

    def step(*args):
      if state['steps'] == state['kill_after']:
        raise Killed
      state['steps'] += 1
      return programs[key](*args)

    return step

  def evaluate_once(self, attack):
    if attack not in programs:
      programs[attack] = step_of(self, attack)
    return programs[attack]

  monkeypatch.setattr(Stepper, 'compile', compile_once)
  monkeypatch.setattr(Evaluator, '_step', evaluate_once)

  def train(workdir, kill_after=None):
    state.update(steps=0, kill_after=kill_after)
    training = Training(config, workdir, dataset, base)
    training.run()
    return training

  return train
