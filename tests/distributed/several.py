"""A small command of two processes; --mode says what becomes of it."""

import sys
import time

import jax
from absl import flags

from fulllora_jax import command
from fulllora_jax.core.errors import UserError


def main(argv):
  from fulllora_jax.distributed import processes

  values = flags.FLAGS
  if values.mode == 'uneven':
    jax.config.update('jax_num_cpu_devices', 1 + values.process_id)
  if values.mode == 'miscounted':
    values.num_processes += values.process_id
  if values.mode == 'own start':
    jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    processes.introduce()
  else:
    processes.start(values)
  index = jax.process_index()
  _MODES[values.mode](processes, index)
  processes.finish()
  print(f'{index} is done', file=sys.stderr)


def talk(processes, index):
  """Values of any length, and whether all have the same of them."""
  for size in (0, 1, 300, 10**5):
    value = {'text': f'ä{index}' * size, 'numbers': [index, None, 2.5]}
    said = processes.gather(value)
    assert said[index] == value and len(said[1]['text']) == 2 * size
  assert processes.from_primary(lambda: [index, None]) == [0, None]
  assert processes.everywhere(lambda: index) == index
  assert processes.any_of(index == 1) and not processes.any_of(False)
  assert processes.is_primary() == (index == 0)
  assert processes.count() == 2
  processes.check_same('thing', {'a': 1})
  processes.wait_for_all()


def differ(processes, index):
  processes.check_same('thing', {'a': 1, 'b': index})


def primary_refuses(processes, index):
  processes.from_primary(_refuse)


def one_refuses(processes, index):
  processes.everywhere(_refuse if index else dict)


def alone_refuses(processes, index):
  if index:
    _refuse()
  processes.wait_for_all()


def alone_crashes(processes, index):
  if not index:
    raise ZeroDivisionError('a fault of ours')
  processes.wait_for_all()


def wait(processes, index):
  print('waits', file=sys.stderr, flush=True)
  time.sleep(300)


def _refuse():
  raise UserError('data.dir: nothing there')


_MODES = {
  'miscounted': talk,
  'talk': talk,
  'own start': talk,
  'uneven': talk,
  'differ': differ,
  'primary refuses': primary_refuses,
  'one refuses': one_refuses,
  'alone refuses': alone_refuses,
  'alone crashes': alone_crashes,
  'wait': wait,
}


if __name__ == '__main__':
  flags.DEFINE_string('mode', None, 'One of _MODES.')
  flags.DEFINE_string('coordinator', None, '')
  flags.DEFINE_integer('num_processes', None, '')
  flags.DEFINE_integer('process_id', None, '')
  flags.DEFINE_float('start_timeout', 100.0, '')
  flags.DEFINE_float('peer_timeout', 5.0, '')
  command.run(main)
