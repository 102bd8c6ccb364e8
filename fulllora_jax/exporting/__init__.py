"""The files that fulllora_jax.export writes: their bytes, and reading them."""
