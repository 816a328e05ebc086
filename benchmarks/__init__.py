"""Benchmarks: one file, one comparison; equality is checked before time.  ``python -m benchmarks --help``."""
