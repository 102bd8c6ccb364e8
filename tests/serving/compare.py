"""Our AutoAttack beside the authors' on one trained model and its images.

  git clone https://github.com/fra31/auto-attack   # tested at a39220048b3c
  pip install torch
  python tests/serving/compare.py --workdir runs/digits --reference auto-attack

Both attack the same images of the test split: theirs a plain PyTorch module
with the run's weights (torch_vit.py), ours the run itself. Prints what each of
the attacks left, how many images both call robust or both call broken, and
the images per second of either, whose ratio is the speed-up. One after the
other, on all cores each; nothing else should run meanwhile.
"""

import argparse
import json
import os
import pathlib
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# JAX on a CPU is fastest with a device for each core.
os.environ.setdefault('JAX_NUM_CPU_DEVICES', str(len(os.sched_getaffinity(0))))

import jax
import numpy as np
import torch
from torch_vit import TorchViT

from fulllora_jax import data
from fulllora_jax.attacks import Threat, autoattack
from fulllora_jax.evaluation import finished_run
from fulllora_jax.serving import classifier
from fulllora_jax.training import workdir

_TORCH_NORMS = {'linf': 'Linf', 'l2': 'L2'}
_BATCH = 32  # of ours, for each device


def main():
  args = _arguments()
  sys.path.insert(0, str(args.reference))
  config = workdir.read_config(args.workdir)
  if args.data_dir:
    config.data.dir = str(args.data_dir)
  threat = Threat(args.norm, args.eps or config.threat.eps)
  test = data.open_dataset(config.data, config.seed).test
  chosen = data.choose_examples(len(test), args.num_examples, args.seed)
  x = test.fetch(chosen).astype(np.float32) / 255
  labels = test.labels[chosen]
  loaded = classifier.load(args.workdir, which=args.weights)
  torch_model = TorchViT(jax.device_get(loaded.variables), loaded.metadata['config']).eval()
  apart = np.abs(_torch_logits(torch_model, x) - loaded.logits(x)).max()
  print(f'logits of the two models differ by at most {apart:.2g}')

  ours = _ours(args, threat, x, labels)
  theirs = _theirs(args, threat, torch_model, x, labels)
  agree = (ours['robust'] == theirs['robust']).mean()
  speedup = theirs['seconds'] / ours['seconds']
  print(f'\n{args.workdir} {threat.norm} eps {threat.eps:g}, {len(x)} images')
  for name, one in (('ours', ours), ('reference', theirs)):
    steps = ', '.join(f'{k} {100 * v:.2f}' for k, v in one['after'].items())
    print(
      f'{name:<9}  robust {100 * one["robust"].mean():.2f} %  ({steps})  '
      f'{one["seconds"]:.0f} s, {len(x) / one["seconds"]:.2f} images/s'
    )
  print(f'robust flags agree on {100 * agree:.2f} %; speed-up {speedup:.2f}')
  if args.output:
    args.output.mkdir(parents=True, exist_ok=True)
    name = f'{args.workdir.name}-{threat.norm}'
    summary = {'agreement': agree, 'speedup': speedup, 'images': len(x)}
    for key, one in (('ours', ours), ('reference', theirs)):
      np.savez(args.output / f'{name}-{key}.npz', **one['arrays'])
      summary[key] = {
        'robust': float(one['robust'].mean()),
        'seconds': one['seconds'],
        'after': one['after'],
      }
    text = json.dumps(summary, indent=2)
    (args.output / f'{name}.json').write_text(text)


def _ours(args, threat, x, labels):
  logits_fn = finished_run.logits_functions(args.workdir, args.weights).logits
  started = time.perf_counter()
  result = autoattack(
    jax.random.key(args.seed),
    logits_fn,
    x,
    labels,
    threat,
    batch_size=_BATCH * jax.device_count(),
    say=print,
  )
  return {
    'seconds': time.perf_counter() - started,  # with compilation
    'robust': result.robust,
    'after': dict(zip(result.cascade.attacks, result.cascade.accuracy, strict=True)),
    'arrays': {'x_adv': result.x_adv, 'robust': result.robust},
  }


def _theirs(args, threat, model, x, labels):
  from autoattack import AutoAttack

  images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
  targets = torch.from_numpy(labels).long()
  attack = AutoAttack(
    model,
    norm=_TORCH_NORMS[threat.norm],
    eps=threat.eps,
    seed=args.seed,
    device='cpu',
    version='standard',
  )
  after = {}
  say = attack.logger.log

  def note(line):
    say(line)
    if line.startswith('initial accuracy: '):
      after['clean'] = _percent(line.split()[-1])
    elif line.startswith('robust accuracy after '):
      words = line.split()
      after[words[3].strip(':').lower()] = _percent(words[4])

  attack.logger.log = note
  started = time.perf_counter()
  x_adv = attack.run_standard_evaluation(images, targets, bs=args.batch_size)
  seconds = time.perf_counter() - started
  x_adv = x_adv.numpy().transpose(0, 2, 3, 1)
  robust = _torch_logits(model, x_adv).argmax(1) == labels
  return {
    'seconds': seconds,
    'robust': robust,
    'after': after,
    'arrays': {'x_adv': x_adv, 'robust': robust},
  }


def _torch_logits(model, x):
  with torch.no_grad():
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    return model(images).numpy()


def _percent(text):
  return float(text.rstrip('%')) / 100


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  path = pathlib.Path
  parser.add_argument('--workdir', type=path, required=True, help='of a run')
  parser.add_argument('--reference', type=path, required=True)
  parser.add_argument('--weights', default='best')
  parser.add_argument('--norm', default='linf', choices=_TORCH_NORMS)
  parser.add_argument('--eps', help='default: as the run')
  parser.add_argument('--num_examples', type=int, default=0, help='0: all')
  parser.add_argument('--batch_size', type=int, default=250, help='of theirs')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--data_dir', type=path)
  parser.add_argument('--output', type=path, help='where the results go')
  return parser.parse_args()


if __name__ == '__main__':
  main()
