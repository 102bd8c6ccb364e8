"""Evaluates a finished run again, or a model that is not ours.

  python -m fulllora_jax.evaluate --workdir runs/digits --attack autoattack
  python -m fulllora_jax.evaluate --workdir runs/cifar10 \\
      --attack clean,pgd-100,cw_linf-20 --eps 2/255,4/255,8/255
  python -m fulllora_jax.evaluate --workdir runs/cifar10 --attack clean --expected pgd-20
  python -m fulllora_jax.evaluate --workdir runs/cifar10 --attack clean --certify sigma=0.25,n=10000
  python -m fulllora_jax.evaluate --workdir runs/cifar10 --attack clean --corruptions all
  python -m fulllora_jax.evaluate --workdir runs/cifar10 --attack clean --union linf:8/255,l2:0.5
  python -m fulllora_jax.evaluate --workdir runs/cifar10 --attack clean --dial 0,0.25,0.5,0.75,1
  python -m fulllora_jax.evaluate --logits my_model:logits --data cifar10 \\
      --attack autoattack --num_examples 1000 --workdir evaluated/my_model
  python -m fulllora_jax.evaluate --torch my_model:model --data cifar10 --image_size 32 \\
      --attack autoattack --num_examples 1000 --workdir evaluated/my_model

The table goes to the terminal, the whole result, the picture of an eps sweep and the adversarial
images of AutoAttack to WORKDIR/evaluations/. A killed AutoAttack goes on with the same command.
"""

from collections.abc import Sequence

from absl import flags

from fulllora_jax import command
from fulllora_jax.config import BESIDE
from fulllora_jax.core import errors


def define_flags() -> None:
  """Defines what is evaluated, and under what."""
  flags.DEFINE_string(
    'workdir', None, 'Of the run; with --logits or --torch, where the result goes.'
  )
  flags.DEFINE_list(
    'attack',
    [],
    'clean, fgsm, pgd-20, cw_linf-20, autoattack, autoattack-second, autoattack-plus, '
    'autoattack-rand, apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square, square-1000, pma, malt, ... '
    'Default: as the run, or autoattack.',
  )
  flags.DEFINE_string(
    'expected',
    None,
    'Attack that measures expected robustness, the mean accuracy over eps, e.g. pgd-20. Default: '
    'none with --attack, else as the run.',
  )
  flags.DEFINE_string(
    'certify',
    None,
    'Certificates of randomised smoothing beside an attack on the smoothed model: sigma=0.25, and '
    'n0=100,n=100000,alpha=0.001 by default. Default: none with --attack, else as the run.',
  )
  flags.DEFINE_string(
    'union',
    None,
    'Several threats, as linf:8/255,l2:0.5,l1:12, each under AutoAttack; worst case per image. '
    'Default: none with --attack, else as the run.',
  )
  flags.DEFINE_string(
    'dial',
    None,
    'Strengths of the adapter from 0, the base, to 1, as 0,0.25,0.5,0.75,1, each under AutoAttack; '
    'for branches. Default: none with --attack, else as the run.',
  )
  flags.DEFINE_string(
    'corruptions',
    None,
    'Common corruptions of the images, at 5 severities: all, or names as fog,frost. Default: none '
    'with --attack, else as the run.',
  )
  flags.DEFINE_string(
    'shifts',
    None,
    'Other test sets of the classes, or of a part of them: imagenet_a,folder:/path. Default: none '
    'with --attack, else as the run.',
  )
  flags.DEFINE_string(
    'verify',
    None,
    'A file of adversarial images, .npz or .pt, that is checked against the model, within --norm '
    'and --eps; by default nothing else is attacked then.',
  )
  flags.DEFINE_string(
    'robustbench',
    None,
    "A FILE.json for the row of RobustBench's leaderboard, and x_adv beside it; what FILE has "
    'already is kept.',
  )
  flags.DEFINE_string('norm', None, 'linf, l2 or l1. Default: as the run.')
  flags.DEFINE_list('eps', [], 'In [0, 1] pixels, e.g. 4/255,8/255. Default: as the run.')
  flags.DEFINE_string('step_size', None, 'Of PGD. Default: as the run, in proportion to eps.')
  flags.DEFINE_integer('restarts', None, 'Of PGD. Default: as the run.')
  flags.DEFINE_list('weights', [], 'Of base, best, last. Default: all')
  flags.DEFINE_string('split', 'test', 'train, validation or test.')
  flags.DEFINE_integer('num_examples', None, 'Chosen at random by the seed; 0: all.')
  flags.DEFINE_integer('seed', None, 'Of attacks and choice of examples. Default: as the run.')
  flags.DEFINE_integer('batch_size', None, 'Default: as the run.')
  flags.DEFINE_enum('precision', 'highest', ['highest', 'default'], 'Of matrix products.')
  flags.DEFINE_enum(
    'dtype', None, ['float32', 'bfloat16'], 'That the model computes in. Default: as the run.'
  )
  flags.DEFINE_string(
    'logits',
    None,
    'module:function of images float32 [B, H, W, C] in [0, 1] to logits '
    '[B, K], to evaluate in place of a run.',
  )
  flags.DEFINE_string('torch', None, 'module:name of a PyTorch model, in place of a run.')
  flags.DEFINE_string('data', None, 'With --logits or --torch: a tfds set, or folder:...')
  flags.DEFINE_integer('image_size', None, 'With --logits or --torch, in pixels.')
  flags.DEFINE_string('data_dir', None, 'Default: as the run.')
  flags.mark_flag_as_required('workdir')


def main(argv: Sequence[str]) -> None:
  """Reads the flags into a config, then evaluates."""
  del argv
  given = flags.FLAGS
  from fulllora_jax.evaluation import users_function
  from fulllora_jax.evaluation.evaluate import evaluate_again
  from fulllora_jax.training import workdir

  command.start_up(beside_torch=bool(given.torch))
  given.logits = users_function.asked(given.logits, given.torch)
  for flag in ('weights', 'dtype') if given.logits else ():
    if given[flag].value:
      raise errors.UserError(
        f'--{flag}: {"--torch" if given.torch else "--logits"} has its own; leave one out'
      )
  if given.torch and given.precision != 'highest':
    raise errors.UserError(
      '--precision: a PyTorch model computes in its own dtype, with exact products; leave it out'
    )
  if not given.logits and (given.data or given.image_size):
    raise errors.UserError(
      '--data, --image_size: they go with --logits or --torch; a run is evaluated on the data it '
      'was made for'
    )
  if given.verify and not given.attack:
    given.attack = ['clean']
  asked = {
    'eval.attacks': tuple(given.attack) or None,
    **{
      f'eval.{name}': '' if given.attack and given[name].value is None else given[name].value
      for name in BESIDE  # of a run only where --attack is not given, else if asked for
    },
    'eval.step_size': given.step_size,
    'eval.restarts': given.restarts,
    'eval.batch_size': given.batch_size,
    'eval.num_examples': given.num_examples,
    'threat.norm': given.norm,
    'model.dtype': given.dtype,
    'data.dir': given.data_dir,
  }
  config = workdir.config_of(given, asked)
  evaluate_again(
    config,
    given.workdir,
    given.weights,
    given.split,
    given.precision,
    logits=given.logits,
    eps=given.eps,
    scale_steps=given.step_size is None,
    seed=given.seed,
    verify=given.verify,
    robustbench=given.robustbench,
  )


if __name__ == '__main__':
  define_flags()
  command.run(main)
