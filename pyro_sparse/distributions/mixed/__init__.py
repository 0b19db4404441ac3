"""What variables with atoms and a density have in common, on a line or on the simplex."""
