"""Sparsemax and its family against independent solvers, their derivatives, and what torch's transforms make of them."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable
from functools import partial

import entmax as package
import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyro_sparse.projections import entmax, entmax15, simplex, sparsemax, topk_sparsemax

Projection = Callable[..., Tensor]

FAMILY: dict[str, Projection] = {
    "sparsemax": sparsemax,
    "entmax15": entmax15,
    "entmax1.1": partial(entmax, alpha=1.1),
    "entmax1.7": partial(entmax, alpha=1.7),
    "entmax3": partial(entmax, alpha=3.0),
    "topk": partial(topk_sparsemax, k=3),
}
every = pytest.mark.parametrize("f", FAMILY.values(), ids=FAMILY.keys())

# torch.func.jacfwd and inductor themselves call torch.jit.script, which torch deprecates: by a DeprecationWarning, from
# 2.14 on by a FutureWarning.
torch_warns = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

# Rows for derivatives: dense and sparse supports, one of size one, a mask. Every zero is MARGIN or more below the
# threshold of each projection (test_smooth_rows). Row lengths of 6 are projected whole, those of 12 by candidates.
MARGIN = 1e-3
WHOLE = torch.tensor(
    [
        [0.30, 0.10, -0.05, 0.2, -3.5, -12.0],
        [1.50, -20.0, 1.20, 0.9, -0.35, -15.0],
        [30.0, 0.0, 10.0, -11.0, 5.0, 6.0],
        [0.40, -math.inf, 0.1, 0.33, -math.inf, -12.0],
    ],
    dtype=torch.float64,
)
ROWS = {"whole": WHOLE, "candidates": torch.cat([WHOLE - 0.5, torch.linspace(-60, -50, 24).reshape(4, 6)], -1)}
every_row = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())

finite = st.floats(-10, 10, allow_subnormal=False)
ties = st.integers(-3, 3).map(float)
huge = st.sampled_from([-1e30, 1e30, 0.0, 1.0])
masked = st.one_of(finite, st.just(-math.inf))


def scores_of(*elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    rows = st.one_of([st.lists(e, min_size=1, max_size=20) for e in elements])
    return rows.filter(lambda row: max(row) > -math.inf).map(torch.tensor)


def bisection(scores: Tensor, alpha: float) -> np.ndarray:
    """Entmax to all bits that float64 holds: halves the interval of the threshold until it is two neighbours."""
    z = (alpha - 1) * (scores.numpy() - scores.numpy().max())
    low, high = -1.0, 0.0
    while low < (middle := (low + high) / 2) < high:
        if (np.maximum(z - middle, 0) ** (1 / (alpha - 1))).sum() >= 1:
            low = middle
        else:
            high = middle
    return np.maximum(z - low, 0) ** (1 / (alpha - 1))


def quadratic_program(scores: Tensor) -> np.ndarray:
    """Sparsemax by its definition: min ½‖p − x‖² such that Σp = 1, p ≥ 0."""
    size = len(scores)
    constraints = np.concatenate([np.ones((size, 1)), np.eye(size)], 1)
    return quadprog.solve_qp(np.eye(size), scores.numpy(), constraints, np.eye(size + 1)[0], 1)[0]


class TestValues:
    @settings(max_examples=50)
    @given(scores_of(finite, ties, huge, masked))
    def test_sparsemax_is_the_threshold_found_by_bisection(self, scores: Tensor) -> None:
        np.testing.assert_allclose(sparsemax(scores), bisection(scores, 2.0), rtol=0, atol=1e-12)

    @settings(max_examples=50)
    @given(scores_of(finite, ties))
    def test_sparsemax_solves_the_quadratic_program(self, scores: Tensor) -> None:
        np.testing.assert_allclose(sparsemax(scores), quadratic_program(scores), rtol=0, atol=1e-12)

    @settings(max_examples=50)
    @given(scores_of(finite, ties, huge, masked))
    def test_entmax15_is_the_threshold_found_by_bisection(self, scores: Tensor) -> None:
        np.testing.assert_allclose(entmax15(scores), bisection(scores, 1.5), rtol=0, atol=1e-12)

    @settings(max_examples=50)
    @given(scores_of(finite, ties, huge, masked), st.floats(1.05, 2.0))
    def test_entmax_is_the_threshold_found_by_bisection(self, scores: Tensor, alpha: float) -> None:
        np.testing.assert_allclose(entmax(scores, alpha), bisection(scores, alpha), rtol=0, atol=1e-12)

    @settings(max_examples=50)
    @given(scores_of(finite, ties, huge, masked), st.floats(2.0, 4.0))
    def test_entmax_above_two(self, scores: Tensor, alpha: float) -> None:
        # Next to the threshold p = u^(1 / (alpha - 1)) magnifies the last bit of u, so compare u.
        p, expected = entmax(scores, alpha).numpy(), bisection(scores, alpha)
        np.testing.assert_allclose(p ** (alpha - 1), expected ** (alpha - 1), rtol=0, atol=1e-12)
        np.testing.assert_allclose(p.sum(), 1, rtol=0, atol=1e-14)

    @settings(max_examples=50)
    @given(scores_of(finite, ties))
    def test_agrees_with_the_entmax_package(self, scores: Tensor) -> None:
        for ours, theirs in (
            (sparsemax(scores), package.sparsemax(scores)),
            (entmax15(scores), package.entmax15(scores)),
            (entmax(scores, 1.3), package.entmax_bisect(scores, 1.3, n_iter=60)),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 100.0])
    def test_a_hundred_thousand_scores(self, scale: float) -> None:
        x = scale * torch.randn(100_000)
        for p, alpha in ((sparsemax(x), 2.0), (entmax15(x), 1.5), (entmax(x, 1.3), 1.3)):
            np.testing.assert_allclose(p, bisection(x, alpha), rtol=0, atol=1e-12)
            torch.testing.assert_close(p.sum(), torch.tensor(1.0), rtol=0, atol=1e-12)

    @every
    def test_extreme_scores(self, f: Projection) -> None:
        top = torch.tensor([1e30, -1e30, 0.0, 1e30, -1e308, -math.inf])
        torch.testing.assert_close(f(top), torch.tensor([0.5, 0, 0, 0.5, 0, 0]))
        torch.testing.assert_close(f(top.float()), torch.tensor([0.5, 0, 0, 0.5, 0, 0], dtype=torch.float32))
        torch.testing.assert_close(f(torch.full((5,), -1e30)).sum(), torch.tensor(1.0))

    @every
    def test_one_outcome_is_certain(self, f: Projection) -> None:
        f = partial(topk_sparsemax, k=1) if getattr(f, "func", None) is topk_sparsemax else f
        assert torch.equal(f(torch.tensor([[-7.0], [1e30], [0.0]])), torch.ones(3, 1))
        assert f(torch.tensor([[math.nan]])).isnan().all()

    def test_two_outcomes_are_the_hard_sigmoid(self) -> None:
        x = torch.linspace(-3, 3, 25)
        p = sparsemax(torch.stack([x, torch.zeros(25)], -1))[:, 0]
        torch.testing.assert_close(p, ((x + 1) / 2).clamp(0, 1))

    @every
    @pytest.mark.parametrize("size", [6, 40])
    def test_an_invalid_row_is_nan_and_leaves_the_others(self, f: Projection, size: int) -> None:
        x = 5 * torch.randn(5, size)
        expected = f(x)
        x[0, 2], x[1, 3], x[2] = math.nan, math.inf, -math.inf
        p = f(x)
        assert p[:3].isnan().all()
        assert torch.equal(p[3:], expected[3:])

    @every
    def test_mask_is_the_problem_without_the_masked(self, f: Projection) -> None:
        x = torch.randn(4, 9)
        x[:, [0, 4, 5]] = -math.inf
        p = f(x)
        assert (p[:, [0, 4, 5]] == 0).all()
        torch.testing.assert_close(p[:, [1, 2, 3, 6, 7, 8]], f(x[:, [1, 2, 3, 6, 7, 8]]))

    @every
    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
    def test_any_dim(self, f: Projection, dim: int) -> None:
        x = torch.randn(4, 5, 6)
        torch.testing.assert_close(f(x, dim=dim), f(x.movedim(dim, -1).contiguous()).movedim(-1, dim))

    @every
    def test_empty_batch_and_unchanged_input(self, f: Projection) -> None:
        assert f(torch.zeros(0, 7)).shape == (0, 7)
        x = torch.randn(3, 7)
        before = x.clone()
        f(x)
        assert torch.equal(x, before)

    @every
    @pytest.mark.parametrize("scale", [0.1, 1.0])
    def test_candidates_change_nothing(self, f: Projection, scale: float) -> None:
        x = torch.cat([scale * torch.randn(30, 8), torch.full((30, 9), -50.0)], -1).requires_grad_()
        p, whole = f(x), torch.vmap(f)(x)  # under vmap, rows are projected whole
        torch.testing.assert_close(p, whole, rtol=0, atol=1e-13)
        gradient, expected = (torch.autograd.grad(q.square().sum(), x)[0] for q in (p, whole))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-13)


class TestDtypes:
    @every
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_is_computed_in_single(self, f: Projection, dtype: torch.dtype) -> None:
        x = torch.randn(8, 50).to(dtype)
        assert f(x).dtype == dtype
        assert torch.equal(f(x), f(x.float()).to(dtype))

    @pytest.mark.parametrize("alpha", [1.2, 2.5, 4.0])
    @pytest.mark.parametrize("scale", [1e-3, 1.0])
    def test_single_sums_to_one(self, alpha: float, scale: float) -> None:
        x = scale * torch.randn(50, 2000, dtype=torch.float32)
        for p in (sparsemax(x), entmax15(x), entmax(x, alpha), topk_sparsemax(x, 7)):
            assert p.dtype == torch.float32
            assert (p.sum(-1) - 1).abs().max() <= 8 * 2000 * torch.finfo(torch.float32).eps
            assert p.min() >= 0

    @pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e-1, 10.0])
    def test_single_agrees_with_double(self, scale: float) -> None:
        x = scale * torch.randn(4, 50_000, dtype=torch.float32)
        for f in (sparsemax, entmax15, partial(entmax, alpha=1.7)):
            torch.testing.assert_close(f(x).double(), f(x.double()), rtol=0, atol=1e-6)

    def test_alpha_keeps_the_precision_of_the_scores(self) -> None:
        x = torch.randn(5)
        expected = entmax(x, 1.3)
        torch.set_default_dtype(torch.float32)  # the fixture puts it back
        assert torch.equal(entmax(x, 1.3), expected)


def threshold_gaps(p: Tensor, scores: Tensor, alpha: float) -> Tensor:
    """(α − 1) x − τ, from the largest probability: u = p^(α − 1) there."""
    z = (alpha - 1) * scores
    top = z.argmax(-1, keepdim=True)
    return z - z.gather(-1, top) + p.gather(-1, top).pow(alpha - 1)


class TestDerivatives:
    @every_row
    def test_smooth_rows(self, rows: Tensor) -> None:
        # The rows that follow have zeros and are away from kinks; otherwise those tests would show nothing.
        for name, alpha in (
            ("sparsemax", 2.0),
            ("entmax15", 1.5),
            ("entmax1.1", 1.1),
            ("entmax1.7", 1.7),
            ("entmax3", 3),
        ):
            p = FAMILY[name](rows)
            assert threshold_gaps(p, rows, alpha).abs().min() >= MARGIN
            assert (p == 0).any(-1).all()

    @every
    @every_row
    def test_first_and_second(self, f: Projection, rows: Tensor) -> None:
        free = rows > -math.inf  # finite differences cannot move a mask
        x = rows[free].requires_grad_()

        def of_free(x: Tensor) -> Tensor:
            return f(torch.full_like(rows, -math.inf).masked_scatter(free, x))

        assert gradcheck(of_free, (x,), atol=1e-7, rtol=1e-6)
        assert gradgradcheck(of_free, (x,), atol=1e-6, rtol=1e-5)

    @every
    @every_row
    def test_masked_scores_have_gradient_zero(self, f: Projection, rows: Tensor) -> None:
        x = rows.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        for gradient in (first, second):
            assert gradient.isfinite().all()
            assert (gradient[rows == -math.inf] == 0).all()

    @every_row
    def test_alpha(self, rows: Tensor) -> None:
        x = rows[[0, 1, 2]].requires_grad_()
        alpha = torch.tensor([[1.3], [1.7], [2.6]], requires_grad=True)
        assert gradcheck(entmax, (x, alpha), atol=1e-7, rtol=1e-6)
        assert gradgradcheck(entmax, (x, alpha), atol=1e-6, rtol=1e-5)

    def test_alpha_beside_a_mask(self) -> None:
        alpha = torch.tensor(1.4, requires_grad=True)
        masked = WHOLE[3]
        kept = masked[masked > -math.inf]
        expected = torch.autograd.grad(entmax(kept, alpha).square().sum(), alpha)
        torch.testing.assert_close(torch.autograd.grad(entmax(masked, alpha).square().sum(), alpha), expected)

    @every_row
    @pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0])
    def test_jacobian_is_the_formula(self, rows: Tensor, alpha: float) -> None:
        f = {1.5: entmax15, 2.0: sparsemax}.get(alpha, partial(entmax, alpha=alpha))
        for row in rows:
            p = f(row)
            s = torch.where(p > 0, torch.where(p > 0, p, 1).pow(2 - alpha), 0)
            expected = s.diag() - s.outer(s) / s.sum()
            torch.testing.assert_close(torch.autograd.functional.jacobian(f, row), expected)

    @torch_warns
    def test_third(self) -> None:
        # entmax gets tau by two Newton steps, which is enough for three derivatives; entmax15 is exact in all.
        def third(f: Projection) -> Tensor:
            return torch.func.jacfwd(torch.func.jacfwd(torch.func.jacrev(f)))(WHOLE[1, [0, 2, 3, 4]])

        torch.testing.assert_close(third(partial(entmax, alpha=1.5)), third(entmax15))

    @every
    def test_at_a_tie_the_gradient_is_one_sided(self, f: Projection) -> None:
        x = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5], requires_grad=True)
        assert torch.autograd.functional.jacobian(f, x).isfinite().all()
        left = torch.autograd.functional.jacobian(sparsemax, torch.tensor([0.5, -0.5]))
        assert torch.equal(left, torch.zeros(2, 2))


class TestTransforms:
    @every
    @every_row
    @torch_warns
    def test_func(self, f: Projection, rows: Tensor) -> None:
        jacobian = torch.stack([torch.autograd.functional.jacobian(f, row) for row in rows])
        torch.testing.assert_close(torch.vmap(f)(rows), f(rows))
        torch.testing.assert_close(torch.vmap(f, in_dims=1)(rows.mT), f(rows))
        torch.testing.assert_close(torch.vmap(torch.func.jacrev(f))(rows), jacobian)
        torch.testing.assert_close(torch.vmap(torch.func.jacfwd(f))(rows), jacobian)
        gradient = torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(rows)
        torch.testing.assert_close(gradient, 2 * (f(rows).unsqueeze(-2) @ jacobian).squeeze(-2))
        assert torch.func.hessian(f)(rows[0]).shape == 3 * rows[0].shape

    def test_vmap_over_alpha(self) -> None:
        alpha = torch.tensor([1.2, 1.6, 3.0])
        expected = torch.stack([entmax(WHOLE, float(a)) for a in alpha])
        torch.testing.assert_close(torch.vmap(entmax, in_dims=(None, 0))(WHOLE, alpha), expected)

    def test_an_invalid_alpha_that_cannot_be_read_gives_nan(self) -> None:
        p = torch.vmap(entmax, in_dims=(None, 0))(WHOLE[:3], torch.tensor([1.5, 1.0, 0.5]))
        assert p[0].isfinite().all()
        assert p[1:].isnan().all()

    @pytest.mark.parametrize("name", ["sparsemax", "entmax15", "entmax1.7", "topk"])
    def test_compile(self, name: str) -> None:
        check_compiled(FAMILY[name], "aot_eager")

    @pytest.mark.parametrize("name", ["sparsemax", "entmax15", "entmax1.7", "topk"])
    @pytest.mark.slow
    @torch_warns
    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by inductor's own use of it
    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
    def test_compile_to_machine_code(self, name: str) -> None:
        check_compiled(FAMILY[name], "inductor")

    def test_trace_fixes_no_support_size(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and warns of every shape that is compared
            traced = torch.jit.trace(sparsemax, torch.tensor([[9.0, 0, 0, 0, 0, 0]]))
        x = torch.randn(4, 6) / 100
        assert torch.equal(traced(x), sparsemax(x))


def check_compiled(f: Projection, backend: str) -> None:
    """Compiles the projection without graph breaks, and compares values and gradients with eager."""
    torch.compiler.reset()
    x = torch.cat(list(ROWS.values()), -1).float().requires_grad_()
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), f(x))
    expected = torch.autograd.grad(f(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), expected)


class TestAlpha:
    def test_entmax_contains_the_others(self) -> None:
        x = torch.randn(6, 30)
        torch.testing.assert_close(entmax(x, 2), sparsemax(x))
        torch.testing.assert_close(entmax(x, 1.5), entmax15(x))
        torch.testing.assert_close(entmax(x, 1 + 1e-6), x.softmax(-1), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4, 1, 1), (5, 1), (4, 5, 1)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        x, alpha = torch.randn(4, 5, 6), 1.1 + torch.rand(shape)
        each = alpha.expand(4, 5, 1)
        expected = torch.stack([torch.stack([entmax(x[i, j], float(each[i, j])) for j in range(5)]) for i in range(4)])
        torch.testing.assert_close(entmax(x, alpha), expected)

    def test_shape_with_another_dim(self) -> None:
        x, alpha = torch.randn(6, 4), 1.1 + torch.rand(1, 4)
        torch.testing.assert_close(entmax(x, alpha, dim=0), entmax(x.mT.contiguous(), alpha.mT).mT)

    @pytest.mark.parametrize("shape", [(6,), (4, 5), (5,), (4, 5, 6), (3, 1), (1, 1, 1, 1)])
    def test_other_shapes_raise(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"entmax: expected alpha to broadcast to \(4, 5, 1\).*unsqueeze"):
            entmax(torch.randn(4, 5, 6), torch.full(shape, 1.5))

    @pytest.mark.parametrize("alpha", [1, 1.0, 0.5, -2.0, math.nan, torch.tensor([[1.5], [1.0]])])
    def test_alpha_at_most_one_raises(self, alpha: float | Tensor) -> None:
        with pytest.raises(ValueError, match=r"expected alpha > 1, got .*torch\.softmax.*1 \+ torch\.sigmoid\(a\)"):
            entmax(torch.randn(2, 3), alpha)

    def test_alpha_that_rounds_to_one_raises(self) -> None:
        with pytest.raises(ValueError, match=r"expected alpha > 1, got 1\.0"):
            entmax(torch.randn(3, dtype=torch.float32), 1 + 5e-8)
        assert entmax(torch.randn(3, dtype=torch.float32), 1 + 7e-8).isfinite().all()

    @pytest.mark.parametrize("alpha", ["2", None, True])
    def test_alpha_of_another_type_raises(self, alpha: object) -> None:
        with pytest.raises(TypeError, match="expected alpha to be a number or a tensor"):
            entmax(torch.randn(2, 3), alpha)  # type: ignore[arg-type]


class TestTopK:
    @settings(max_examples=50)
    @given(scores_of(finite, ties, masked), st.integers(1, 6))
    def test_is_sparsemax_of_the_largest(self, scores: Tensor, k: int) -> None:
        k = min(k, len(scores))
        p, exact = topk_sparsemax(scores, k, return_exact=True)
        top = scores.topk(k).values
        assert (p[scores < top[-1]] == 0).all()
        torch.testing.assert_close(p.topk(k).values, sparsemax(top))  # as values: k may cut through a tie
        assert p.count_nonzero() <= k
        if exact:
            torch.testing.assert_close(p, sparsemax(scores), rtol=0, atol=1e-12)

    def test_is_the_closest_point_with_k_outcomes(self) -> None:
        x = torch.randn(5)
        pairs = torch.combinations(torch.arange(5))
        candidates = torch.zeros(10, 5).scatter(-1, pairs, sparsemax(x[pairs]))
        best = candidates[(candidates - x).square().sum(-1).argmin()]
        torch.testing.assert_close(topk_sparsemax(x, 2), best)

    def test_certificate(self) -> None:
        x = torch.tensor([[5.0, 0.0, 0.0, 0.0], [0.3, 0.2, 0.1, 0.0], [0.0, 0.0, -9.0, -9.0]])
        for k, expected in ((1, [False] * 3), (2, [True, False, False]), (3, [True, False, True]), (4, [True] * 3)):
            p, exact = topk_sparsemax(x, k, return_exact=True)
            assert exact.tolist() == expected
            torch.testing.assert_close(p[exact], sparsemax(x)[exact])
            p, exact = topk_sparsemax(x.mT, k, dim=0, return_exact=True)
            assert (p.shape, exact.tolist()) == ((4, 3), expected)

    @pytest.mark.parametrize("k", [0, -1, 5, 2.0, True, "2"])
    def test_bad_k_raises(self, k: object) -> None:
        with pytest.raises(
            ValueError, match="topk_sparsemax: expected k to be an integer from 1 to 4, the size of dim 0"
        ):
            topk_sparsemax(torch.randn(4, 3), k, dim=0)  # type: ignore[call-overload]


class TestBadInput:
    @every
    @pytest.mark.parametrize(
        "scores", [torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.cfloat), [1.0, 2.0]]
    )
    def test_not_floating_point_raises(self, f: Projection, scores: Tensor) -> None:
        with pytest.raises(TypeError, match=r"(max|15): expected a floating-point tensor of scores, got .*\. Use"):
            f(scores)

    @every
    def test_no_outcome_raises(self, f: Projection) -> None:
        with pytest.raises(ValueError, match=r"expected at least one outcome along dim 1, got shape \(3, 0, 2\)"):
            f(torch.zeros(3, 0, 2), dim=1)

    @every
    @pytest.mark.parametrize(("shape", "dim"), [((), -1), ((3,), 1), ((3, 4), -3)])
    def test_no_such_dim_raises(self, f: Projection, shape: tuple[int, ...], dim: int) -> None:
        with pytest.raises(ValueError, match=rf"expected dim to be a dimension of scores .*, got {dim}"):
            f(torch.zeros(shape), dim=dim)


class TestSearch:
    def test_newton_without_a_look_at_the_error_takes_enough_steps(self) -> None:
        # A row that an adversarial search found: groups of equal scores just above the lower bound of the
        # threshold, each of which hides the next. Under vmap the steps are not stopped by looking.
        height = torch.tensor([2.0, 6.4e-8, 5.8e-6, 0.0699, 0.124, 0.1615, 0.179, 0.95])
        count = torch.tensor([1, 20_000, 20_000, 187, 20_000, 20_000, 20_000, 1])
        x = (height - 2).repeat_interleave(count)
        expected = bisection(x, 1.5)
        np.testing.assert_allclose(entmax15(x), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(torch.vmap(entmax15)(x.unsqueeze(0))[0], expected, rtol=0, atol=1e-12)

    def test_candidates_are_used_where_they_are_few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        widths = []

        def record(x: Tensor) -> Tensor:
            widths.append(x.shape[-1])
            return original(x)

        original = simplex._sparsemax
        monkeypatch.setattr(simplex, "_sparsemax", record)
        sparsemax(ROWS["candidates"])
        sparsemax(ROWS["whole"])
        torch.vmap(sparsemax)(ROWS["candidates"])
        assert widths == [4, 6, 12]

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("name", ["sparsemax", "entmax15", "entmax1.7"])
    def test_export_fixes_no_size(self, name: str) -> None:
        class Module(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return FAMILY[name](x)

        sizes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("outcomes")}
        exported = torch.export.export(Module(), (torch.randn(4, 7),), dynamic_shapes=(sizes,))
        x = torch.randn(5, 11)
        torch.testing.assert_close(exported.module()(x), FAMILY[name](x))


def test_dim_by_position() -> None:
    x = torch.randn(3, 4, 5)
    for f in (sparsemax, entmax15):
        assert torch.equal(f(x, 0), f(x, dim=0))
    assert torch.equal(entmax(x, 1.7, 1), entmax(x, 1.7, dim=1))
    assert torch.equal(topk_sparsemax(x, 2, 1), topk_sparsemax(x, 2, dim=1))
