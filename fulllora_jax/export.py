"""Exports a finished run to files that need no work directory.

  python -m fulllora_jax.export --workdir runs/digits --to safetensors
  python -m fulllora_jax.export --workdir runs/digits --to safetensors \\
      --with_base --output digits.safetensors
  python -m fulllora_jax.export --workdir runs/digits --to stablehlo

safetensors: the trained leaves (adapter and head), or with --with_base every
leaf; names and header are those of serving/adapter_file.py. stablehlo: the
whole model as a program for jax.export.deserialize, any batch size, on cpu,
cuda and tpu, with its own JSON beside it (serving/program.py).

A file is read back and its logits compared with the run's before it gets its
name. Files go to WORKDIR/export/ unless --output says another place.
"""

from collections.abc import Sequence

from absl import flags

from fulllora_jax import command
from fulllora_jax.core.errors import UserError
from fulllora_jax.serving.export import Written, read_safetensors, to_safetensors, to_stablehlo
from fulllora_jax.serving.program import read as load_stablehlo

__all__ = ['Written', 'load_stablehlo', 'read_safetensors', 'to_safetensors', 'to_stablehlo']


def define_flags() -> None:
  """Defines what is exported, and to where."""
  flags.DEFINE_string('workdir', None, 'Of the run; it may be gs://...')
  flags.DEFINE_enum('to', None, ['safetensors', 'stablehlo'], 'The kind of file.')
  flags.DEFINE_enum('weights', 'best', ['best', 'last'], 'Of the run.')
  flags.DEFINE_string('output', None, 'The file. Default: in WORKDIR/export/.')
  flags.DEFINE_string('base', None, 'Of the run, where it is not where the run had it.')
  flags.DEFINE_bool('with_base', False, 'With --to=safetensors: the frozen leaves too.')
  flags.mark_flags_as_required(['workdir', 'to'])


def main(argv: Sequence[str]) -> None:
  """Writes the file and says what it is."""
  del argv
  given = flags.FLAGS
  command.start_up()
  common = (given.workdir, given.output, given.weights, given.base)
  if given.to == 'safetensors':
    written = to_safetensors(*common, with_base=given.with_base)
  elif given.with_base:
    raise UserError('--with_base: a stablehlo program has the base inside; leave it out')
  else:
    written = to_stablehlo(*common)
  print(
    f'{written.path}: {written.size:,} bytes; read back, its logits differ by '
    f"at most {written.difference:.2g} from the run's"
  )


if __name__ == '__main__':
  define_flags()
  command.run(main)
