"""Observers of a training run: each shows it or keeps its numbers in one way, and one file holds one of them.

``observer`` has the interface, ``registry`` the names under which a run asks for observers.
"""
