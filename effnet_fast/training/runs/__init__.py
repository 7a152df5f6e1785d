"""A training run: recipe, optimizer, loop, its folder and its state."""
