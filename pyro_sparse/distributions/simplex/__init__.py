"""Mixed variables on the simplex: which coordinates are not zero, and a density on that face."""
