"""Makes pretrained/convit-timm.json: a small ConViT of timm, made-up weights.

Run `python tests/golden/make_convit_golden.py` where PyTorch and timm are
installed. The file in the repository was made with timm 1.0.31 and
torch 2.15.0.
"""

import fake_checkpoint
import timm
import torch
from timm.models.convit import ConVit

IMAGE_SIZE = 32
# Not ImageNet's, to tell that they are read.
CONFIG = {
  'architecture': 'convit_tiny',
  'num_classes': 5,
  'global_pool': 'token',
  'pretrained_cfg': {
    'input_size': [3, IMAGE_SIZE, IMAGE_SIZE],
    'mean': [0.4, 0.5, 0.6],
    'std': [0.2, 0.3, 0.25],
  },
}


def logits_of(model, images):
  """Runs a timm model on images [B, H, W, 3] in [0, 1], normalised."""
  mean, std = (CONFIG['pretrained_cfg'][field] for field in ('mean', 'std'))
  x = (torch.from_numpy(images) - torch.tensor(mean)) / torch.tensor(std)
  with torch.no_grad():
    return model(x.permute(0, 3, 1, 2)).numpy()


def main():
  model = ConVit(
    img_size=IMAGE_SIZE,
    patch_size=8,
    num_classes=5,
    embed_dim=8,  # of one head
    depth=3,
    num_heads=3,
    local_up_to_layer=2,
  ).eval()
  shapes = {key: tuple(v.shape) for key, v in model.state_dict().items()}
  arrays = fake_checkpoint.weights(shapes)
  model.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()})
  fake_checkpoint.write(
    'convit-timm',
    shapes,
    CONFIG,
    IMAGE_SIZE,
    logits_of(model, fake_checkpoint.images(IMAGE_SIZE)),
    f'timm {timm.__version__}, torch {torch.__version__.split("+")[0]}',
  )


if __name__ == '__main__':
  main()
