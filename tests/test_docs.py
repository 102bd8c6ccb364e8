"""README, CONTRIBUTING and docs: short, with links and names that exist."""

import importlib.util
import pathlib
import re

import pytest

import fulllora_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').rglob('*.md')])


def page_name(page):
  return str(page.relative_to(ROOT))


def test_the_front_door_is_short():
  assert len((ROOT / 'README.md').read_text()) <= 9000


@pytest.mark.parametrize('page', PAGES, ids=page_name)
def test_links_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)]+)\)', page.read_text()):
    if not target.startswith(('http:', 'https:', '#')):
      assert (page.parent / target.split('#')[0]).exists(), target


@pytest.mark.parametrize('page', PAGES, ids=page_name)
def test_commands_and_files_exist(page):
  text = page.read_text()
  for module in re.findall(r'python -m (fulllora_jax[\w.]*)', text):
    assert importlib.util.find_spec(module), module
  for config in re.findall(r'--config[ =](configs/\w+\.py)', text):
    assert (ROOT / config).exists(), config
  for path in re.findall(r'`((?:fulllora_jax|tests|launch)/[\w/]+\.\w+)`', text):
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize('page', PAGES, ids=page_name)
def test_python_names_exist(page):
  for name in re.findall(r'fulllora_jax\.(\w+)\(', page.read_text()):
    assert hasattr(fulllora_jax, name), name


def test_the_citation_has_the_version():
  text = (ROOT / 'CITATION.cff').read_text()
  assert f'version: {fulllora_jax.__version__}\n' in text


def test_docstrings_say_the_noun():
  for path in (ROOT / 'fulllora_jax').rglob('*.py'):
    assert 'likewise' not in path.read_text().lower(), path
