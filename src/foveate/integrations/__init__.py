"""Foveate inside other libraries' models, one file a library."""
