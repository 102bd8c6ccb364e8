"""Writes tests/golden/real_vit_tiny.npz: what timm makes of real weights and real images.

  pip install torch==2.13.0 timm==1.0.31 pillow
  FULLLORA_WEIGHTS=... FULLLORA_IMAGENETTE=... python tests/golden/make_real_weights_golden.py

FULLLORA_WEIGHTS is a folder with vit_tiny_patch16_224.safetensors, FULLLORA_IMAGENETTE one with
test/WNID/*.JPEG of 224 x 224 pixels. tests/pretrained/test_real_weights.py compares with it:

names         [10] the first image of each class, below test/
hashes        [10] SHA-256 of those files
logits        [10, 1000] of the images as they are: timm's evaluation at 224 px with crop_pct 1
small_logits  [10, 1000] of the images at 32 px (Pillow's bicubic, as timm's), by the same weights
              in patches of 8 px: positions and patches are resampled by timm's own filter
positions     [1, 17, 192] the position embedding of that model
patches       [8, 8, 3, 4] the first 4 filters of its patch kernel, in our layout
interpolated  [8, 8, 3, 4] the same filters by PyTorch's antialiased bicubic interpolation
made_by       the versions
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

MODEL = 'vit_tiny_patch16_224'


def main():
  torch.set_num_threads(2)
  weights = Path(os.environ['FULLLORA_WEIGHTS'], f'{MODEL}.safetensors')
  root = Path(os.environ['FULLLORA_IMAGENETTE'], 'test')
  names = [str(min(folder.iterdir()).relative_to(root)) for folder in sorted(root.iterdir())]
  model, small = (of_timm(weights, **sizes) for sizes in ({}, dict(img_size=32, patch_size=8)))
  kernel = load_file(weights)['patch_embed.proj.weight'][:4]
  interpolated = F.interpolate(kernel, (8, 8), mode='bicubic', antialias=True)
  np.savez_compressed(
    Path(__file__).parent / 'real_vit_tiny.npz',
    names=names,
    hashes=[hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names],
    logits=logits(model, [root / name for name in names], 224),
    small_logits=logits(small, [root / name for name in names], 32),
    positions=small.pos_embed.detach().numpy(),
    patches=ours(small.patch_embed.proj.weight.detach()[:4]),
    interpolated=ours(interpolated),
    made_by=f'timm {timm.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}',
  )


def of_timm(weights, **sizes):
  overlay = {'file': str(weights)}
  return timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay, **sizes).eval()


def logits(model, paths, size):
  images = torch.stack([pixels(path, size) for path in paths])
  mean, std = (torch.tensor(model.pretrained_cfg[k]).reshape(3, 1, 1) for k in ('mean', 'std'))
  with torch.no_grad():
    return model((images - mean) / std).numpy()


def pixels(path, size):
  image = Image.open(path).convert('RGB')
  assert image.size == (224, 224)
  image = image.resize((size, size), Image.Resampling.BICUBIC)
  return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)


def ours(kernel):
  return kernel.permute(2, 3, 1, 0).numpy()


if __name__ == '__main__':
  main()
