"""Evaluates a finished run again, without training.

  python -m fulllora_jax.evaluate --workdir runs/cifar10 \\
      --attack pgd-100,cw_linf-20 --eps 4/255

The table goes to the terminal, the whole result to RUN/evaluations/.
"""

from collections.abc import Sequence

from absl import flags

from fulllora_jax import errors

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of the run to evaluate.')
_ATTACK = flags.DEFINE_list(
  'attack', [], 'clean, fgsm, pgd-20, cw_linf-20, ... Default: as the run.'
)
_NORM = flags.DEFINE_string('norm', None, 'linf or l2. Default: as the run.')
_EPS = flags.DEFINE_string(
  'eps', None, 'In [0, 1] pixels, e.g. 8/255. Default: as the run.'
)
_STEP_SIZE = flags.DEFINE_string('step_size', None, 'Likewise.')
_RESTARTS = flags.DEFINE_integer('restarts', None, 'Default: as the run.')
_WEIGHTS = flags.DEFINE_list('weights', [], 'Of base, best, last. Default: all')
_SPLIT = flags.DEFINE_string('split', 'test', 'train, validation or test.')
_NUM_EXAMPLES = flags.DEFINE_integer(
  'num_examples', None, 'Spread evenly over the split; 0: all.'
)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', None, 'Default: as the run.')
_PRECISION = flags.DEFINE_enum(
  'precision', 'highest', ['highest', 'default'], 'Of matrix products.'
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Default: as the run.')
flags.mark_flag_as_required('workdir')


def main(argv: Sequence[str]) -> None:
  """Reads the flags into the run's config, then evaluates."""
  del argv
  from fulllora_jax import results, sharding, workdir  # JAX is slow to import

  sharding.enable_compilation_cache()
  config = workdir.read_config(_WORKDIR.value)
  for part, field, flag in (
    ('eval', 'attacks', tuple(_ATTACK.value) or None),
    ('eval', 'step_size', _STEP_SIZE.value),
    ('eval', 'restarts', _RESTARTS.value),
    ('eval', 'batch_size', _BATCH_SIZE.value),
    ('eval', 'num_examples', _NUM_EXAMPLES.value),
    ('threat', 'norm', _NORM.value),
    ('threat', 'eps', _EPS.value),
    ('data', 'dir', _DATA_DIR.value),
  ):
    if flag is not None:
      config[part][field] = flag
  results.evaluate_again(
    config, _WORKDIR.value, _WEIGHTS.value, _SPLIT.value, _PRECISION.value
  )


if __name__ == '__main__':
  errors.run(main)
