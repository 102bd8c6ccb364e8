"""Scoring the weights on held-out images while they train."""

from typing import Any

from fulllora_jax import data
from fulllora_jax.core.trees import Tree
from fulllora_jax.evaluation.evaluator import Evaluator
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.training import overfitting
from fulllora_jax.training.assemble import Assembly


class Validation:
  """Scores the validation split; the highest score chooses `best`.

  Attributes:
    evaluator: under the threat of the config.
    best: the score, step and attack of the best validation so far.
    alarm: tells of catastrophic overfitting; None where there is no attack to overfit to.
  """

  def __init__(self, assembly: Assembly, split: data.Split):
    config = assembly.config
    plan = Plan.of(config)
    self.evaluator = Evaluator(assembly.built.model.apply, plan, assembly.mesh)
    self.best: dict[str, Any] = {'score': -1.0}
    self._split, self._count = split, config.eval.validation_examples
    self._attack = plan.attack(config.eval.validation_attack)
    trained_with = assembly.algorithm.attack
    self.alarm = None
    if trained_with is not None and self._attack.name != 'clean':
      self.alarm = overfitting.Alarm(trained_with.label)

  def __call__(self, step: int, variables: Tree) -> tuple[dict[str, float], str]:
    """Scores variables that are on the mesh; `best` has this step if they are.

    Returns:
      The scores, for metrics.jsonl, and what to say of them.
    """
    outcome = self.evaluator.evaluate(variables, self._split, self._attack, self._count)
    scores = {'clean_accuracy': float(outcome.clean.mean())}
    text = f'validation at step {step}: clean {scores["clean_accuracy"]:.1%}'
    label, score = self._attack.label, float(outcome.robust.mean())
    if self._attack.name != 'clean':
      scores['robust_accuracy'] = score
      text += f', {label} {score:.1%}'
    if self.alarm is not None:
      scores |= self.alarm.validated(step, label, score, self.best['score'])
    if score > self.best['score']:
      self.best = {'score': score, 'step': step, 'attack': label}
      text += ' (best)'
    return scores, text

  def notes(self) -> dict[str, Any]:
    """Returns what a checkpoint must keep, as JSON values."""
    return {'best': self.best, 'alarm': self.alarm and self.alarm.notes()}

  def restore(self, notes: dict[str, Any]) -> None:
    """Goes on from earlier `notes`."""
    self.best = notes['best']
    if self.alarm is not None:
      self.alarm = overfitting.Alarm(self.alarm.attack, notes.get('alarm'))
