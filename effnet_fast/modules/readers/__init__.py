"""Classes of modules, and how each is taken apart into a `structure.Layer` or block."""
