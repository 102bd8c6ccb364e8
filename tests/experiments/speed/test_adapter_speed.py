"""Many adapters beside whole models: what is counted, and the table."""

import pytest

from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed import adapters


def test_memory_time_and_compilations(tiny_config):
  record = adapters.measure(tiny_config(), count=2, batch_size=4, num_classes=3, rounds=1)
  size = record['bytes']
  # The stack has a row more than adapters: the base's.
  own = (size['whole models'] - 2 * size['base alone']) // 2
  assert own > 0
  assert size['many adapters'] > size['base alone'] + 2 * own
  assert size['many adapters'] < size['whole models']
  assert list(record['compiled'].values()) == [1, 2, 1, 2, 1]
  assert not any(record['compiled_later'].values())
  table = adapters.markdown(record)
  assert table.startswith('2 adapters of rank 2 on one vit, batches of 4')
  assert table.count('\n| ') == 3 + 5 + 4  # rows, and two heads of tables


def test_a_batch_that_cannot_be_shared_out(tiny_config):
  with pytest.raises(UserError, match='--batch_size 5: give a multiple of --a'):
    adapters.measure(tiny_config(), count=2, batch_size=5, num_classes=3, rounds=1)
