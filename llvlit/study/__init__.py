"""Grids of experiments: run, resumed, tabulated."""
