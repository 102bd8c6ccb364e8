"""A smoothed model: what a model answers on average under Gaussian noise on its input.

Noise has the unit of pixels in [0, 1], comes before the model's normalisation and is not clipped
(Cohen et al., 2019, arXiv 1902.02918). A draw follows from the image's key and the draw's number.
"""

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.pgd import LogitsFn


def noisy(keys: jax.Array, draw: jax.Array | int, x: jax.Array, sigma: float) -> jax.Array:
  """Adds one draw of noise to each image.

  Args:
    keys: PRNG keys [B], one for each image.
    draw: the numbers of the draws, int [B], or one for all, int [].
    x: images [B, H, W, C].
    sigma: the standard deviation of the noise, in [0, 1] pixels.

  Returns:
    x + noise, float32 [B, H, W, C], not clipped.
  """
  own = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(draw, keys.shape))
  return x + sigma * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(own)


def smoothed(keys: jax.Array, logits_fn: LogitsFn, sigma: float, draws: int) -> LogitsFn:
  """Returns images -> the log of the mean softmax over fixed draws of noise, [B, K].

  Its cross entropy is what SmoothAdv raises (Salman et al., 2019, arXiv 1906.04584, equation 6).
  The backward pass computes each draw again, so memory is that of one draw.

  Args:
    keys: PRNG keys [B], one for each image; the draws are the same in every call.
    logits_fn: images [B, H, W, C] -> logits [B, K].
    sigma: the standard deviation of the noise, in [0, 1] pixels.
    draws: the number of draws, at least 1.
  """

  def log_mean(x: jax.Array) -> jax.Array:
    def one(draw):
      return losses.log_softmax(logits_fn(noisy(keys, draw, x, sigma)))

    every = jax.lax.map(jax.checkpoint(one, prevent_cse=False), jnp.arange(draws))
    return jax.nn.logsumexp(every, axis=0) - jnp.log(draws)

  return log_mean
