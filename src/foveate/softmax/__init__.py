"""Softmax attention: one definition (`reference`), and files that compute the same numbers in other ways."""
