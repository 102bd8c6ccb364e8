"""Evaluates a finished run again, without training.

  python -m fulllora_jax.evaluate --workdir runs/cifar10 \\
      --attack pgd-100,cw_linf-20 --eps 4/255

The table goes to the terminal, the whole result to RUN/evaluations/.
"""

from collections.abc import Sequence

from absl import flags

from fulllora_jax import errors


def define_flags() -> None:
  """Defines --workdir and what may differ from the run's own evaluation."""
  flags.DEFINE_string('workdir', None, 'Of the run to evaluate.')
  flags.DEFINE_list(
    'attack', [], 'clean, fgsm, pgd-20, cw_linf-20, ... Default: as the run.'
  )
  flags.DEFINE_string('norm', None, 'linf or l2. Default: as the run.')
  flags.DEFINE_string(
    'eps', None, 'In [0, 1] pixels, e.g. 8/255. Default: as the run.'
  )
  flags.DEFINE_string('step_size', None, 'Likewise.')
  flags.DEFINE_integer('restarts', None, 'Default: as the run.')
  flags.DEFINE_list('weights', [], 'Of base, best, last. Default: all')
  flags.DEFINE_string('split', 'test', 'train, validation or test.')
  flags.DEFINE_integer(
    'num_examples', None, 'Spread evenly over the split; 0: all.'
  )
  flags.DEFINE_integer('batch_size', None, 'Default: as the run.')
  flags.DEFINE_enum(
    'precision', 'highest', ['highest', 'default'], 'Of matrix products.'
  )
  flags.DEFINE_string('data_dir', None, 'Default: as the run.')
  flags.mark_flag_as_required('workdir')


def main(argv: Sequence[str]) -> None:
  """Reads the flags into the run's config, then evaluates."""
  del argv
  given = flags.FLAGS
  from fulllora_jax import results, sharding, workdir  # JAX is slow to import

  sharding.enable_compilation_cache()
  config = workdir.read_config(given.workdir)
  for part, field, flag in (
    ('eval', 'attacks', tuple(given.attack) or None),
    ('eval', 'step_size', given.step_size),
    ('eval', 'restarts', given.restarts),
    ('eval', 'batch_size', given.batch_size),
    ('eval', 'num_examples', given.num_examples),
    ('threat', 'norm', given.norm),
    ('threat', 'eps', given.eps),
    ('data', 'dir', given.data_dir),
  ):
    if flag is not None:
      config[part][field] = flag
  results.evaluate_again(
    config, given.workdir, given.weights, given.split, given.precision
  )


if __name__ == '__main__':
  define_flags()
  errors.run(main)
