"""Observers of a training run. Each module here defines one observer, which is named like its module.

A new observer needs only its file: :mod:`moescale.report.registry` finds it. Importing a module here must be cheap,
because every run imports them all; import the package of a service in ``on_start``.
"""
