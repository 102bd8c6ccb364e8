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
    good: whether the last validation had no sign of it.
  """

  def __init__(self, assembly: Assembly, split: data.Split):
    config = assembly.config
    plan = Plan.of(config)
    self.evaluator = Evaluator(assembly.built.model.apply, plan, assembly.mesh)
    self.good = True
    self._split, self._count = split, config.eval.validation_examples
    self._attack = plan.attack(config.eval.validation_attack)
    self.begin(assembly)

  def begin(self, assembly: Assembly) -> None:
    """Forgets all scores, before the first step of what was put together."""
    config, trained_with = assembly.config, assembly.algorithm.attack
    self.best: dict[str, Any] = {'score': -1.0}
    self.alarm = None
    if trained_with is not None:
      self.alarm = overfitting.Alarm(trained_with, config.train.batch_size)
    # Where a collapse is answered, what collapsed is no candidate.
    self._answered = overfitting.answer(config) != 'warn'

  def __call__(self, step: int, variables: Tree) -> tuple[dict[str, float], str, str]:
    """Scores variables that are on the mesh; `best` has this step if they are.

    Returns:
      The scores, for metrics.jsonl; what to say of them; and the sign of catastrophic overfitting
      where one begins, else ''.
    """
    outcome = self.evaluator.evaluate(variables, self._split, self._attack, self._count)
    scores = {'clean_accuracy': float(outcome.clean.mean())}
    text = f'validation at step {step}: clean {scores["clean_accuracy"]:.1%}'
    label, score = self._attack.label, float(outcome.robust.mean())
    attacked = self._attack.name != 'clean'
    if attacked:
      scores['robust_accuracy'] = score
      text += f', {label} {score:.1%}'
    why = ''
    if self.alarm is not None:
      robust, images = score if attacked else None, len(outcome.clean)
      found, why = self.alarm.validated(
        label, scores['clean_accuracy'], robust, images, self.best['score']
      )
      scores |= found
    self.good = not scores.get(overfitting.FLAG)
    if score > self.best['score'] and (self.good or not self._answered):
      self.best = {'score': score, 'step': step, 'attack': label}
      text += ' (best)'
    return scores, text, why

  def notes(self) -> dict[str, Any]:
    """Returns what a checkpoint must keep, as JSON values."""
    return {'best': self.best, 'alarm': self.alarm and self.alarm.notes()}

  def restore(self, notes: dict[str, Any]) -> None:
    """Goes on from earlier `notes`."""
    self.best = notes['best']
    if self.alarm is not None:
      self.alarm.restore(notes.get('alarm'))
