"""Mixed variables on a line: atoms at the ends, or at zero, and a density beside them."""
