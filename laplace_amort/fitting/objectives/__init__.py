"""What a fit maximizes: each objective in one file, its settings and its function of the parameters."""
