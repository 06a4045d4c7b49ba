"""Reports of a run: metrics, the observers that display and store them, and warnings.

May import: moescale.config, moescale.errors, moescale.files, moescale.records.
"""
