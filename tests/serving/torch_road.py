"""What `--torch` costs beside the native road: one model, one attack, three ways, by turns.

  pip install torch
  python tests/serving/torch_road.py --workdir runs/digits --attack pgd-20 --images 64

The run itself in JAX; the same weights as a plain PyTorch module (torch_vit.py) behind `--torch`;
and that module under PGD written in PyTorch, without JAX. JAX has one device, as `--torch` has.
"""

import argparse
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_NUM_CPU_DEVICES'] = '1'

import jax
import numpy as np
import torch
from torch_vit import TorchViT

from fulllora_jax import data
from fulllora_jax.evaluation import finished_run, of_torch
from fulllora_jax.evaluation.settings import Plan
from fulllora_jax.experiments.speed import timing
from fulllora_jax.serving import classifier
from fulllora_jax.training import workdir


def main():
  args = _arguments()
  config = workdir.read_config(args.workdir)
  if args.data_dir:
    config.data.dir = str(args.data_dir)
  plan = Plan.of(config)
  attack, threat = plan.attack(args.attack), plan.threat
  test = data.open_dataset(config.data, config.seed).test
  x = test.fetch(np.arange(args.images)).astype(np.float32) / 255
  labels = test.labels[: args.images]
  loaded = classifier.load(args.workdir)
  model = TorchViT(jax.device_get(loaded.variables), loaded.metadata['config']).eval()
  keys = jax.random.split(jax.random.key(0), len(x))
  program = jax.jit(lambda logits_fn, x: attack(keys, logits_fn, x, labels, threat))
  roads = {
    'JAX': finished_run.logits_functions(args.workdir, 'best').logits,
    '--torch': jax.tree_util.Partial(of_torch.logits_function(model)),
  }
  found = {name: np.asarray(program(logits_fn, x)) for name, logits_fn in roads.items()}
  apart = np.abs(found['JAX'] - found['--torch'])
  print(f'pixels of x_adv that differ by more than 1e-4: {(apart > 1e-4).mean():.2%}')
  runs = {name: timing.stopwatch(program, logits_fn, x) for name, logits_fn in roads.items()}
  runs['PyTorch alone'] = timing.stopwatch(
    _pgd, model, x, labels, threat.eps, attack.step_size, attack.steps
  )
  taken = timing.take_turns(runs, args.rounds, warmup=1)
  for name, seconds in taken.items():
    ratio = timing.ratio(seconds, taken['JAX'])
    low, high = ratio.quartiles
    print(
      f'{name:<14} {seconds.median:.2f} s, {len(x) / seconds.median:.1f} images/s, '
      f'{ratio.median:.2f} [{low:.2f}, {high:.2f}] of JAX'
    )


def _pgd(model, x, labels, eps, step_size, steps):
  """Linf PGD as people write it in PyTorch, from the image itself."""
  x, labels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels).long()
  x_adv = x.clone()
  for _ in range(steps):
    x_adv.requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(x_adv), labels, reduction='sum')
    (slope,) = torch.autograd.grad(loss, x_adv)
    x_adv = x + (x_adv.detach() + step_size * slope.sign() - x).clamp(-eps, eps)
    x_adv = x_adv.clamp(0, 1)
  return np.asarray(x_adv)


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='of a run')
  parser.add_argument('--attack', default='pgd-20', help='pgd with steps, linf')
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--data_dir', type=pathlib.Path)
  return parser.parse_args()


if __name__ == '__main__':
  main()
