"""The commands as functions: ``prepare``, ``compile``, ``train`` and ``export``, which ``moescale`` itself exports.

Each takes one record of settings and returns one of results; the command line builds the first and prints the second.
``compile`` imports no torch. May import: everything below the command line.
"""
