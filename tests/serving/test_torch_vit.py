"""The PyTorch twin that the comparison with the authors' code attacks."""

import pathlib

import jax
import numpy as np
import pytest

from fulllora_jax.serving import classifier


def test_the_twin_gives_the_logits_of_the_run(finished, monkeypatch):
  torch = pytest.importorskip('torch', reason='PyTorch is not installed')
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
  from torch_vit import TorchViT

  loaded = classifier.load(finished.workdir)
  images = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
  config = loaded.metadata['config']
  for variables, logits in (
    (loaded.variables, loaded.logits(images)),
    (loaded.base_variables, loaded.base_logits(images)),
  ):
    twin = TorchViT(jax.device_get(variables), config).eval()
    with torch.no_grad():
      found = twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(found.numpy(), logits, atol=1e-4)
