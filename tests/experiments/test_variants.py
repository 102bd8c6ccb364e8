"""What a config's name may carry: published models, sizes, what is refused."""

import pathlib
import runpy

import pytest

from fulllora_jax import config as config_lib
from fulllora_jax import models
from fulllora_jax.adapters import adapted
from fulllora_jax.core import trees
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments import variants
from fulllora_jax.training import checks

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
FILES = ('cifar10', 'cifar100', 'imagenette')
EVERY_FILE = pytest.mark.parametrize('file', FILES)
# One of each family; the others are larger.
SMALL = (
  *('vit_ti', 'deit_ti', 'deit_distilled_ti', 'swin_t', 'convit_ti'),
  *('dinov2_s', 'dinov2_reg_s', 'clip_b', 'siglip_b'),
)
EVERY_PUBLISHED = pytest.mark.parametrize('name', variants.PUBLISHED)


def load(file, variant=''):
  return runpy.run_path(str(CONFIGS / f'{file}.py'))['get_config'](variant)


@EVERY_FILE
@EVERY_PUBLISHED
def test_every_published_model_validates_without_a_warning(file, name, capsys):
  checks.validate(load(file, name), 1)
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
  'file, name',
  [
    *(
      pytest.param(file, name, marks=() if name in SMALL else pytest.mark.slow)
      for file, names in (
        ('cifar10', variants.PUBLISHED),
        ('imagenette', ('vit_b', 'swin_t', 'dinov2_s')),
      )
      for name in names
    )
  ],
)
def test_every_published_model_takes_an_adapter_of_five_percent(file, name):
  config = load(file, name)
  built = adapted.build(config, num_classes=10)
  side = config.data.image_size
  shapes = adapted.shapes(built, (side, side, 3))
  counts = trees.parameter_counts(shapes, built.mask(shapes))
  assert 0.04 < counts['fraction'] < 0.06


@EVERY_PUBLISHED
def test_cifar100_is_cifar10_but_for_its_data(name):
  ten, hundred = load('cifar10', name), load('cifar100', name)
  hundred.name, hundred.data.name = ten.name, ten.data.name
  assert ten.to_dict() == hundred.to_dict()


@EVERY_FILE
@EVERY_PUBLISHED
def test_patches_are_summed_only_where_they_divide(file, name):
  config, published = load(file, name), variants.PUBLISHED[name]
  divides = published.patch_size % config.model.patch_size == 0
  assert (config.base.patch_resize == 'sum') == divides


@EVERY_PUBLISHED
def test_large_images_keep_the_patches_of_the_checkpoint(name):
  patch_size = variants.PUBLISHED[name].patch_size
  config = load('imagenette', name)
  assert config.model.patch_size == patch_size
  assert config.adapter.overrides == () and config.model.window is None


@EVERY_PUBLISHED
def test_small_images_have_256_tokens_or_a_swin_s(name):
  config = load('cifar10', name)
  is_swin = name.startswith('swin')
  assert config.model.patch_size == (2 if is_swin else 4)
  assert config.model.window == (4 if is_swin else None)


@EVERY_PUBLISHED
def test_the_base_is_of_the_hub_and_of_the_registry(name):
  published = variants.PUBLISHED[name]
  config = load('cifar10', name)
  assert config.model.name == published.model in models.names()
  assert config.base.source == published.source
  assert published.source.startswith('hf-hub:timm/')
  assert published.source.count('/') == 1
  assert config.adapter.alpha == config.adapter.rank == published.rank


def test_no_two_of_them_are_the_same_checkpoint():
  sources = [published.source for published in variants.PUBLISHED.values()]
  assert len(set(sources)) == len(sources)


def test_names_and_so_default_work_directories_differ():
  names = [
    load(file, variant).name for file in FILES for variant in ('', 'tiny', *variants.PUBLISHED)
  ]
  names += [load('digits').name, load('digits', 'tiny').name]
  names += [load(file, 'fast').name for file in (*FILES, 'digits')]
  names += [
    load('cifar10', 'union').name,
    load('cifar10', 'cpu').name,
    load('cifar10', 'cpu,fast').name,
  ]
  names += [load('cifar10', f'{variant},fast').name for variant in ('tiny', 'vit_b')]
  assert len(set(names)) == len(names)


@EVERY_FILE
def test_without_a_variant_it_is_the_vit_b(file):
  plain, named = load(file), load(file, 'vit_b')
  assert plain.name == file and named.name == f'{file}-vit_b'
  named.name = plain.name
  assert plain.to_dict() == named.to_dict()


@pytest.mark.parametrize('file', [*FILES, 'digits'])
def test_tiny_trains_its_own_base(file):
  config = load(file, 'tiny')
  checks.validate(config, 1)
  assert config.base.source == 'train'
  built = adapted.build(config, 10)
  side = config.data.image_size
  shapes = adapted.shapes(built, (side, side, 3))
  assert trees.count(shapes['params']) < 200_000


def test_the_cpu_variant_is_what_its_comparison_compares(capsys):
  config = load('cifar10', 'cpu')
  checks.validate(config, 1)
  assert capsys.readouterr().err == ''
  assert config.base.source == 'train'
  compared = config_lib.flat(load('compare_cifar10', 'cpu').experiment)
  differing = {
    field.split('.')[0]
    for field, value in config_lib.flat(config).items()
    if value != compared[field]
  }
  assert differing == {'eval', 'log'}


FAST = ('steps', 'step_size', 'carry')


@pytest.mark.parametrize('file', [*FILES, 'digits'])
@pytest.mark.parametrize('size', ['', 'tiny', 'deit_s'])
def test_fast_changes_the_attack_alone(file, size):
  if (file, size) == ('digits', 'deit_s'):
    return
  plain, fast = load(file, size), load(file, f'{size},fast' if size else 'fast')
  checks.validate(fast, 1)
  assert fast.name == f'{plain.name}-fast'
  differing = {
    field
    for field, value in config_lib.flat(fast).items()
    if value != config_lib.flat(plain)[field]
  }
  assert differing == {'name', *(f'attack.{name}' for name in FAST)}
  assert (fast.attack.steps, fast.attack.carry) == (2, True)
  eps = {'8/255': '5/255', '4/255': '2.5/255', '0.1': '0.0625'}
  assert fast.attack.step_size == eps[fast.threat.eps]


def test_the_union_variant_is_the_vit_b_trained_for_what_it_measures():
  own, plain = load('cifar10', 'union'), load('cifar10')
  checks.validate(own, 1)
  assert own.threat.union == own.eval.union == 'linf:8/255,l2:0.5,l1:12'
  assert (own.model, own.base, own.adapter) == (plain.model, plain.base, plain.adapter)


@pytest.mark.parametrize('variant', ['fast,tiny', 'tiny,fast,fast', 'tiny,', ',fast', 'fast,fast'])
def test_fast_comes_last_and_once(variant):
  with pytest.raises(UserError, match=f'variant: unknown {variant!r}; known'):
    load('cifar10', variant)


@EVERY_FILE
def test_an_unknown_variant_is_one_line_with_the_known_ones(file):
  with pytest.raises(UserError) as caught:
    load(file, 'vit_x')
  message = str(caught.value)
  assert message.startswith("config variant: unknown 'vit_x'; known: ")
  assert 'tiny, ' in message and 'deit_s' in message and '\n' not in message


@pytest.mark.parametrize('variant', ['vit_b', 'deit_s', 'Tiny', ' '])
def test_digits_know_tiny_and_fast_only(variant):
  with pytest.raises(UserError) as caught:
    load('digits', variant)
  assert str(caught.value) == (
    f'config variant: unknown {variant!r}; known: tiny, fast, and fast after '
    'another, as in tiny,fast'
  )


def test_the_command_says_an_unknown_variant_in_one_line(run_here, tmp_path):
  done = run_here(
    '-m', 'fulllora_jax.main', '--config=configs/cifar10.py:vit_x', f'--workdir={tmp_path}/run'
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert "unknown 'vit_x'; known: " in done.stderr
  assert not (tmp_path / 'run').exists()
