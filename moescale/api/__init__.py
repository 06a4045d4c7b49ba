"""The commands as functions: ``compile``, ``train`` and ``export``, which ``moescale`` re-exports.

Each takes a record of settings and returns a record of results. The command line builds the first and prints the last.
``compile`` imports no torch. May import: everything below the command line.
"""
