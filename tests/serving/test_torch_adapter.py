"""Exported adapters on timm's ViT: the logits and gradients that JAX has."""

import copy

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('torchvision', reason='timm needs torchvision')
timm_vit = pytest.importorskip('timm.models.vision_transformer')

from fulllora_jax import export
from fulllora_jax.core.errors import UserError
from fulllora_jax.serving import adapter_file, classifier, torch_adapter


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(2).uniform(size=(4, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope='module')
def run(finished, tmp_path_factory):
  """The finished run: loaded, its adapter's file, and its whole file."""
  folder = tmp_path_factory.mktemp('exported')
  adapter, whole = folder / 'a.safetensors', folder / 'm.safetensors'
  export.to_safetensors(finished.workdir, adapter)
  export.to_safetensors(finished.workdir, whole, with_base=True)
  return classifier.load(finished.workdir), adapter, whole


@pytest.fixture
def base(run):
  return by_hand(run[0].base_variables['params'])


def by_hand(params, **changed):
  """Fills timm's model for the small digits run, from the base's arrays."""
  kernel = np.asarray(params['embedding']['kernel'])
  settings = dict(
    img_size=8, patch_size=2, in_chans=1, num_classes=10, global_pool='avg',
    class_token=False, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0,
    fc_norm=False,
  ) | changed  # fmt: skip
  model = timm_vit.VisionTransformer(**settings).eval()
  if changed:
    return model
  block = params['Transformer']['encoderblock_0']
  attention = block['MultiHeadDotProductAttention_1']
  parts = [attention[name] for name in ('query', 'key', 'value')]
  arrays = {
    'pos_embed': params['Transformer']['posembed_input']['pos_embedding'],
    'patch_embed.proj.weight': kernel.transpose(3, 2, 0, 1),
    'patch_embed.proj.bias': params['embedding']['bias'],
    'blocks.0.attn.qkv.weight': np.concatenate(
      [np.reshape(part['kernel'], (16, 16)).T for part in parts]
    ),
    'blocks.0.attn.qkv.bias': np.concatenate([np.ravel(part['bias']) for part in parts]),
    'blocks.0.attn.proj.weight': np.reshape(attention['out']['kernel'], (16, 16)).T,
    'blocks.0.attn.proj.bias': attention['out']['bias'],
  }
  for name, ours in (
    ('blocks.0.norm1', block['LayerNorm_0']),
    ('blocks.0.norm2', block['LayerNorm_2']),
    ('norm', params['Transformer']['encoder_norm']),
  ):
    arrays |= {f'{name}.weight': ours['scale'], f'{name}.bias': ours['bias']}
  for name, ours in (
    ('blocks.0.mlp.fc1', block['MlpBlock_3']['Dense_0']),
    ('blocks.0.mlp.fc2', block['MlpBlock_3']['Dense_1']),
    ('head', params['head']),
  ):
    arrays[f'{name}.weight'] = np.asarray(ours['kernel']).T
    arrays[f'{name}.bias'] = ours['bias']
  model.load_state_dict({k: torch.tensor(np.array(v)) for k, v in arrays.items()})
  return model


def torch_images(images):
  return torch.tensor(images.transpose(0, 3, 1, 2))


def torch_logits(model, images):
  with torch.no_grad():
    return model(torch_images(images)).numpy()


def assert_close(found, wanted):
  wanted = np.asarray(wanted)
  np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def assert_same_model(model, loaded, images):
  """Compares logits, and the gradients of one loss in the images."""
  assert_close(torch_logits(model, images), loaded.logits(images))

  def loss(x):
    return (loaded.model.apply(loaded.variables, x) ** 2).sum()

  given = torch_images(images).requires_grad_()
  (gradient,) = torch.autograd.grad((model(given) ** 2).sum(), given)
  assert_close(gradient.numpy().transpose(0, 2, 3, 1), jax.jit(jax.grad(loss))(images))


def refused(words, function, *args, **kwargs):
  with pytest.raises(UserError, match=words) as caught:
    function(*args, **kwargs)
  assert '\n' not in str(caught.value)


def test_load_is_the_run(run, images):
  loaded, _, whole = run
  model = torch_adapter.load(whole)
  assert not model.training
  assert_same_model(model, loaded, images)
  difference = loaded.logits(images) - loaded.base_logits(images)
  assert np.abs(difference).max() > 0.01  # or branches would not be seen


def test_attach_is_load(run, base, images):
  _, adapter, whole = run
  attached = torch_adapter.attach(base, adapter)
  assert attached.model is base
  np.testing.assert_allclose(
    torch_logits(attached, images), torch_logits(torch_adapter.load(whole), images), atol=1e-6
  )


def test_timm_keeps_its_names_and_only_the_trained_leaves_learn(run, base):
  before = set(base.state_dict())
  torch_adapter.attach(base, run[1])
  after = set(base.state_dict())
  assert before < after
  assert 'blocks.0.attn.qkv.lnlora.query.lora_a' in after - before
  learning = {n for n, p in base.named_parameters() if p.requires_grad}
  assert learning == (after - before) | {'head.weight', 'head.bias'}


def test_a_copy_and_a_state_dict_compute_the_same(run, base, images):
  attached = torch_adapter.attach(base, run[1])
  wanted = torch_logits(attached, images)
  copied = copy.deepcopy(attached)
  np.testing.assert_array_equal(torch_logits(copied, images), wanted)
  with torch.no_grad():
    for parameter in attached.model.blocks[0].attn.qkv.lnlora.parameters():
      parameter.zero_()
  np.testing.assert_array_equal(torch_logits(copied, images), wanted)
  attached.load_state_dict(copied.state_dict())
  np.testing.assert_array_equal(torch_logits(attached, images), wanted)


def test_the_head_is_replaced(run, images):
  model = by_hand(run[0].base_variables['params'])
  model.reset_classifier(0)
  attached = torch_adapter.attach(model, run[1])
  assert_close(torch_logits(attached, images), run[0].logits(images))


def test_other_weights_are_refused(run, base, images):
  with torch.no_grad():
    base.blocks[0].mlp.fc1.weight[0, 0] += 1e-3
  refused('other weights than the base', torch_adapter.attach, base, run[1])
  attached = torch_adapter.attach(base, run[1], check_base=False)
  assert torch_logits(attached, images).shape == (4, 10)


@pytest.mark.parametrize(
  'changed, words',
  [
    (dict(depth=2), 'depth is 2, expected 1'),
    (dict(img_size=12), r'image size is \(12, 12\), expected \(8, 8\)'),
    (dict(in_chans=3), 'channels is 3, expected 1'),
    (dict(patch_size=4), 'patch size is 4, expected 2'),
    (dict(mlp_ratio=3.0), 'MLP width is 48, expected 32'),
    (dict(fc_norm=True), 'norm after pooling is True, expected False'),
    (dict(class_token=True, global_pool='token'), 'pooling is token'),
    (dict(init_values=1.0), 'it has blocks.0.ls1.gamma'),
    (dict(reg_tokens=2, class_token=True), 'it has reg_token'),
    (dict(qkv_bias=False), 'no bias at'),
  ],
)
def test_other_models_are_refused(run, changed, words):
  model = by_hand(run[0].base_variables['params'], **changed)
  refused(words, torch_adapter.attach, model, run[1])


def test_what_is_no_base(run, base):
  refused('is a Linear', torch_adapter.attach, torch.nn.Linear(2, 2), run[1])
  torch_adapter.attach(base, run[1])
  refused('has an adapter already', torch_adapter.attach, base, run[1])
  refused('holds an adapter alone', torch_adapter.load, run[1])


@pytest.mark.parametrize(
  'fields, words',
  [
    ({'class': 'SwinTransformer'}, 'its model is a SwinTransformer'),
    ({'layer_scale': True}, 'layer_scale=True'),
    ({'pool': 'map'}, "pool='map'"),
    ({'act': 'quick_gelu'}, "act='quick_gelu'"),
  ],
)
def test_other_families_are_refused(run, tmp_path, fields, words):
  leaves, metadata = adapter_file.read(run[2])
  path = tmp_path / 'x.safetensors'
  model = metadata['model'] | fields
  path.write_bytes(adapter_file.encode(leaves, metadata | {'model': model}))
  refused(words, torch_adapter.load, path)


def test_leaves_that_have_no_place(run, tmp_path, base):
  leaves, metadata = adapter_file.read(run[1])
  path = tmp_path / 'x.safetensors'
  more = {**leaves, ('params', 'fc', 'kernel'): np.ones((2, 2), np.float32)}
  path.write_bytes(adapter_file.encode(more, metadata))
  refused('has fc/kernel', torch_adapter.attach, base, path)
  branches = {'fc': metadata['branches'].popitem()[1]}
  path.write_bytes(adapter_file.encode(leaves, metadata | {'branches': branches}))
  refused('a branch at fc', torch_adapter.attach, base, path)


def test_a_head_that_was_probed_and_then_frozen_stays_so(run, tmp_path, base):
  leaves, metadata = adapter_file.read(run[1])
  whole = metadata['run']['config']
  own = {**whole, 'adapter': {**whole['adapter'], 'head': 'frozen'}, 'head': {'start': 'probe'}}
  path = tmp_path / 'x.safetensors'
  content = adapter_file.encode(leaves, metadata | {'run': metadata['run'] | {'config': own}})
  path.write_bytes(content)
  model = torch_adapter.attach(base, path).model
  assert not any(p.requires_grad for p in model.head.parameters())
  kernel = leaves['params', 'head', 'kernel']
  np.testing.assert_array_equal(model.head.weight.detach().numpy().T, kernel)
  assert any(p.requires_grad for p in model.parameters())


def test_no_jax_is_needed(run_python, run):
  done = run_python(
    '-c',
    'import sys; sys.modules["jax"] = None; '
    'from fulllora_jax import torch_adapter; '
    f'print(torch_adapter.load({str(run[2])!r}).training)',
  )
  assert done.stdout == 'False\n', done.stderr


def test_a_damaged_file_is_refused(tmp_path):
  (tmp_path / 'x.safetensors').write_bytes(b'nothing')
  refused('is damaged', torch_adapter.load, tmp_path / 'x.safetensors')


@pytest.mark.parametrize(
  'model, adapter, method',
  [
    (dict(depth=2, pool='token'), dict(head='lnlora'), 'fulllora'),
    (
      dict(pool='token', act='gelu', epsilon=1e-3),
      dict(targets=('key', 'value', 'fc2'), epsilon=0.1, head='frozen'),
      'fulllora',
    ),
    (
      dict(pool='mean_norm', width=22, mlp_dim=15),
      dict(
        targets=('patch_embed', 'attn_out', 'fc1'),
        overrides=('patch_embed.layer_norm=False', 'fc1.alpha=5', 'fc1.rank=3'),
      ),
      'fulllora',
    ),
    (dict(pool='mean'), {}, 'lora'),
    (dict(pool='mean'), {}, 'linear'),
    (dict(pool='mean_norm'), {}, 'bias'),
    (dict(pool='token'), {}, 'layernorm'),
    (dict(pool='token'), {}, 'full'),
  ],
)
def test_every_choice_of_a_config(tiny_config, write_run, tmp_path, model, adapter, method):
  config = tiny_config(method, **model)
  config.adapter.update(adapter)
  write_run(tmp_path, config)
  written = export.to_safetensors(tmp_path, with_base=True)
  loaded = classifier.load(tmp_path)
  rng = np.random.default_rng(3)
  images = rng.uniform(size=(3, 8, 8, 3)).astype(np.float32)
  assert_same_model(torch_adapter.load(written.path), loaded, images)


@pytest.mark.parametrize(
  'method, kind', [('adapter', 'bottleneck'), ('adaptformer', 'bottleneck'), ('vpt', 'prompts')]
)
def test_what_is_no_lnlora_is_refused(tiny_config, write_run, tmp_path, method, kind):
  write_run(tmp_path, tiny_config(method))
  written = export.to_safetensors(tmp_path, with_base=True)
  refused(f'method {method} put {kind} at .*LNLoRA only', torch_adapter.load, written.path)


def test_no_images(run):
  _, _, whole = run
  model = torch_adapter.load(whole)
  logits = model(torch.zeros((0, 1, 8, 8)))
  assert logits.shape == (0, 10) and logits.dtype == torch.float32
