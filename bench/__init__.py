"""Measurements: scripts, and their checked-in results. `python -m bench.NAME`."""
