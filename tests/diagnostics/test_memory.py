"""peak_memory against counts made by hand; sizes are in bytes of float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pyro_sparse.diagnostics import peak_memory

N = 1000
BYTES = 8 * N


def test_counts_what_is_alive_at_once() -> None:
    with peak_memory() as memory:
        a = torch.zeros(N)
        b = a + 1  # a, b
        del a
        c = b * 2  # b, c
        del b, c
        assert memory.current == 0
        d = torch.ones(N // 2)
    assert memory.peak == 2 * BYTES
    assert memory.current == d.nbytes
    assert repr(memory) == f"MemoryUse(peak={2 * BYTES}, current={d.nbytes})"


def test_empty_block_and_tensors_from_before() -> None:
    before = torch.zeros(N)
    with peak_memory() as memory:
        before += 1
        before.view(10, -1).t()[3:].mul_(2)
        torch.add(before, 1, out=before)
    assert (memory.peak, memory.current) == (0, 0)


def test_views_and_in_place_operations_are_free() -> None:
    with peak_memory() as memory:
        a = torch.zeros(N)
        views = [a.view(10, -1), a[3:], *a.chunk(4), a.expand(50, N), a.detach()]
        a.add_(1).relu_()
        views[0].mul_(2)
    assert (memory.peak, memory.current) == (BYTES, BYTES)


def test_a_view_keeps_its_storage() -> None:
    with peak_memory() as memory:
        view = torch.zeros(N)[:1]
        assert memory.current == BYTES
        del view
        assert memory.current == 0


def test_memory_freed_after_the_block_is_seen() -> None:
    with peak_memory() as memory:
        a = torch.zeros(N)
    del a
    assert (memory.peak, memory.current) == (BYTES, 0)


def test_tuples_and_lists_of_outputs() -> None:
    with peak_memory() as memory:
        values, indices = torch.arange(N, dtype=torch.float64).sort()  # the range and two outputs
        assert memory.peak == 3 * BYTES
        roots = torch._foreach_sqrt([values, values])
    assert memory.current == 4 * BYTES == sum(x.nbytes for x in [values, indices, *roots])


def test_resizing_counts_the_new_size() -> None:
    with peak_memory() as memory:
        a = torch.empty(0)
        torch.ones(N, out=a)
        assert memory.current == BYTES
        a.resize_(2 * N)
    assert (memory.peak, memory.current) == (2 * BYTES, 2 * BYTES)


def test_tensors_from_python_and_numpy() -> None:
    with peak_memory() as memory:
        a = torch.tensor([1.0, 2.0])
        assert memory.current == a.nbytes
        b = torch.from_numpy(np.ones(N))
        assert memory.current == a.nbytes + b.nbytes


def test_what_autograd_saves_lives_until_backward() -> None:
    x = torch.ones(N, requires_grad=True)
    with peak_memory() as memory:
        loss = x.exp().exp().sum()  # each exp saves its result: two tensors and the loss
        assert memory.current == 2 * BYTES + 8
        loss.backward()
        assert memory.current == BYTES + 8  # the gradient and the loss
    # Backward through the upper exp: both saved results and the gradient below it (the one above is a view of a single
    # number); through the lower: its own saved result, the gradients above and below it. And the loss and its gradient.
    assert memory.peak == 3 * BYTES + 8 + 8
    del loss
    x.grad = None
    assert memory.current == 0


def test_without_autograd_nothing_is_saved() -> None:
    x = torch.ones(N, requires_grad=True)
    with torch.no_grad(), peak_memory() as memory:
        x.exp().exp().sum()
    assert (memory.peak, memory.current) == (2 * BYTES, 0)


def test_checkpointing_saves_what_it_should() -> None:
    def deep(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = x.exp().log()
        return x

    x = torch.ones(N, requires_grad=True)
    with peak_memory() as plain:
        deep(x)
    with peak_memory() as saved:
        y = deep(x)
        assert saved.current > 10 * BYTES
    with peak_memory() as checkpointed:
        z = checkpoint(deep, x, use_reentrant=False, preserve_rng_state=False)
        assert checkpointed.current < 2 * BYTES
    assert plain.peak == saved.peak > checkpointed.peak
    assert torch.equal(y, z)


def test_nested_blocks_each_count_their_own() -> None:
    with peak_memory() as outer:
        a = torch.zeros(N)
        with peak_memory() as inner:
            b = a + 1
            c = b.view(-1)
        del b, c
    assert (inner.peak, inner.current) == (BYTES, 0)
    assert (outer.peak, outer.current) == (2 * BYTES, BYTES)


def test_an_exception_passes_and_ends_the_count() -> None:
    with pytest.raises(RuntimeError, match="stop"), peak_memory() as memory:
        a = torch.zeros(N)
        raise RuntimeError("stop")
    b = torch.zeros(N)
    assert (memory.peak, memory.current) == (BYTES, BYTES) == (a.nbytes, b.nbytes)


def test_equal_at_each_run() -> None:
    layer = torch.nn.Linear(20, 30)

    def step() -> int:
        layer.zero_grad()
        with peak_memory() as memory:
            layer(torch.ones(7, 20)).relu().sum().backward()
        return memory.peak

    assert step() == step() > 8 * (20 * 30 + 30)


def test_sparse_layouts_are_refused() -> None:
    dense = torch.eye(3)
    with pytest.raises(NotImplementedError, match=r"expected strided tensors, got one of layout torch\.sparse_coo"):
        with peak_memory():
            dense.to_sparse()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: autograd runs in a thread of its own there")
def test_the_backward_pass_on_a_gpu_counts_as_on_the_cpu() -> None:
    def step(device: str) -> tuple[int, int]:
        x = torch.ones(N, requires_grad=True, device=device)
        with peak_memory() as memory:
            x.exp().exp().sum().backward()
        return memory.peak, memory.current

    assert step("cuda") == step("cpu")
