"""Adapters: which parameters train, and how they are saved. One file each, with a `Config` and a class `Adapter`."""
