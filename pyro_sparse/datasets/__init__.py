r"""What the tutorials and benchmarks load. No other room imports this one, and it imports no other room."""

from pyro_sparse.datasets.digits import Digits, load_digits

__all__ = ["Digits", "load_digits"]
