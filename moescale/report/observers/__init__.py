"""Observers of a training run. Every module here defines one, and a run asks for it by the module's name.

A new one needs its file and nothing else: :mod:`moescale.report.registry` finds it. Importing a module here must be
cheap, because every run imports them all; import a service's package in ``on_start``.
"""
