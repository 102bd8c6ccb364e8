"""Installs fulllora_jax: pip install -e ."""

import re
from pathlib import Path

from setuptools import find_packages, setup

_ROOT = Path(__file__).parent
_VERSION = re.search(
  r"^__version__ = '(.+)'$",
  (_ROOT / 'fulllora_jax' / '__init__.py').read_text(encoding='utf-8'),
  re.MULTILINE,
).group(1)

# TensorFlow prepares data sets and writes TensorBoard files, on the CPU only.
# tensorflow-cpu, which is far smaller, is built for x86-64 alone.
_X86 = 'platform_machine in "x86_64 AMD64" and sys_platform in "linux win32"'
_OTHER = 'platform_machine not in "x86_64 AMD64" or sys_platform not in "linux win32"'

# The second one writes for Orbax, and holds the lock of a work directory.
_BUCKETS = ['gcsfs>=2024.6', 'google-cloud-storage>=2.18']

setup(
  name='fulllora_jax',
  version=_VERSION,
  description=('Adversarial finetuning of frozen Vision Transformers with LNLoRA adapters'),
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=find_packages(include=['fulllora_jax', 'fulllora_jax.*']),
  package_data={
    'fulllora_jax': ['py.typed', 'core/imagenet_classes.txt', 'data/frost/*', 'models/timm.json']
  },
  install_requires=[
    'absl-py>=2.1',
    'clu>=0.0.12',
    'etils[epath]>=1.9.1',
    'filelock>=3.12',
    'flax>=0.12',
    'grain>=0.2.15',
    'huggingface_hub>=1.0',
    'importlib_resources>=6.0',  # tensorflow-datasets does not declare it
    'jax>=0.10',
    'ml_collections>=1.0',
    'ml_dtypes>=0.4',
    'numpy>=2.0',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.12',
    'pillow>=10.0',
    'pooch>=1.8',
    'requests>=2.31',
    'safetensors>=0.5',
    'scikit-learn>=1.5',
    'tensorboard>=2.19',  # clu's writer imports it
    f'tensorflow-cpu>=2.19; {_X86}',
    f'tensorflow>=2.19; {_OTHER}',
    'tensorflow-datasets>=4.9.8',
  ],
  extras_require={
    # What `benchmark --compare torch` runs beside ours.
    'bench': ['peft>=0.15', 'timm>=1.0', 'torch>=2.6', 'torchvision'],
    'cuda': ['jax[cuda12]'],
    # gcsfs stands in where there is no TensorFlow.
    'gcs': _BUCKETS,
    # flaxmodels: a linen model that is not ours, to adapt.
    'test': [
      'flaxmodels>=0.1.3',
      'mypy>=1.18',
      'pytest>=8.0',
      'pytest-xdist>=3.6',
      'ruff>=0.12',
      *_BUCKETS,
    ],
    'torch': ['safetensors>=0.5', 'timm>=1.0', 'torch>=2.6', 'torchvision'],
    'tpu': ['jax[tpu]', *_BUCKETS],
  },
)
