"""Sphinx: the documents of this folder, and an API reference made from the docstrings."""

import effnet_fast

project = "effnet-fast"
author = "The effnet-fast authors"
version = release = effnet_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"effnet-fast {release}"

myst_heading_anchors = 3
default_role = "code"  # docstrings write code between single backticks
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autodoc_default_options = {"show-inheritance": False}
python_maximum_signature_line_length = 88
