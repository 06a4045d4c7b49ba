"""``moescale report``: one self-contained HTML page about a run, or one that compares several.

``run_data`` reads a run's folder, ``figures`` draws, ``page`` puts both into ``page.html``. Nothing here needs a GPU or
writes to the run; it may still be going.
"""
