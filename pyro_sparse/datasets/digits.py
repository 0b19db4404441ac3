r"""The 1797 handwritten digits, 8 by 8 pixels, that come inside scikit-learn: real images without a download."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_NUM_IMAGES = 1797
_FULL_INK = 16  # a pixel is a count from 0 (paper) to 16 (ink)


class Digits(NamedTuple):
    r"""The digits, split into a training and a test part.

    Attributes:
        train_images: shape ``(N, 64)``, row-major 8 by 8 pixels in :math:`[0, 1]`.
        train_labels: shape ``(N,)``, the digits 0 to 9 as ``torch.long``.
        test_images: shape ``(M, 64)``.
        test_labels: shape ``(M,)``.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(*, binarize: bool = True, test_size: int = 261) -> Digits:
    r"""Loads scikit-learn's handwritten digits as torch tensors of the default dtype.

    A pixel is a count :math:`c \in \{0, \dots, 16\}`. The image holds :math:`1[c \ge 8]` if ``binarize``, which suits a
    Bernoulli likelihood, and the intensity :math:`c / 16` otherwise.

    The split is fixed and needs no random numbers: the ``M = test_size`` test images are those numbered
    :math:`\lfloor 1797\, m / M \rfloor` for :math:`m = 0, \dots, M - 1`, spread evenly over the file. By default
    1536 = 12 · 128 images are left for training, twelve full minibatches of 128.

    Args:
        binarize: whether pixels are 0 or 1 (threshold 8/16) or intensities.
        test_size: how many images are set aside for testing.

    Returns:
        A :class:`Digits` of four tensors.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.
        ValueError: if ``test_size`` leaves nothing for training or for testing.

    **Source**: Alpaydin and Kaynak (1998), *Optical Recognition of Handwritten Digits*, UCI Machine Learning
    Repository, the test part, as packed with :func:`sklearn.datasets.load_digits`.
    """
    if not 1 <= test_size < _NUM_IMAGES:
        raise ValueError(
            f"load_digits: expected test_size from 1 to {_NUM_IMAGES - 1}, got {test_size}. "
            f"There are {_NUM_IMAGES} images in all."
        )
    try:
        from sklearn.datasets import load_digits as load_from_sklearn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"load_digits: expected scikit-learn, got {error}. "
            'The digits come with it: pip install "pyro_sparse[tutorials]".'
        ) from error

    raw = load_from_sklearn()
    counts = torch.as_tensor(raw.data, dtype=torch.get_default_dtype())
    images = (counts >= _FULL_INK / 2).to(counts.dtype) if binarize else counts / _FULL_INK
    labels = torch.as_tensor(raw.target, dtype=torch.long)
    is_test = torch.zeros(_NUM_IMAGES, dtype=torch.bool)
    is_test[torch.arange(test_size) * _NUM_IMAGES // test_size] = True
    return Digits(images[~is_test], labels[~is_test], images[is_test], labels[is_test])
