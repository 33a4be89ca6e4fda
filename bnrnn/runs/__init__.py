"""A run on disk: its format as types, and the only code that reads and writes it."""
