"""Objectives: what is optimised. One file each, with a `Config` and a class `Objective` (see types.Objective)."""
