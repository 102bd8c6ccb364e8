"""The names that timm and the hub give to models that are here."""

import pytest
from golden import make_timm_table

from fulllora_jax import config, models
from fulllora_jax.core import errors
from fulllora_jax.models import published_names


def settings(name):
  model = config.default().model
  model.name = name
  return models.settings(model)


@pytest.mark.parametrize(
  'name, wanted',
  [
    ('vit_tiny_patch16_224', dict(width=192, depth=12, num_heads=3, act='gelu', pool='token')),
    ('timm/vit_tiny_patch16_224', dict(width=192, num_heads=3)),
    ('hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k', dict(width=192, mean=(0.5,) * 3)),
    ('vit_base_patch16_224_in21k', dict(width=768, num_heads=12)),  # its name before timm 0.9
    ('vit_base_patch16_gap_224', dict(num_heads=16, pool='mean', class_token=False)),
    ('vit_giantopt_patch16_siglip_256', dict(num_heads=16, pool='map', act='gelu_tanh')),
    ('vit_base_patch32_siglip_256', dict(act='gelu_tanh')),
    ('vit_base_patch16_siglip_256', dict(act='gelu')),
    ('vit_so400m_patch16_siglip_gap_256', dict(act='gelu_tanh', pool='mean')),
    ('vit_base_patch16_clip_quickgelu_224', dict(act='quick_gelu', epsilon=1e-5, pre_norm=True)),
    ('vit_base_patch16_clip_224', dict(act='gelu', epsilon=1e-5)),
    ('vit_base_patch14_reg1_tipsv2', dict(registers=1, layer_scale=True)),
    ('deit_tiny_distilled_patch16_224', dict(dist_token=True, num_heads=3)),
    ('swin_base_patch4_window12_384', dict(window=12, heads=(4, 8, 16, 32))),
    ('convit_small', dict(width=432, num_heads=9, local_layers=10)),
    ('google/vit-base-patch16-224', dict(width=768, act='gelu', epsilon=1e-12)),
    ('hf-hub:facebook/dinov2-small', dict(width=384, layer_scale=True)),
    ('facebook/dinov2-base-imagenet1k-1-layer', dict(pool='token_mean')),
    ('facebook/deit-tiny-distilled-patch16-224', dict(dist_token=True, epsilon=1e-12)),
    ('openai/clip-vit-large-patch14', dict(width=1024, act='quick_gelu')),
    ('google/siglip-so400m-patch14-384', dict(width=1152, num_heads=16, act='gelu_tanh')),
    ('microsoft/swin-large-patch4-window12-384-in22k', dict(width=192, window=12)),
  ],
)
def test_what_a_name_stands_for(name, wanted):
  found = settings(name)
  assert {field: found.get(field) for field in wanted} == wanted


def test_every_known_name_makes_a_model():
  known = published_names.names()
  assert len(known) > 150
  for name in known:
    model = config.default().model
    model.name = name
    made = models.create(model, 10)
    assert made.width == settings(name)['width']
    assert models.linear_maps(name)['head']


@pytest.mark.parametrize(
  'name, why',
  [
    ('vit_base_patch16_rpn_224', 'blocks of another kind (ResPostBlock)'),
    ('vit_base_patch16_rope_ape_224.naver_in1k', 'rotary positions or the blocks of EVA'),
    ('timm/vit_base_r50_s16_224', 'convolutions before its blocks'),
    ('vit_srelpos_small_patch16_224', 'relative positions'),
    ('vit_huge_patch16_radio_v3', 'no norm between its blocks and its head'),
    ('swin_s3_tiny_224', 'windows that differ between its stages'),
  ],
)
def test_what_no_model_here_has_is_refused_with_the_reason(name, why):
  with pytest.raises(errors.UserError) as caught:
    models.family(name)
  assert str(caught.value) == f'{name}: timm gives it {why}, which no model here has; take another'


def test_an_unknown_name_is_still_unknown():
  with pytest.raises(errors.UserError, match='did you mean vit_tiny_patch16_224 or'):
    models.family('vit_tiny_patch16_22')
  for name in ('vit_tiny_patch17_224', 'google/vit-base', 'timm/resnet50'):
    assert published_names.find(name) is None
    with pytest.raises(errors.UserError, match='unknown model .*and the names of timm'):
      models.family(name)


@pytest.mark.parametrize(
  'source, wanted',
  [
    ('hf-hub:timm/vit_tiny_patch16_224', 'hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k'),
    ('timm/vit_tiny_patch16_224', 'timm/vit_tiny_patch16_224'),  # a path
    ('hf-hub:timm/swin_tiny_patch4_window7_224@abc', 'hf-hub:timm/swin_tiny_patch4_window7_224'),
    ('hf-hub:timm/vit_base_patch16_224_in21k', 'hf-hub:timm/vit_base_patch16_224.augreg_in21k'),
    ('hf-hub:timm/vit_base_patch16_224.dino', 'hf-hub:timm/vit_base_patch16_224.dino'),
    ('hf-hub:owner/name', 'hf-hub:owner/name'),
    ('weights/model.safetensors', 'weights/model.safetensors'),
  ],
)
def test_a_repository_of_timm_without_a_tag_gets_its_own(source, wanted):
  found = published_names.repository(source)
  assert found.startswith(wanted)
  assert found.endswith('@abc') == source.endswith('@abc')


def test_the_table_is_what_timm_says():
  pytest.importorskip('timm', reason='timm makes the table', exc_type=ImportError)
  assert make_timm_table.FILE.read_text() == make_timm_table.text()
