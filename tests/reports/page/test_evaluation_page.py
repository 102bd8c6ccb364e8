"""The page of one evaluation has all that its JSON file says."""

import re

from fulllora_jax.core.statistics import share
from fulllora_jax.reports import results
from fulllora_jax.reports.page import evaluation_page

CLASSES = [{'label': 0, 'num_examples': 10, 'clean': 9, 'num_correct': 4}]
CASCADE = [
  {'attack': 'clean', 'accuracy': 0.9, 'broken': 1, 'seconds': 0.0},
  {'attack': 'apgd-ce', 'accuracy': 0.4, 'broken': 5, 'seconds': 2.0},
]


def record(attack, right, eps='8/255', **more):
  how = {'steps': 0, 'step_size': 0.0, 'restarts': 0, 'norm': 'linf', 'eps': eps}
  how |= {'eps_value': int(eps.split('/')[0]) / 255, 'seed': 0, 'dtype': 'float32'}
  how |= {'matmul_precision': 'highest', 'weights': 'model', 'split': 'test', 'attack': attack}
  return how | share(right, 10) | {'per_class': CLASSES, 'examples': '0', 'notes': []} | more


def result(*evaluations, **more):
  return {
    'dataset': 'pets',
    'logits': 'mine:logits',
    'threat': {'norm': 'linf', 'eps': '8/255', 'eps_value': 8 / 255},
    'evaluations': list(evaluations),
    'label_names': ['<cat>'],
    'versions': {'fulllora_jax': '1.0'},
    'command': 'python -m fulllora_jax.evaluate',
    **more,
  }


def text_of(page):
  return re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', ' ', page))


def test_an_ensemble_is_shown_attack_by_attack_with_a_model_that_is_not_ours():
  found = result(record('clean', 9), record('autoattack', 4, cascade=CASCADE))
  page = evaluation_page(found, {})
  text = text_of(page)
  assert '<h1>mine:logits on pets, evaluated</h1>' in page
  assert 'mine:logits on pets gives 90.0 % clean accuracy and 40.0 % under autoattack' in text
  assert 'It trains' not in text and 'Threat: linf, eps 8/255, pixels in [0, 1].' in text
  assert 'AutoAttack (worst case), model: 40.0 % [16.8, 68.7] of 10 test images' in text
  assert 'apgd-ce 40.0 % 5 2s' in text and '&lt;cat&gt; 10 90.0 % 40.0 %' in text
  assert 'href="#union"' not in page and 'Robust accuracy against eps' not in page


def test_what_was_measured_beside_is_there_under_visible_headings():
  threats = [
    {'norm': norm, 'eps': '0.1', 'eps_value': 0.1, 'broken_alone': alone, 'verified': verified}
    | share(right, 10)
    for norm, right, alone in (('linf', 4, 2), ('l2', 5, 1))
    for verified in ({'outside': 0, 'mismatches': 0},)
  ]
  union = {'weights': 'model', 'split': 'test', 'attack': 'autoattack', 'threats': threats}
  page = evaluation_page(result(record('clean', 9), unions=[union | share(3, 10)]), {})
  assert '<h3>The union of several threats (autoattack, worst case), model: 30.0 %' in page
  assert 'l2, eps 0.1 50.0 [23.7, 76.3] 1' in text_of(page)


def test_several_radii_are_drawn():
  each = [record('pgd', 5, '4/255', steps=9), record('pgd', 3, '8/255', steps=9)]
  page = evaluation_page(result(record('clean', 9), *each), {})
  assert 'model, pgd-9' in page and '<h2 id="radii-title">Robust accuracy against eps' in page


def test_a_run_is_called_by_its_method():
  run = {'method': 'fulllora', 'parameters': {'base': 100, 'trainable': 5, 'fraction': 0.05}}
  assert results.subject(run) == 'FullLoRA adversarial finetuning'
  page = text_of(evaluation_page(result(record('clean', 9), **run), {}))
  assert 'It trains 5 parameters, 5.00 % of the 100 of the base.' in page
