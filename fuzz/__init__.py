"""Fuzzing: every decoder of bytes that come from elsewhere, and what it may do with any of them."""
