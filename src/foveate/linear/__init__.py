"""Attention with a state: one recurrence instead of the matrix of weights. One file = one way to compute it."""
