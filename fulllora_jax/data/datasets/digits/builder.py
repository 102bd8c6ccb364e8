"""The tfds builder of the digits that scikit-learn carries: no download."""

import numpy as np
import tensorflow_datasets as tfds

_DESCRIPTION = (
  '1,797 handwritten digits of 8x8 pixels, the test part of the UCI set as '
  'scikit-learn carries it. Values 0..16 are scaled to 0..255. Every fifth '
  'image, from the first, is in the test split: 1,437 train, 360 test.'
)
_CITATION = """@misc{alpaydin1998digits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}"""


class Digits(tfds.core.GeneratorBasedBuilder):
  """Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, 1998)."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
          'label': tfds.features.ClassLabel(names=[str(k) for k in range(10)]),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://archive.ics.uci.edu/dataset/80',
      citation=_CITATION,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing to download
    return {
      'train': self._generate_examples(test=False),
      'test': self._generate_examples(test=True),
    }

  def _generate_examples(self, test: bool):
    # Only preparation needs scikit-learn.
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    for i, (image, label) in enumerate(zip(images, digits.target, strict=True)):
      if (i % 5 == 0) == test:
        yield i, {'image': image, 'label': int(label)}
