"""A whole network for inference: what of it the kernels know, its packed weights, its engines."""
