"""Runs on disk: the format as types, and the only code that reads and writes it."""
