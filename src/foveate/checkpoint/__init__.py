"""Folders of weights: their format, their files, and what `from_pretrained` reads."""
