"""Published weights: their names, their files, and the images that they need."""
