"""Benchmarks. They measure, they never assert: see `make bench`."""
