"""Makes tests/golden/pretrained/swin-*.json with timm and transformers.

Run from the repository root, with PyTorch, timm and transformers:

  python tests/golden/make_swin_golden.py

The files were made with torch 2.15.0, timm 1.0.31 and transformers 5.23.0.
The models are small and their weights made up (fake_checkpoint.py).
"""

import json
import pathlib
import tempfile

import fake_checkpoint
import numpy as np
import safetensors.numpy
import timm
import torch
import transformers
from timm.models import save_for_hf

NUM_CLASSES = 5
IMAGE_SIZE = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_timm(case, **changed):
  """A Swin of timm, as it would be pushed to a hub."""
  model = timm.create_model(
    'swin_tiny_patch4_window7_224',
    num_classes=NUM_CLASSES,
    img_size=IMAGE_SIZE,
    embed_dim=16,
    **changed,
  )
  shapes = {key: tuple(a.shape) for key, a in model.state_dict().items()}
  weights = fake_checkpoint.weights(shapes)
  model.load_state_dict({k: torch.from_numpy(a) for k, a in weights.items()})
  with tempfile.TemporaryDirectory() as folder:
    save_for_hf(model, folder)
    write(case, shapes, folder, model.eval())


def make_transformers(case):
  """A SwinForImageClassification, as `save_pretrained` writes it."""
  config = transformers.SwinConfig(
    image_size=IMAGE_SIZE,
    patch_size=2,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
    num_labels=NUM_CLASSES,
  )
  model = transformers.SwinForImageClassification(config)
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    # The names in a file are those of earlier versions, not the model's own.
    file = f'{folder}/model.safetensors'
    arrays = safetensors.numpy.load_file(file)
    shapes = {key: array.shape for key, array in arrays.items()}
    weights = fake_checkpoint.weights(shapes)
    safetensors.numpy.save_file(weights, file, {'format': 'pt'})
    model = type(model).from_pretrained(folder).eval()
    write(case, shapes, folder, lambda images: model(images).logits)


def write(case, shapes, folder, model):
  """Runs the model on the images that the tests have, and writes the case."""
  images = (fake_checkpoint.images(IMAGE_SIZE) - MEAN) / STD
  images = images.astype(np.float32).transpose(0, 3, 1, 2)
  with torch.no_grad():
    logits = model(torch.from_numpy(np.ascontiguousarray(images))).numpy()
  fake_checkpoint.write(
    case,
    shapes,
    json.loads(pathlib.Path(folder, 'config.json').read_text()),
    IMAGE_SIZE,
    logits,
    f'torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}',
  )


if __name__ == '__main__':
  # Grids of 16, 8 and 4 tokens: windows that shift, fill the grid, are clamped.
  make_timm('swin-timm', patch_size=2, window_size=8, depths=(2, 2, 2), num_heads=(2, 4, 8))
  # Grids of 8 and 4, both padded, and shifted.
  make_timm('swin-timm-padded', patch_size=4, window_size=3, depths=(2, 2), num_heads=(2, 4))
  make_transformers('swin-transformers')
