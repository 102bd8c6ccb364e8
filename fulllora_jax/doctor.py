"""Is the robust accuracy of a run, or of a model that is not ours, believable?

  python -m fulllora_jax.doctor --workdir runs/digits
  python -m fulllora_jax.doctor --logits my_model:logits --data cifar10 \\
      --image_size 32 --eps 8/255 --deployed my_service:logits
  python -m fulllora_jax.doctor --torch my_model:model --data cifar10 --image_size 32

Says for each check what was seen, why it matters and what to do. Exits with 1
if something is wrong, with 2 on bad input.
"""

import sys
from collections.abc import Sequence

from absl import flags

from fulllora_jax import command
from fulllora_jax.core import errors


def define_flags() -> None:
  """Defines what is examined, and under which threat."""
  flags.DEFINE_string('workdir', None, 'Of the run; with --logits or --torch, of its evaluations.')
  flags.DEFINE_string('weights', 'best', 'base, best or last.')
  flags.DEFINE_string(
    'logits',
    None,
    'module:function of images float32 [B, H, W, C] in [0, 1] to logits [B, K], in place of a run.',
  )
  flags.DEFINE_string('torch', None, 'module:name of a PyTorch model, in place of a run.')
  flags.DEFINE_string(
    'deployed',
    None,
    'module:function of NumPy images to logits, in any framework, or torch:module:name: what is in '
    'use, to be compared.',
  )
  flags.DEFINE_string('data', None, 'With --logits or --torch: a tfds set, or folder:...')
  flags.DEFINE_integer('image_size', None, 'With --logits or --torch, in pixels.')
  flags.DEFINE_string('data_dir', None, 'Default: as the run.')
  flags.DEFINE_string('norm', None, 'linf, l2 or l1. Default: as the run.')
  flags.DEFINE_string('eps', None, 'In [0, 1] pixels. Default: as the run.')
  flags.DEFINE_string('split', 'test', 'train, validation or test.')
  flags.DEFINE_integer('num_examples', 128, 'To look at; 0: all.')
  flags.DEFINE_integer('seed', 0, 'Of the attacks and the choice of examples.')


def main(argv: Sequence[str]) -> None:
  """Examines, prints the findings, and exits with 1 if one is wrong."""
  del argv
  given = flags.FLAGS
  from fulllora_jax.evaluation import users_function
  from fulllora_jax.evaluation.diagnosis.examine import examine_and_say
  from fulllora_jax.training import workdir

  in_torch = given.torch or (given.deployed or '').startswith('torch:')
  command.start_up(beside_torch=bool(in_torch))
  given.logits = users_function.asked(given.logits, given.torch)
  if not given.logits and not given.workdir:
    raise errors.UserError(
      '--workdir: give the work directory of a run, or --logits or --torch=module:function'
    )
  asked = {'threat.norm': given.norm, 'threat.eps': given.eps}
  config = workdir.config_of(given, asked | {'data.dir': given.data_dir})
  images = (given.split, given.num_examples, given.seed)
  healthy = examine_and_say(
    config, given.workdir, given.weights, given.logits, *images, given.deployed
  )
  if not healthy:
    sys.exit(1)


if __name__ == '__main__':
  define_flags()
  command.run(main)
