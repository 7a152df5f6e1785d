"""The modules of EfficientNet, what they consist of, and their fused forward."""
