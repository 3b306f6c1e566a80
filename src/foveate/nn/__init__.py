"""Modules with parameters, built on the functions of `foveate.functional`."""
