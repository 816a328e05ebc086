"""The command ``rnngrad``: what stands in its files, and nothing that the library itself needs.

``commands`` declares the subcommands and shows results, ``loading`` finds a user's model, weights and inputs,
``catalogue`` reads the table of cells off :mod:`rnngrad.cells`.
"""
