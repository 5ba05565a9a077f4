"""Worked examples: real data, plain Pyro models, and guides written by hand."""
