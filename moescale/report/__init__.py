"""What a run tells: records of metrics, and the observers that show and keep them.

May import: moescale.config, moescale.errors, moescale.files, moescale.records.
"""
