"""Variables with atoms and a density, on a line or on the simplex: their base, their wrappers and divergences."""
