"""Is a robust accuracy to be believed? Checks of the model and the attack."""
