"""A smoothed model: what a model answers on average under Gaussian noise on its input.

Noise has the unit of pixels in [0, 1], comes before the model's normalisation and is not clipped
(Cohen et al., 2019, arXiv 1902.02918). A draw follows from the image's key and the draw's number.
"""

import jax
import jax.numpy as jnp

from fulllora_jax.attacks import losses
from fulllora_jax.attacks.pgd import LogitsFn


def noisy(keys: jax.Array, draw: jax.Array | int, x: jax.Array, sigma: float) -> jax.Array:
  """Returns x [B, H, W, C] and noise of deviation sigma, not clipped, float32.

  The noise is that of the images' keys [B] and of the number of the draw, int [B] or one for all.
  """
  own = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(draw, keys.shape))
  return x + sigma * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(own)


def smoothed(keys: jax.Array, logits_fn: LogitsFn, sigma: float, draws: int) -> LogitsFn:
  """Returns images -> the log of the mean softmax over fixed draws of noise, [B, K].

  Its cross entropy is what SmoothAdv raises (Salman et al., 2019, arXiv 1906.04584, equation 6).
  The backward pass computes each draw again, so memory is that of one draw.
  The draws 0..draws-1 of the images' keys [B] are the same in every call.
  """

  def log_mean(x: jax.Array) -> jax.Array:
    def one(draw):
      return losses.log_softmax(logits_fn(noisy(keys, draw, x, sigma)))

    every = jax.lax.map(jax.checkpoint(one, prevent_cse=False), jnp.arange(draws))
    return jax.nn.logsumexp(every, axis=0) - jnp.log(draws)

  return log_mean
