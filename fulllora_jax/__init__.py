"""Adversarial finetuning of frozen Vision Transformers with LNLoRA adapters.

FullLoRA (Yuan et al., IEEE TIP 2025, arXiv 2401.01752) in JAX and Flax. The
names below load on first use, so importing the package has no side effects.
"""

import importlib

__version__ = '0.1.0'

# Name -> the module that has it.
_HOMES = {
  'AdaptedModel': 'adapters',
  'LNLoRA': 'adapters',
  'ManyAdapters': 'serving.many_adapters',
  'RobustClassifier': 'serving.classifier',
  'Threat': 'attacks',
  'attach': 'adapters',
  'load': 'serving.classifier',
  'pgd': 'attacks',
  'train_and_evaluate': 'training.run',
}
# Public name -> module.
_MODULES = {
  'adapters': 'adapters',
  'attacks': 'attacks',
  'data': 'data',
  'export': 'export',
  'models': 'models',
  'pretrained': 'pretrained',
  'torch_adapter': 'serving.torch_adapter',
  'variants': 'experiments.variants',
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{_MODULES[name]}')
  if name in _HOMES:
    module = importlib.import_module(f'{__name__}.{_HOMES[name]}')
    return getattr(module, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *_HOMES, *_MODULES])
