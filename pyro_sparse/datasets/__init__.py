r"""What the tutorials and benchmarks load. No other room imports this one, and it imports no other room."""

from pyro_sparse.datasets.digits import Digits, load_digits
from pyro_sparse.datasets.words import load_words

__all__ = ["Digits", "load_digits", "load_words"]
