"""What tests share: models, oracles, strategies and the means to compare."""
