"""Traces in, the terms of the ELBO out: which they are, what they depend on, what they sum to."""
