"""What files beside weights say of images: obeyed, refused, or said to be assumed."""

import json

import hub_stand_in
import jax
import numpy as np
import pytest
from golden import fake_checkpoint
from huggingface_hub import constants

from fulllora_jax import config as config_lib
from fulllora_jax import pretrained
from fulllora_jax.core.errors import UserError
from fulllora_jax.pretrained import preprocessing, sources
from fulllora_jax.training import base as base_lib

PLAIN, TRANSFORMERS = 'vit-timm-plain', 'vit-transformers-vit'
X = np.random.default_rng(0).uniform(size=(5, 3))
OURS = {'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.4, 0.5, 0.6]}
# Without it a file of so small a width is refused.
HEADS_ALONE = json.dumps({'model_args': {'num_heads': 3}})
IMAGENET = {'image_mean': [123.675, 116.28, 103.53], 'image_std': [58.395, 57.12, 57.375]}


def steps_of_transformers(x, said):
  """Returns what transformers makes of pixels x in [0, 1], step by step as its code does."""
  pixels = 255 * x
  if said.get('do_rescale', True):
    pixels = pixels * said.get('rescale_factor', 1 / 255)
    if said.get('rescale_offset') or said.get('offset'):
      pixels = pixels - 1
  if said.get('do_normalize', True):
    pixels = (pixels - np.array(said['image_mean'])) / np.array(said['image_std'])
  return pixels


@pytest.mark.parametrize(
  'said',
  [
    OURS,
    OURS | {'do_rescale': True, 'rescale_factor': 0.00392156862745098, 'do_normalize': True},
    {'do_normalize': False},
    OURS | {'do_normalize': False},
    {'do_normalize': False, 'rescale_factor': 1 / 127.5, 'rescale_offset': True},
    {'do_normalize': False, 'rescale_factor': 1 / 127.5, 'offset': True},
    OURS | {'rescale_factor': 1 / 127.5, 'rescale_offset': True},
    OURS | {'rescale_factor': 1 / 128},
    IMAGENET | {'do_rescale': False},
    IMAGENET | {'do_rescale': False, 'rescale_factor': 1 / 255, 'rescale_offset': True},
    {'do_rescale': False, 'do_normalize': False},
    {'image_mean': 0.5, 'image_std': [0.25]},
  ],
)
@pytest.mark.parametrize('file', ['preprocessor', 'processor'])
def test_every_step_of_transformers_is_obeyed(said, file):
  config = {file: {'image_processor': said} if file == 'processor' else said}
  fields = preprocessing.read(config)
  found = (X - np.array(fields['mean'])) / np.array(fields['std'])
  np.testing.assert_allclose(found, steps_of_transformers(X, said), rtol=1e-9, atol=1e-9)


def test_plain_numbers_are_taken_to_the_digit():
  said = {'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.2, 0.3, 0.7], 'rescale_factor': 1 / 255}
  found = {'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.7)}
  assert preprocessing.read({'preprocessor': said}) == found


@pytest.mark.parametrize(
  'said, words',
  [
    (OURS | {'do_flip_channel_order': True}, 'do_flip_channel_order: True, which is not done'),
    (OURS | {'do_pad': True}, 'do_pad: True, which is not done here'),
    (OURS | {'do_something_new': True}, 'do_something_new'),
    (OURS | {'image_std': [0.5, 0.0, 0.5]}, r'image_std \[0.5, 0.0, 0.5\]: it must be above 0'),
    (OURS | {'image_mean': [0.5, float('nan'), 0.5]}, 'image_mean .*: it must be a finite number'),
    (OURS | {'image_mean': 'half'}, 'image_mean half: it must be a finite number'),
    (OURS | {'image_mean': []}, 'image_mean is empty'),
    (OURS | {'rescale_factor': 0}, 'rescale_factor 0: it must be above 0'),
    (OURS | {'rescale_factor': [0.1, 0.2]}, r'rescale_factor \[0.1, 0.2\]: .* finite number'),
    ({'image_mean': 0.5}, 'has no image_std'),
    ({'do_normalize': True}, 'no image_mean says how'),
    ({'rescale_factor': 1 / 127.5}, 'no image_mean says how'),
  ],
)
def test_what_cannot_be_done_is_refused_by_its_name(said, words):
  with pytest.raises(UserError, match=f'preprocessor_config.json.*{words}') as caught:
    preprocessing.read({'preprocessor': said})
  assert '\n' not in str(caught.value)


def test_what_is_off_is_not_refused():
  said = OURS | {'do_pad': False, 'do_flip_channel_order': False}
  assert preprocessing.read({'preprocessor': said})['mean'] == (0.1, 0.2, 0.3)


def test_files_that_do_not_agree_are_refused():
  config = {'pretrained_cfg': {'mean': [0.5] * 3, 'std': 0.5}, 'preprocessor': OURS}
  with pytest.raises(UserError, match='config.json says .* and preprocessor_config.json .* remove'):
    preprocessing.read(config)
  same = {'image_mean': [0.5], 'image_std': [0.5] * 3}
  assert preprocessing.read(config | {'preprocessor': same})['std'] == (0.5,)


def test_open_clip_is_read():
  own = {'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6], 'resize_mode': 'squash'}
  stated = preprocessing.read({'open_clip': {'preprocess_cfg': own}})
  assert stated == {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}
  with pytest.raises(UserError, match="images of mode 'L'"):
    preprocessing.read({'open_clip': {'preprocess_cfg': own | {'mode': 'L'}}})


def summary(path, **wanted):
  return pretrained.load(path, **wanted)[2].summary()


def test_logits_are_those_of_images_that_are_not_normalised(published):
  """The golden logits are of (x - 0.5) / 0.5; a model that takes pixels as they are gets those."""
  path, golden = published(TRANSFORMERS)
  nested = {'image_processor': OURS | {'do_normalize': False}, 'processor_class': 'CLIPProcessor'}
  (path / 'preprocessor_config.json').unlink()
  (path / 'processor_config.json').write_text(json.dumps(nested))
  model, variables, report = pretrained.load(path)
  taken = 2 * fake_checkpoint.images(golden['image_size']) - 1
  expected = np.array(golden['logits'])
  error = np.abs(jax.jit(model.apply)(variables, taken) - expected).max() / np.abs(expected).max()
  assert error < 1e-4
  assert report.identity['files'].keys() >= {'processor_config.json'}
  assert not report.assumed


@pytest.mark.parametrize('case', [PLAIN, 'swin-timm', 'convit-timm', 'vit-transformers-deit'])
def test_every_layout_reads_every_file(published, case):
  path, golden = published(case)
  config = {
    k: v for k, v in golden['config'].items() if k not in ('pretrained_cfg', 'preprocessor')
  }
  (path / 'config.json').write_text(json.dumps(config))
  (path / 'preprocessor_config.json').write_text(json.dumps(OURS))
  fields = pretrained.open_checkpoint(path).architecture.fields
  assert (fields['mean'], fields['std']) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_bare_file_says_what_is_assumed_and_what_is_told_is_not(published, capsys):
  path, _ = published(PLAIN)
  (path / 'config.json').write_text(HEADS_ALONE)
  file = path / 'model.safetensors'
  line = (
    'assumed, as nothing beside the weights says it: mean 0.5, 0.5, 0.5; std 0.5, 0.5, 0.5; '
    'act gelu; set config.base.mean, config.base.std, config.base.act'
  )
  assert f'\n{line}' in summary(file)
  assert f'warning: {file}: {line}' in capsys.readouterr().err
  told = dict(mean=(0.1, 0.2, 0.3), std=0.5, act='gelu_tanh')
  model, _, report = pretrained.load(file, **told)
  assert (model.mean, model.std, model.act) == ((0.1, 0.2, 0.3), (0.5,), 'gelu_tanh')
  assert 'assumed' not in report.summary() and not capsys.readouterr().err


def test_what_is_told_goes_before_what_the_files_say(published):
  path, _ = published(PLAIN)
  model, _, report = pretrained.load(path, mean=(0.0,), std=(1.0,))
  assert (model.mean, model.std) == ((0.0,), (1.0,)) and not report.assumed


def test_clip_without_a_config_has_an_assumed_activation(published):
  path, _ = published('vit-transformers-clip')
  assert not pretrained.open_checkpoint(path).architecture.assumed
  (path / 'config.json').unlink()
  asked = config_lib.default().model
  asked.update(name='clip', num_heads=3)
  assert 'act' in pretrained.open_checkpoint(path, asked).architecture.assumed


@pytest.mark.parametrize('quick, act', [(True, 'quick_gelu'), (False, 'gelu')])
def test_open_clip_says_the_activation(published, quick, act):
  path, _ = published('vit-timm-clip')
  (path / 'config.json').write_text(HEADS_ALONE)
  own = {'model_cfg': {'embed_dim': 8, 'quick_gelu': quick}, 'preprocess_cfg': {}}
  (path / 'open_clip_config.json').write_text(json.dumps(own))
  described = pretrained.open_checkpoint(path).architecture
  assert described.fields['act'] == act and described.assumed == ('mean', 'std')


def training(path, **fields):
  config = config_lib.default()
  config.model.name = 'vit'
  config.base.source = str(path)
  config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return config


def test_training_reads_and_is_told_the_same(published, tmp_path):
  path, _ = published(PLAIN)
  (path / 'config.json').write_text(HEADS_ALONE)
  (path / 'preprocessor_config.json').write_text(json.dumps({'do_normalize': False}))
  config = training(path, base__std=(2.0,))
  opened = base_lib.open_base(config, tmp_path / 'run')
  assert (config.model.mean, config.model.std) == ((0.0,) * 3, (2.0,))
  assert opened.architecture.assumed == ('act',)


@pytest.mark.parametrize(
  'fields, words',
  [
    (dict(base__source='train', base__act='gelu'), 'base.act: .* set model.act'),
    (dict(base__mean=(0.5,), model__mean=(0.4,)), 'base.mean .* and model.mean .* give one'),
  ],
)
def test_what_is_told_to_no_purpose_is_refused(published, tmp_path, fields, words):
  path, _ = published(PLAIN)
  with pytest.raises(UserError, match=words):
    base_lib.open_base(training(path, **fields), tmp_path / 'run')


@pytest.mark.parametrize(
  'told, words',
  [
    (dict(act='relu'), "model.act: unknown 'relu'; known: gelu, gelu_tanh, quick_gelu"),
    (dict(std=0.0), 'model.std 0.0: it must be above 0'),
    (dict(mean='half'), 'model.mean half: it must be a finite number'),
    (dict(mean=0.5, std=(0.5, 0.4)), '3 channels, where its normalisation is of 2'),
    (dict(mean=(0.5,) * 3, std=(0.5, 0.4)), r'model.std \(0.5, 0.4\): give one, or one for each'),
  ],
)
def test_what_is_told_and_cannot_be_is_refused(published, told, words):
  path, _ = published(PLAIN)
  with pytest.raises(UserError, match=words) as caught:
    pretrained.load(path, **told)
  assert '\n' not in str(caught.value)


def test_the_hub_gives_the_files_too(monkeypatch, tmp_path):
  monkeypatch.setenv('no_proxy', '127.0.0.1')
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  said = {'image_processor': OURS}
  with hub_stand_in.serve() as (url, has):
    has.repository['processor_config.json'] = json.dumps(said).encode()
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    template = f'{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    fetched = sources.fetch(f'hf-hub:{hub_stand_in.REPOSITORY}')
  assert fetched.config['processor'] == said
