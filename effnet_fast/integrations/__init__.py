"""What other packages ask of a network: timm's registry, and the Hugging Face Hub.

Neither package is imported before it is used, and neither is a requirement.
"""
