"""How robust a model is: attacks on a split, and whether to believe it."""
