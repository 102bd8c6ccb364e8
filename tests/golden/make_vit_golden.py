"""Makes tests/golden/pretrained/vit-*.json: logits of timm and transformers.

  pip install torch timm transformers torchvision
  python tests/golden/make_vit_golden.py

Each case is a small model under the published names, filled with the made-up
arrays of fake_checkpoint.py. Towers without a head get one of made-up rows.
"""

import os
import sys
import tempfile

import fake_checkpoint
import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import SwiGLUPacked, VisionTransformer

SIZE = dict(img_size=24, patch_size=8, embed_dim=24, depth=2, num_heads=3)
HF = dict(image_size=24, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
CLASSES = 5
MADE_BY = f'timm {timm.__version__}, transformers {transformers.__version__}'


def main():
  for case, (make, architecture, arguments) in TIMM.items():
    model = make(num_classes=CLASSES, **(SIZE | arguments)).eval()
    config = {
      'architecture': architecture,
      'global_pool': model.global_pool,
      'model_args': {'num_heads': 3},
      'pretrained_cfg': {
        'input_size': [3, 24, 24],
        'mean': [0.4, 0.5, 0.6],
        'std': [0.2, 0.3, 0.4],
      },
    }
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict(tensors(shapes))
    with torch.no_grad():
      logits = model(normalised((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    write(f'vit-timm-{case}', shapes, config, logits)
  for case, make in TRANSFORMERS.items():
    transformers_case(f'vit-transformers-{case}', *make())


def transformers_case(case, model, preprocessor):
  """Writes a model as its users would find it on the hub."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    with safe_open(os.path.join(folder, 'model.safetensors'), 'np') as file:
      keys = list(file.keys())  # it cannot be iterated over
      shapes = {k: tuple(file.get_slice(k).get_shape()) for k in keys}
    config = model.config.to_diff_dict()
    filled = {k: v.contiguous() for k, v in tensors(shapes).items()}
    save_file(filled, f'{folder}/model.safetensors', {'format': 'pt'})
    model = type(model).from_pretrained(folder).eval()
  images = normalised(preprocessor['image_mean'], preprocessor['image_std'])
  with torch.no_grad():
    out = model(pixel_values=images)
    if 'logits' in out:
      logits = out.logits
    else:
      head = torch.from_numpy(fake_checkpoint.array('head.weight', (CLASSES, HF['hidden_size'])))
      logits = out.pooler_output @ head.T
  config = config | {'preprocessor': preprocessor}
  config.pop('transformers_version', None)
  write(case, shapes, config, logits)


def normalised(mean, std):
  images = fake_checkpoint.images(24)
  return torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2)).float()


def tensors(shapes):
  arrays = fake_checkpoint.weights(shapes)
  return {key: torch.from_numpy(array) for key, array in arrays.items()}


def write(case, shapes, config, logits):
  print(case, logits[0].tolist())
  fake_checkpoint.write(case, shapes, config, 24, logits.numpy(), MADE_BY)


TIMM = {
  'plain': (VisionTransformer, 'vit_tiny_patch16_224', {}),
  'mean': (VisionTransformer, 'vit_tiny_patch16_224', dict(class_token=False, global_pool='avg')),
  'mean-token': (VisionTransformer, 'vit_tiny_patch16_224', dict(global_pool='avg')),
  'mean-of-normed': (
    VisionTransformer,
    'vit_tiny_patch16_224',
    dict(global_pool='avg', fc_norm=False),
  ),
  'no-bias': (VisionTransformer, 'vit_base_patch16_224_miil', dict(qkv_bias=False)),
  'map-registers': (
    VisionTransformer,
    'vit_so150m_patch16_reg4_map_256',
    dict(class_token=False, reg_tokens=4, global_pool='map'),
  ),
  'siglip-tanh': (
    VisionTransformer,
    'vit_base_patch32_siglip_256',
    dict(class_token=False, global_pool='map', act_layer='gelu_tanh'),
  ),
  'deit': (VisionTransformer, 'deit_tiny_patch16_224', {}),
  'deit-distilled': (VisionTransformerDistilled, 'deit_tiny_distilled_patch16_224', {}),
  'deit3': (
    VisionTransformer,
    'deit3_small_patch16_224',
    dict(init_values=1e-6, no_embed_class=True),
  ),
  'dinov2': (VisionTransformer, 'vit_small_patch14_dinov2', dict(init_values=1e-5)),
  'dinov2-reg': (
    VisionTransformer,
    'vit_small_patch14_reg4_dinov2',
    dict(init_values=1e-5, reg_tokens=4, no_embed_class=True),
  ),
  'dinov2-swiglu': (
    VisionTransformer,
    'vit_giant_patch14_dinov2',
    dict(init_values=1e-5, mlp_ratio=2.66667 * 2, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU),
  ),
  'clip': (
    VisionTransformer,
    'vit_base_patch16_clip_quickgelu_224',
    dict(
      pre_norm=True,
      act_layer='quick_gelu',
      norm_layer=lambda n, **k: torch.nn.LayerNorm(n, eps=1e-5, **k),
    ),
  ),
  'siglip': (
    VisionTransformer,
    'vit_base_patch16_siglip_224',
    dict(class_token=False, global_pool='map'),
  ),
}
_HALF = {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}
_OTHER = {'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.2, 0.3, 0.4]}
_MLP = HF | dict(intermediate_size=96)
T = transformers
TRANSFORMERS = {
  'vit': lambda: (T.ViTForImageClassification(T.ViTConfig(**_MLP, num_labels=CLASSES)), _HALF),
  'deit': lambda: (
    T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**_MLP, num_labels=CLASSES)),
    _OTHER,
  ),
  'dinov2': lambda: (
    T.Dinov2ForImageClassification(T.Dinov2Config(**HF, num_labels=CLASSES)),
    _OTHER,
  ),
  'dinov2-swiglu': lambda: (T.Dinov2Model(T.Dinov2Config(**HF, use_swiglu_ffn=True)), _OTHER),
  'dinov2-reg': lambda: (
    T.Dinov2WithRegistersForImageClassification(
      T.Dinov2WithRegistersConfig(**HF, num_labels=CLASSES)
    ),
    _OTHER,
  ),
  'clip': lambda: (T.CLIPVisionModel(T.CLIPVisionConfig(**_MLP)), _OTHER),
  'siglip': lambda: (T.SiglipVisionModel(T.SiglipVisionConfig(**_MLP)), _HALF),
}

if __name__ == '__main__':
  transformers.logging.set_verbosity_error()
  sys.exit(main())
