"""From a config to a trained adapter: Algorithm 1 and the loop around it."""
