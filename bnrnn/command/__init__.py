"""The command `bnrnn`."""
