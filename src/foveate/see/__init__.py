"""Sight: what a model looked at, as data, in the terminal, as a picture and as a page."""
