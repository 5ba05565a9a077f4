"""Worked examples: real data, a plain Pyro model, and guides of the amortized Laplace family written by hand."""
