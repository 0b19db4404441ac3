"""The digits: sizes, pixels, a split that is fixed and leaves nothing out, and what bad input says."""

from __future__ import annotations

import sys

import pytest
import torch
from sklearn.datasets import load_digits as load_from_sklearn

from pyro_sparse.datasets import load_digits


def test_default_is_twelve_minibatches_of_binary_images() -> None:
    data = load_digits()
    assert data.train_images.shape == (12 * 128, 64) and data.train_labels.shape == (12 * 128,)
    assert data.test_images.shape == (261, 64) and data.test_labels.shape == (261,)
    assert data.train_images.dtype == torch.float64 and data.train_labels.dtype == torch.long
    assert set(data.train_images.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_have_the_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    assert load_digits().test_images.dtype == dtype
    assert load_digits(binarize=False).test_images.dtype == dtype


def test_intensities_are_scikit_learns_counts_and_the_threshold_is_half() -> None:
    raw = load_from_sklearn()
    grey, binary = load_digits(binarize=False), load_digits()
    counts = torch.cat([grey.train_images, grey.test_images]) * 16
    expected = torch.as_tensor(raw.data)
    # The same images with the same labels, each once: rows compared after sorting them by their content and label.
    got = torch.cat([counts, torch.cat([grey.train_labels, grey.test_labels])[:, None]], dim=1)
    want = torch.cat([expected, torch.as_tensor(raw.target, dtype=expected.dtype)[:, None]], dim=1)
    assert sorted(got.tolist()) == sorted(want.tolist())
    assert torch.equal(binary.test_images, (grey.test_images >= 0.5).to(torch.float64))


def test_split_is_fixed_and_holds_every_digit() -> None:
    first, again = load_digits(), load_digits()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for labels in (first.train_labels, first.test_labels):
        assert (labels.bincount(minlength=10) / len(labels)).min() > 0.05


@pytest.mark.parametrize("test_size", [1, 2, 898, 1796])
def test_any_split_uses_every_image_once(test_size: int) -> None:
    data = load_digits(test_size=test_size)
    assert len(data.test_images) == len(data.test_labels) == test_size
    assert len(data.train_images) == len(data.train_labels) == 1797 - test_size


@pytest.mark.parametrize("test_size", [0, -1, 1797])
def test_empty_part_is_an_error(test_size: int) -> None:
    with pytest.raises(ValueError, match=rf"load_digits: expected test_size from 1 to 1796, got {test_size}"):
        load_digits(test_size=test_size)


def test_missing_scikit_learn_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'scikit-learn.*pip install "pyro_sparse\[tutorials\]"'):
        load_digits()
