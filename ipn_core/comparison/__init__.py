"""Comparisons of interactions at equal budget: `ipn compare`."""
