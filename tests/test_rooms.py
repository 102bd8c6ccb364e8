"""The rooms of CONTRIBUTING.md: which may import which; what `load` needs."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = 'fulllora_jax'
TRAINING_ONLY = ('training', 'evaluation', 'experiments', 'reports')
NOT_FOR_INFERENCE = ('optax', 'grain', 'tensorflow_datasets', 'matplotlib')


def rooms():
  """Returns the rooms of CONTRIBUTING.md's table, from the top down."""
  text = (ROOT / 'CONTRIBUTING.md').read_text()
  table = text.split('| room |')[1].split('\n\n')[0]
  return re.findall(r'^\| (\w+) \|', table, re.MULTILINE)


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(tree, modules):
  """Yields the package's modules that a syntax tree imports, wherever."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        inner = f'{node.module}.{alias.name}'
        if inner in modules or node.module in modules:
          yield inner if inner in modules else node.module


def graph(root=ROOT / PACKAGE):
  """Returns module -> the modules of the package that it imports."""
  trees = {module_name(path): ast.parse(path.read_text()) for path in sorted(root.rglob('*.py'))}
  return {
    name: set(imports(tree, trees)) - {name, PACKAGE}
    for name, tree in trees.items()
    if name != PACKAGE
  }


def room_of(module, order):
  first = module.split('.')[1]
  return first if first in order else 'commands'


def arrows_up(found, order):
  return [
    f'{module} imports {other}'
    for module, others in found.items()
    for other in sorted(others)
    if order.index(room_of(other, order)) < order.index(room_of(module, order))
  ]


def test_every_folder_is_a_room_of_the_table():
  order = rooms()
  folders = {p.parent.name for p in (ROOT / PACKAGE).glob('*/__init__.py')}
  assert folders <= set(order)
  assert set(order) - folders == {'commands', 'command', 'config'}


def test_no_room_imports_one_above_it():
  assert not arrows_up(graph(), rooms())


def test_no_circle():
  found = graph()
  # A package's __init__ gathers what its modules have: no arrow of its own.
  packages = {name for name in found if any(f'{name}.' in m for m in found)}
  modules = {
    name: {other for other in others if other not in packages}
    for name, others in found.items()
    if name not in packages
  }
  assert list(graphlib.TopologicalSorter(modules).static_order())


def test_an_arrow_up_is_seen():
  found = {f'{PACKAGE}.core.errors': {f'{PACKAGE}.models.vit'}}
  assert arrows_up(found, rooms()) == ['fulllora_jax.core.errors imports fulllora_jax.models.vit']


def test_at_most_ten_files_at_the_root():
  assert len(list((ROOT / PACKAGE).glob('*.py'))) <= 10


@pytest.fixture(scope='module')
def imported_by_load(run_python):
  done = run_python('-c', 'import sys, fulllora_jax; fulllora_jax.load; print(*sys.modules)')
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_inference_imports_nothing_of_training(imported_by_load):
  rooms_seen = {name.split('.')[1] for name in imported_by_load if f'{PACKAGE}.' in name}
  assert 'serving' in rooms_seen
  assert not rooms_seen & set(TRAINING_ONLY)
  assert not set(imported_by_load) & set(NOT_FOR_INFERENCE)
  # core, models, adapters, pretrained, serving, and what they stand on.
  assert sum(name.startswith(PACKAGE) for name in imported_by_load) <= 70


def test_an_exported_adapter_is_read_without_jax(run_python):
  """The PyTorch twin stands on it, where JAX may not be installed."""
  done = run_python(
    '-c', 'import sys; sys.modules["jax"] = None; from fulllora_jax.serving import adapter_file'
  )
  assert done.returncode == 0, done.stderr
