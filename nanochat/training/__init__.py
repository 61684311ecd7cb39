"""Training with Lightning: the module with the two seams, and the callbacks."""
