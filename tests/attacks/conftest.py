import jax
import pytest


@pytest.fixture(autouse=True)
def strict_ranks():
  """Broadcasting between arrays of different rank is an error."""
  with jax.numpy_rank_promotion('raise'):
    yield
