"""unit_norm and remove_along: rows of unit length, and gradients without their part along them; both in place."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastapd import testing
from fastapd.ops._unit_norm import remove_along, unit_norm
from fastapd.reference import unit_norm as reference

both = pytest.mark.parametrize("op, backend", testing.pairs("unit_norm", "remove_along"), indirect=["backend"])
each = pytest.mark.parametrize("backend", testing.cpu_backends("unit_norm"), indirect=True)
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_level = pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@floats
@every_level
def test_unit_norm_at_every_level(cpu_level, dtype):
    for d in range(1, 68):
        rows, grad = drawn(3, 5, d, dtype=dtype), drawn(3, 5, d, dtype=dtype)
        rows[1, 2] = 0
        found = unit_norm(rows.clone())
        testing.assert_matches_reference("unit_norm", found, (rows,), f"cpu {cpu_level}, {d}")
        assert not found[1, 2].any()
        left = remove_along(grad.clone(), found)
        testing.assert_matches_reference("remove_along", left, (grad, found), f"cpu {cpu_level}, {d}")


@floats
@each
def test_unit_norm_gives_unit_rows_and_gradients_across_them(backend, dtype):
    eps = torch.finfo(dtype).eps
    for shape in ((1,), (7,), (3, 2), (2, 5, 3, 67), (4, 1000)):
        rows, grad = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype)
        unit_norm(rows)
        assert (rows.double().norm(dim=-1) - 1).abs().max() < 8 * eps
        before, along = grad.clone(), (grad.double() * rows.double()).sum(-1, keepdim=True)
        remove_along(grad, rows)
        assert (grad.double() * rows.double()).sum(-1).abs().max() <= 64 * eps * before.double().norm(dim=-1).max()
        assert (grad - (before - along * rows.double())).abs().max() <= 64 * eps * before.abs().max()


def test_unit_norm_reference_is_that_of_numpy():
    rows, grad = drawn(3, 4, 9, dtype=torch.float64), drawn(3, 4, 9, dtype=torch.float64)
    wanted = rows.numpy() / np.sqrt(np.square(rows.numpy()).sum(-1, keepdims=True))
    reference.unit_norm(rows)
    np.testing.assert_allclose(rows.numpy(), wanted, rtol=1e-14, atol=0)
    wanted = grad.numpy() - np.einsum("ird,ird,ire->ire", grad.numpy(), rows.numpy(), rows.numpy())
    reference.remove_along(grad, rows)
    np.testing.assert_allclose(grad.numpy(), wanted, rtol=1e-12, atol=1e-14)


@each
def test_unit_norm_of_values_worked_by_hand(backend):
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0], [-0.0, 5e-39]])
    grad = torch.tensor([[5.0, 10.0], [1.0, 7.0], [2.0, 3.0], [4.0, 5.0]])
    unit_norm(rows)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]), rtol=1e-7, atol=0)
    remove_along(grad, rows)
    wanted = torch.tensor([[-1.6, 1.2], [1.0, 0.0], [2.0, 3.0], [4.0, 0.0]])
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-6)


# the smallest and the largest numbers of each dtype, and where a square begins to leave it
SCALES = {
    torch.float32: (2.0**-149, 1e-43, 1e-38, 1e-30, 3e-20, 1e-15, 1e15, 1e18, 1e30, 1e38, 3.4e38),
    torch.float64: (2.0**-1074, 1e-320, 1e-308, 1e-300, 1e-155, 1e-100, 1e100, 1e153, 1e300, 1.7e308),
}


@floats
@every_level
@pytest.mark.parametrize("reference_too", [False, True])
def test_unit_norm_at_any_scale(cpu_level, dtype, reference_too):
    """Also where the length itself is beyond the dtype."""
    for d in (1, 2, 3, 5, 16, 17, 33, 67):
        signs = torch.where(drawn(d, dtype=dtype) > 0, 1.0, -1.0).to(dtype)
        rows = torch.stack([signs * scale for scale in SCALES[dtype]])
        assert rows.all() and rows.isfinite().all()
        wanted = (signs.double() / d**0.5).expand(rows.shape)
        (reference.unit_norm if reference_too else unit_norm)(rows)
        torch.testing.assert_close(rows.double(), wanted, rtol=16 * torch.finfo(dtype).eps, atol=0)


@floats
@each
def test_unit_norm_of_rows_of_many_magnitudes(backend, dtype):
    """What is large decides the length; what is small is divided by it all the same."""
    large, small = SCALES[dtype][-3:-1][0], SCALES[dtype][3]
    rows = torch.zeros(2, 19, dtype=dtype)
    rows[0, 3], rows[0, 17], rows[0, 5] = 3 * large, 4 * large, 1.0
    rows[1, 0], rows[1, 18] = 6 * small, 8 * small
    unit_norm(rows)
    wanted = torch.zeros(2, 19, dtype=torch.float64)
    wanted[0, 3], wanted[0, 17], wanted[0, 5] = 0.6, 0.8, 1 / (5 * large)
    wanted[1, 0], wanted[1, 18] = 0.6, 0.8
    torch.testing.assert_close(rows.double(), wanted, rtol=8 * torch.finfo(dtype).eps, atol=0)


@floats
@each
def test_unit_norm_of_special_rows_is_that_of_the_reference(backend, dtype):
    nan, inf = torch.nan, torch.inf
    for d in (1, 2, 3, 8, 17, 40):
        for first, last in ((nan, 1), (1, nan), (nan, inf), (inf, 1), (1, -inf), (inf, -inf), (nan, 0), (0, inf)):
            rows = drawn(4, d, dtype=dtype)
            rows[1, 0], rows[1, -1] = first, last
            clean, own = rows.clone(), rows.clone()
            clean[1] = 1
            found = unit_norm(rows.clone())
            reference.unit_norm(own)
            testing.assert_bit_equal(found[1].isnan(), own[1].isnan())
            torch.testing.assert_close(found[1], own[1], rtol=0, atol=0, equal_nan=True)
            others = torch.tensor([0, 2, 3])
            testing.assert_bit_equal(found[others], unit_norm(clean)[others])
    rows = torch.tensor([[nan, 2.0], [inf, 2.0], [-inf, inf]], dtype=dtype)
    wanted = torch.tensor([[nan, 2.0], [nan, 0.0], [nan, nan]], dtype=dtype)  # a row with a NaN stays
    torch.testing.assert_close(unit_norm(rows), wanted, rtol=0, atol=0, equal_nan=True)


@each
def test_remove_along_keeps_a_nan_in_its_row(backend):
    for d in (1, 2, 17, 40):
        for wrong in range(2):
            args = [drawn(4, d), drawn(4, d)]
            clean = remove_along(args[0].clone(), args[1])
            args[wrong][2, -1] = torch.nan
            found = remove_along(*args)
            assert found[2].isnan().all()
            others = torch.tensor([0, 1, 3])
            testing.assert_bit_equal(found[others], clean[others])


@both
def test_unit_norm_writes_nothing_beside_its_rows(op, backend):
    for shape in ((1, 1), (3, 5), (5, 17), (7, 33), (2, 67)):
        memory = torch.full((shape[0] * shape[1] + 64,), 7.0)
        written = memory[32:-32].view(shape)
        args = (written.copy_(drawn(*shape)), *([drawn(*shape)] if op == "remove_along" else []))
        before = [t.clone() for t in args]
        found = (remove_along if op == "remove_along" else unit_norm)(*args)
        assert found.data_ptr() == written.data_ptr()
        testing.assert_matches_reference(op, found, tuple(before), backend)
        testing.assert_bit_equal(args[1:], before[1:])
        assert (memory[:32] == 7).all() and (memory[-32:] == 7).all()


@floats
@pytest.mark.parametrize("op", ["unit_norm", "remove_along"])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_unit_norm_is_independent_of_threads(backend, op, dtype, threads):
    rows, grad = drawn(3001, 131, dtype=dtype), drawn(3001, 131, dtype=dtype)
    rows[::7] *= 1e30
    args = (grad, rows) if op == "remove_along" else (rows,)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(testing.run(op, args).outputs)
    for outputs in found[1:]:
        testing.assert_bit_equal(outputs, found[0])


@both
def test_unit_norm_of_nothing(op, backend):
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 0)):
        rows = torch.zeros(shape)
        assert (unit_norm(rows) if op == "unit_norm" else remove_along(rows, rows.clone())).shape == shape


@each
def test_remove_along_of_the_rows_themselves_leaves_nothing(backend):
    rows = unit_norm(drawn(5, 37))
    remove_along(rows, rows)
    assert rows.abs().max() < 1e-6


@each
def test_unit_norm_changes_parameters_outside_autograd_and_says_so(backend):
    At = nn.Parameter(drawn(2, 3, 4))
    grad, version = drawn(2, 3, 4), At._version
    assert unit_norm(At) is At
    assert At.is_leaf and At.requires_grad and At.grad is None and At._version > version
    versions = At._version, grad._version
    assert remove_along(grad, At) is grad
    assert not grad.requires_grad and At._version == versions[0] and grad._version > versions[1]
    loss = At.square().sum()
    unit_norm(At)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", ["unit_norm", "remove_along"])
def test_unit_norm_rows_of_the_table_refuse_gradients(op):
    args = [torch.ones(2, 3, requires_grad=True) for _ in range(1 if op == "unit_norm" else 2)]
    with pytest.raises(NotImplementedError, match=rf"^{op}: is not differentiable; detach its inputs$"):
        getattr(torch.ops.fastapd, op)(*args)


@both
def test_unit_norm_passes_opcheck_and_compiles_to_one_graph(op, backend):
    args = testing.inputs(op, "rank1")
    torch.library.opcheck(getattr(torch.ops.fastapd, op), testing.map_tensors(torch.clone, args))
    function = remove_along if op == "remove_along" else unit_norm
    wanted, compiled = testing.map_tensors(torch.clone, args), testing.map_tensors(torch.clone, args)
    function(*wanted)
    torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    testing.assert_bit_equal(compiled, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["unit_norm", "remove_along"])
def test_unit_norm_takes_half_precision(op, dtype):
    args = testing.inputs(op, "odd", dtype)
    outputs = testing.run(op, args).outputs
    assert outputs[0].dtype == dtype
    testing.assert_matches_reference(op, outputs, args, "auto")


ROWS = torch.ones(2, 3, 4)
DENSE = "must be contiguous, got strides"


@pytest.mark.parametrize("wrong, rows, message", [
    (ValueError, torch.ones(()), "rows must have one shape [.., d], got []"),
    (ValueError, ROWS.mT, f"rows {DENSE} [12, 1, 4]"),
    (ValueError, ROWS[..., :2], f"rows {DENSE} [12, 4, 1]"),
    (ValueError, ROWS[:1].expand(2, 3, 4), f"rows {DENSE} [0, 4, 1]"),
    (TypeError, ROWS.int(), "rows must be float32, float64, float16 or bfloat16, got torch.int32"),
    (TypeError, ROWS.tolist(), "rows must be a torch.Tensor, got list"),
    (TypeError, ROWS.numpy(), "rows must be a torch.Tensor, got ndarray"),
    (TypeError, ROWS.to_sparse(), "rows must be a dense tensor, got layout torch.sparse_coo; call .to_dense()"),
])  # fmt: skip
def test_unit_norm_refuses(wrong, rows, message):
    with pytest.raises(wrong, match="^" + re.escape(f"unit_norm: {message}") + "$"):
        unit_norm(rows)


@pytest.mark.parametrize("wrong, grad, rows, message", [
    (ValueError, ROWS[:1], ROWS, "grad and rows must have one shape [.., d], got [1, 3, 4] and [2, 3, 4]"),
    (ValueError, ROWS, ROWS[0], "grad and rows must have one shape [.., d], got [2, 3, 4] and [3, 4]"),
    (ValueError, torch.ones(()), torch.ones(()), "grad and rows must have one shape [.., d], got [] and []"),
    (ValueError, torch.ones(2, 4, 3).mT, ROWS, f"grad {DENSE} [12, 1, 3]"),
    (ValueError, ROWS, torch.ones(2, 4, 3).mT, f"rows {DENSE} [12, 1, 3]"),
    (TypeError, ROWS, ROWS.double(), "rows must have the dtype of grad, torch.float32, got torch.float64"),
    (TypeError, ROWS.bool(), ROWS, "grad must be float32, float64, float16 or bfloat16, got torch.bool"),
    (ValueError, ROWS, ROWS.to("meta"), "rows must be on the device of grad, cpu, got meta"),
    (TypeError, None, ROWS, "grad must be a torch.Tensor, got NoneType"),
])  # fmt: skip
def test_remove_along_refuses(wrong, grad, rows, message):
    with pytest.raises(wrong, match="^" + re.escape(f"remove_along: {message}") + "$"):
        remove_along(grad, rows)
    assert (ROWS == 1).all()
