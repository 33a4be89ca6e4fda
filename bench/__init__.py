"""Benchmarks, see `make bench`. They measure and never assert."""
