r"""What the tutorials and benchmarks load. No other room imports this one, and it imports no other room."""

from pyro_sparse.datasets.digits import Digits, load_digits
from pyro_sparse.datasets.morphology import Inflection, load_morphology
from pyro_sparse.datasets.treebank import Sentence, load_treebank
from pyro_sparse.datasets.words import load_words

__all__ = ["Digits", "load_digits", "Inflection", "load_morphology", "Sentence", "load_treebank", "load_words"]
