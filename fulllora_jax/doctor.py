"""Is the robust accuracy of a run, or of a model that is not ours, believable?

  python -m fulllora_jax.doctor --workdir runs/digits
  python -m fulllora_jax.doctor --logits my_model:logits --data cifar10 \\
      --image_size 32 --eps 8/255

Says for each check what was seen, why it matters and what to do. Exits with 1
if something is wrong, with 2 on bad input.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from fulllora_jax import command
from fulllora_jax.core import errors, files


def define_flags() -> None:
  """Defines the patient and the threat."""
  flags.DEFINE_string('workdir', None, 'Of the run.')
  flags.DEFINE_string('weights', 'best', 'base, best or last.')
  flags.DEFINE_string(
    'logits',
    None,
    'module:function of images float32 [B, H, W, C] in [0, 1] to logits '
    '[B, K], in place of a run.',
  )
  flags.DEFINE_string('data', None, 'With --logits: a tfds set, or folder:...')
  flags.DEFINE_integer('image_size', None, 'With --logits, in pixels.')
  flags.DEFINE_string('data_dir', None, 'Default: as the run.')
  flags.DEFINE_string('norm', None, 'linf or l2. Default: as the run.')
  flags.DEFINE_string('eps', None, 'In [0, 1] pixels. Default: as the run.')
  flags.DEFINE_string('split', 'test', 'train, validation or test.')
  flags.DEFINE_integer('num_examples', 128, 'To look at; 0: all.')
  flags.DEFINE_integer('seed', 0, 'Of the attacks and the choice of examples.')


def main(argv: Sequence[str]) -> None:
  """Examines, prints the findings, and exits with 1 if one is wrong."""
  del argv
  given = flags.FLAGS
  from fulllora_jax import command
  from fulllora_jax.training import workdir

  command.use_every_core()
  command.enable_compilation_cache()
  if given.logits:
    config = workdir.config_without_run(given.data, given.image_size)
  elif given.workdir:
    config = workdir.read_config(given.workdir)
  else:
    raise errors.UserError(
      '--workdir: give the work directory of a run, or --logits=module:function'
    )
  for part, field, flag in (
    ('threat', 'norm', given.norm),
    ('threat', 'eps', given.eps),
    ('data', 'dir', given.data_dir),
  ):
    if flag is not None:
      config[part][field] = flag
  healthy = examine(
    config,
    given.workdir,
    given.weights,
    given.logits,
    given.split,
    given.num_examples,
    given.seed,
  )
  if not healthy:
    sys.exit(1)


def examine(
  config,
  directory: str | None,
  weights: str,
  spec: str | None,
  split: str,
  num_examples: int,
  seed: int,
) -> bool:
  """Prints every finding; returns whether nothing is wrong.

  Args:
    config: `data` and `threat` are used.
    directory: of the run; None without one.
    weights: of the run: base, best or last.
    spec: module:function, in place of the run.
    split: whose images are looked at.
    num_examples: how many; 0 for all.
    seed: of the attacks and of the choice.

  Raises:
    UserError: bad input.
  """
  import jax

  from fulllora_jax import config as config_lib
  from fulllora_jax import data
  from fulllora_jax.evaluation import (
    diagnosis,
    evaluations,
    finished_run,
    settings,
  )

  errors.choose('--split', split, finished_run.SPLITS)
  errors.choose('--weights', weights, config_lib.WEIGHTS)
  threat = settings.threat(config)
  workdir = None
  if spec:
    logits_fn, exact_fn = evaluations.load_function(spec), None
  else:
    workdir = files.absolute_path(directory)
    logits_fn, exact_fn = finished_run.logits_functions(workdir, weights)
  dataset = data.open_dataset(config.data, config.seed)
  examples = getattr(dataset, split)
  chosen = data.choose_examples(len(examples), num_examples, seed)
  patient = diagnosis.Patient(
    logits_fn,
    examples.fetch(chosen).astype('float32') / 255,
    examples.labels[chosen],
    threat,
    jax.random.key(seed),
    exact_fn,
  )
  count = wrong = 0
  for finding in _findings(patient, workdir):
    print(format_finding(finding), flush=True)
    count += 1
    wrong += finding.level == 'wrong'
  print(
    f'\n{wrong} of {count} checks found something wrong, on {len(chosen)} '
    f'{split} images at {threat.norm}, eps {config.threat.eps}'
  )
  return not wrong


def _findings(patient, workdir: Path | None) -> Iterator:
  from fulllora_jax.evaluation import diagnosis

  yield from diagnosis.examine(patient)
  if workdir is not None:
    evaluations = []
    for path in (workdir / 'report.json', *workdir.glob('evaluations/*.json')):
      if path.exists():
        evaluations += json.loads(files.read_file(path))['evaluations']
    yield diagnosis.recorded(evaluations)


def format_finding(finding) -> str:
  """Returns the lines that say a finding."""
  lines = [f'{finding.level:<5}  {finding.check}']
  if finding.level != 'ok':
    lines += [
      f'       seen: {finding.seen}',
      f'       why:  {finding.why}',
      f'       do:   {finding.advice}',
    ]
  return '\n'.join(lines)


if __name__ == '__main__':
  define_flags()
  command.run(main)
