"""Scoring the weights on held-out images while they train.

Of a union of threats the score is the worst case: the share of images that withstand the validation
attack in the ball of every threat.
"""

from typing import Any

import numpy as np

from fulllora_jax import data
from fulllora_jax.core.trees import Tree
from fulllora_jax.evaluation.evaluator import Evaluation, Evaluator
from fulllora_jax.training import overfitting, turns
from fulllora_jax.training.assemble import Assembly


class Validation:
  """Scores the validation split; the highest score chooses `best`.

  Attributes:
    evaluator: under the threat of the config, of a union under the first.
    best: the score, step and attack of the best validation so far.
    alarm: tells of catastrophic overfitting; None where there is no attack to overfit to.
    good: whether the last validation had no sign of it.
  """

  def __init__(self, assembly: Assembly, split: data.Split):
    config = assembly.config
    apply = assembly.built.model.apply
    self._evaluators = [Evaluator(apply, plan, assembly.mesh) for plan in turns.plans(config)]
    self.evaluator = self._evaluators[0]
    self.good = True
    self._split, self._count = split, config.eval.validation_examples
    self._attack_name = config.eval.validation_attack
    self._attack = self.evaluator.plan.attack(self._attack_name)
    if self._attack.name == 'clean':
      self._evaluators = self._evaluators[:1]
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
    outcomes = {e.plan.norm: self._outcome(e, variables) for e in self._evaluators}
    clean, *_ = (outcome.clean for outcome in outcomes.values())
    scores = {'clean_accuracy': float(clean.mean())}
    text = f'validation at step {step}: clean {scores["clean_accuracy"]:.1%}'
    label, robust = self._attack.label, None
    score = float(np.all([outcome.robust for outcome in outcomes.values()], axis=0).mean())
    if self._attack.name != 'clean':
      each = {norm: float(outcome.robust.mean()) for norm, outcome in outcomes.items()}
      scores['robust_accuracy'] = score
      text += f', {label} {score:.1%}'
      if len(each) > 1:
        scores |= {f'robust_accuracy_{norm}': share for norm, share in each.items()}
        text += f' of the union ({", ".join(f"{norm} {s:.1%}" for norm, s in each.items())})'
        label += f', the worst of {", ".join(each)}'
      # In training each batch meets one threat; the mean over them is what compares with that.
      robust = float(np.mean(list(each.values())))
    why = ''
    if self.alarm is not None:
      found, why = self.alarm.validated(
        self._attack.label, scores['clean_accuracy'], robust, len(clean), self.best['score']
      )
      scores |= found
    self.good = not scores.get(overfitting.FLAG)
    if score > self.best['score'] and (self.good or not self._answered):
      self.best = {'score': score, 'step': step, 'attack': label}
      text += ' (best)'
    return scores, text, why

  def _outcome(self, evaluator: Evaluator, variables: Tree) -> Evaluation:
    attack = evaluator.plan.attack(self._attack_name)
    return evaluator.evaluate(variables, self._split, attack, self._count)

  def notes(self) -> dict[str, Any]:
    """Returns what a checkpoint must keep, as JSON values."""
    return {'best': self.best, 'alarm': self.alarm and self.alarm.notes()}

  def restore(self, notes: dict[str, Any]) -> None:
    """Goes on from earlier `notes`."""
    self.best = notes['best']
    if self.alarm is not None:
      self.alarm.restore(notes.get('alarm'))
