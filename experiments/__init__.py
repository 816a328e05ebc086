"""Experiments: one file, one falsifiable claim.  ``python -m experiments.<name> --help``."""
