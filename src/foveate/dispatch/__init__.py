"""Who computes a call, and calls like one before."""
