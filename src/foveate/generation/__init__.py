"""Text one token after the other."""
