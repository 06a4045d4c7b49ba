"""The former place of :mod:`moescale.models`, for one caller that still names it."""
