"""Makes fulllora_jax/core/imagenet_classes.txt from timm's own tables; needs timm.

python tests/golden/make_imagenet_classes.py
"""

import pathlib

from timm.data import ImageNetInfo

PATH = pathlib.Path(__file__).parents[2] / 'fulllora_jax' / 'core' / 'imagenet_classes.txt'


def main():
  info = ImageNetInfo('imagenet-1k')
  names = [info.index_to_description(row).split(',')[0] for row in range(1000)]
  lines = (f'{wnid} {name}\n' for wnid, name in zip(info.label_names(), names, strict=True))
  PATH.write_text(''.join(lines))


if __name__ == '__main__':
  main()
