"""thin_product: alpha A B of many small matrices, into a buffer that it replaces or adds to."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from fastapd import testing
from fastapd.ops._thin_product import thin_product
from fastapd.reference import thin_product as reference

each = pytest.mark.parametrize("backend", testing.cpu_backends("thin_product"), indirect=True)
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_level = pytest.mark.parametrize("cpu_level", ["baseline", "avx2", "avx512"], indirect=True)
# the row of the backend table, which the public function leaves to the library where the result is wide
kernel = torch.ops.fastapd.thin_product


def drawn(I: int, m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and what is in the buffer."""
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((I, m, k), (I, k, n), (I, m, n)))


def assert_product(found: Tensor, A: Tensor, B: Tensor, out: Tensor, alpha: float, accumulate: bool, who: str) -> None:
    testing.assert_matches_reference("thin_product", found, (A, B, out, alpha, accumulate), who)


# m, n, k around the vectors (4 to 16 numbers), the tiles (up to 24 rows, 64 columns), the panels and the stretches of
# 512 terms; long sums have several values, as the reference may be lucky on a few
SIZES = [
    (1, 1, 1), (2, 1, 15), (1, 2, 16), (15, 16, 2), (17, 15, 63), (16, 17, 16), (5, 130, 17), (63, 33, 64),
    (64, 65, 130), (65, 63, 65), (25, 64, 1), (500, 2, 17), (481, 17, 15), (1100, 5, 16), (17, 65, 500), (30, 16, 513),
    (33, 130, 1100),
]  # fmt: skip


@floats
@pytest.mark.parametrize("m, n, k", SIZES)
@every_level
def test_thin_product_at_every_level(cpu_level, m, n, k, dtype):
    A, B, there = drawn(2, m, n, k, dtype)
    replaced, added = torch.full_like(there, torch.nan), there.clone()
    kernel(A, B, replaced, 1.0, False)
    assert_product(replaced, A, B, there, 1.0, False, f"cpu {cpu_level}")
    # the same product by other strides, and now added
    kernel(testing.VIEWS["transposed"](A), testing.VIEWS["transposed"](B), added, -0.3, True)
    assert_product(added, A, B, there, -0.3, True, f"cpu {cpu_level}")


@floats
@pytest.mark.parametrize("m, n, k", SIZES)
@each
def test_thin_product_matches_the_reference(backend, m, n, k, dtype):
    A, B, there = drawn(2, m, n, k, dtype)
    assert_product(thin_product(A, B), A, B, there, 1.0, False, backend)
    out = there.clone()
    assert thin_product(A, B, out, 1.7, True) is out
    assert_product(out, A, B, there, 1.7, True, backend)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("alpha", [1.0, -2.5, 0.0, 1e-3])
def test_thin_product_reference_is_that_of_numpy(alpha, accumulate):
    A, B, there = drawn(3, 7, 4, 9, torch.float64)
    out = there.clone()
    reference.thin_product(A, B, out, alpha, accumulate)
    wanted = alpha * np.einsum("imk,ikn->imn", A.numpy(), B.numpy()) + accumulate * there.numpy()
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [4, 30], ids=["narrow", "wide"])
@each
def test_thin_product_replaces_whatever_is_there(backend, n):
    A, B, there = drawn(2, 21, n, 9)
    for value in (torch.nan, torch.inf, 3.0):
        out = torch.full_like(there, value)
        thin_product(A, B, out, 0.5)
        assert_product(out, A, B, there, 0.5, False, backend)
    out = there.clone()
    out[1, 2, 3] = torch.nan
    thin_product(A, B, out, 0.5, True)  # what is added to stays what it was
    assert out.isnan().nonzero().tolist() == [[1, 2, 3]]


LAYOUTS = {
    **testing.VIEWS,
    "one for all instances": lambda t: t[:1].expand_as(t),
    "one row for all": lambda t: t[:, :1].expand_as(t),
    "one column for all": lambda t: t[..., :1].expand_as(t),
    "instances within": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


@pytest.mark.parametrize("n", [17, 40], ids=["narrow", "wide"])
@each
def test_thin_product_takes_any_strides(backend, n):
    A, B, there = drawn(3, 33, n, 21)
    for of_A, of_B in itertools.product(LAYOUTS, LAYOUTS):
        found, dense = there.clone(), there.clone()
        a, b = LAYOUTS[of_A](A), LAYOUTS[of_B](B)
        kernel(a, b, found, 0.7, True)
        assert_product(found, a, b, there, 0.7, True, f"{backend}, {of_A}, {of_B}")
        assert_product(thin_product(a, b), a, b, there, 1.0, False, f"{backend}, {of_A}, {of_B}")
        if backend == "cpu":
            kernel(a.clone(memory_format=torch.contiguous_format), b.contiguous(), dense, 0.7, True)
            testing.assert_bit_equal(found, dense)


@each
def test_thin_product_writes_nothing_beside_its_buffer(backend):
    for m, n, k in ((1, 1, 1), (5, 3, 4), (7, 17, 20), (25, 33, 40), (3, 65, 70)):
        A, B, there = drawn(2, m, n, k)
        memory = torch.full((there.numel() + 64,), 7.0)
        out = memory[32:-32].view_as(there)
        thin_product(A, B, out, 1.0)
        assert_product(out, A, B, there, 1.0, False, backend)
        assert (memory[:32] == 7).all() and (memory[-32:] == 7).all()


@each
def test_thin_product_keeps_a_nan_in_its_row_and_column(backend):
    A, B, _ = drawn(2, 30, 20, 25)
    in_A, in_B = A.clone(), B.clone()
    in_A[1, 7, 3] = in_B[0, 4, 19] = torch.nan
    where = torch.zeros(2, 30, 20, dtype=torch.bool)
    where[1, 7], where[0, :, 19] = True, True
    found = thin_product(in_A, in_B)
    assert torch.equal(found.isnan(), where)
    if backend == "cpu":
        testing.assert_bit_equal(found[~where], thin_product(A, B)[~where])


@floats
@each
def test_thin_product_without_terms_is_zero_and_adds_nothing(backend, dtype):
    A, B, there = drawn(2, 30, 5, 0, dtype)
    for run in (kernel, thin_product):
        out = torch.full_like(there, torch.nan)
        run(A, B, out, 2.0, False)
        testing.assert_bit_equal(out, torch.zeros_like(there))
        out = there.clone()
        run(A, B, out, 2.0, True)
        testing.assert_bit_equal(out, there)


@each
def test_thin_product_of_nothing(backend):
    for sizes in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 0, 0, 0), (0, 0, 0, 0), (2, 0, 5, 4)):
        A, B, there = drawn(*sizes)
        assert thin_product(A, B).shape == there.shape
        for accumulate in (False, True):
            kernel(A, B, there, 1.0, accumulate)


@floats
@pytest.mark.parametrize("I, m, n, k", [(2, 1000, 37, 515), (1, 700, 130, 33), (5, 60, 16, 100)])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_thin_product_is_independent_of_threads(backend, I, m, n, k, dtype, threads):
    A, B, there = drawn(I, m, n, k, dtype)
    found = []
    for count in (1, 2, 3):
        threads(count)
        out = there.clone()
        kernel(A, B, out, 0.7, True)
        found.append(out)
    for out in found[1:]:
        testing.assert_bit_equal(out, found[0])


@each
def test_thin_product_repeats_bit_for_bit_whatever_the_instances_around(backend):
    A, B, _ = drawn(4, 50, 9, 40)
    first = thin_product(A, B)
    testing.assert_bit_equal(thin_product(A, B), first)
    if backend == "cpu":
        testing.assert_bit_equal(torch.cat([thin_product(A[i : i + 1], B[i : i + 1]) for i in range(4)]), first)


@pytest.mark.parametrize("n", [4, 30], ids=["narrow", "wide"])
@each
def test_thin_product_changes_its_buffer_alone_and_says_so(backend, n):
    A, B, out = drawn(2, 21, n, 9)
    before = A.clone(), B.clone()
    leaves = [t.requires_grad_() for t in (A, B)]
    versions = [t._version for t in (A, B, out)]
    assert not thin_product(A, B, out).requires_grad
    testing.assert_bit_equal([t.detach() for t in leaves], list(before))
    assert [t._version for t in (A, B)] == versions[:2]
    assert out._version > versions[2]
    assert not thin_product(A, B).requires_grad


@pytest.mark.parametrize("n", [4, 30], ids=["narrow", "wide"])
def test_thin_product_that_overwrites_a_saved_tensor_is_noticed(n):
    A, B, out = drawn(2, 21, n, 9)
    factor = torch.ones_like(out, requires_grad=True)
    total = (factor * out).sum()
    thin_product(A, B, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_thin_product_refuses_gradients_of_its_row():
    A, B, out = drawn(1, 3, 2, 4)
    with pytest.raises(NotImplementedError, match=r"^thin_product: is not differentiable; detach its inputs$"):
        kernel(A.requires_grad_(), B, out, 1.0, False)


@pytest.mark.parametrize("n", [4, 30], ids=["narrow", "wide"])
def test_thin_product_under_autocast_keeps_its_dtype(n):
    A, B, _ = drawn(2, 21, n, 9)
    wanted = thin_product(A, B)
    with torch.autocast("cpu", torch.bfloat16):
        testing.assert_bit_equal(thin_product(A, B), wanted)


@each
def test_thin_product_passes_opcheck(backend):
    A, B, there = drawn(2, 5, 4, 9)
    torch.library.opcheck(kernel, (A, B, there, 0.7, True))


@pytest.mark.parametrize("n", [4, 30], ids=["narrow", "wide"])
def test_thin_product_compiles_to_one_graph(n):
    A, B, there = drawn(2, 21, n, 9)
    wanted, found = there.clone(), there.clone()
    thin_product(A, B, wanted, 0.7, True)
    torch.compile(thin_product, fullgraph=True, backend="aot_eager")(A, B, found, 0.7, True)
    testing.assert_bit_equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_thin_product_takes_half_precision(dtype):
    A, B, there = drawn(2, 21, 4, 9, dtype)
    found = thin_product(A, B)
    assert found.dtype == dtype
    assert_product(found, A, B, there, 1.0, False, "auto")


A, B, OUT = torch.zeros(2, 3, 4), torch.zeros(2, 4, 2), torch.zeros(2, 3, 2)
FITS = "A [I, m, k], B [I, k, n] and a contiguous out [I, m, n] must fit, got "


@pytest.mark.parametrize("wrong, A, B, out, message", [
    (ValueError, A[0], B, OUT, f"{FITS}[3, 4], [2, 4, 2] and [2, 3, 2] with strides [6, 2, 1]"),
    (ValueError, A, B[0], OUT, f"{FITS}[2, 3, 4], [4, 2] and [2, 3, 2] with strides [6, 2, 1]"),
    (ValueError, A, B[:1], OUT, f"{FITS}[2, 3, 4], [1, 4, 2] and [2, 3, 2] with strides [6, 2, 1]"),
    (ValueError, A, B[:, :3], OUT, f"{FITS}[2, 3, 4], [2, 3, 2] and [2, 3, 2] with strides [6, 2, 1]"),
    (ValueError, A, B, OUT[:1], f"{FITS}[2, 3, 4], [2, 4, 2] and [1, 3, 2] with strides [6, 2, 1]"),
    (ValueError, A, B, OUT[:, :2], f"{FITS}[2, 3, 4], [2, 4, 2] and [2, 2, 2] with strides [6, 2, 1]"),
    (ValueError, A, B, OUT[..., :1], f"{FITS}[2, 3, 4], [2, 4, 2] and [2, 3, 1] with strides [6, 2, 1]"),
    (ValueError, A, B, OUT.mT.contiguous().mT, f"{FITS}[2, 3, 4], [2, 4, 2] and [2, 3, 2] with strides [6, 1, 3]"),
    (ValueError, A, B, OUT[:1].expand(2, 3, 2),
     f"{FITS}[2, 3, 4], [2, 4, 2] and [2, 3, 2] with strides [0, 2, 1]"),
    (TypeError, A.int(), B, OUT, "A must be float32, float64, float16 or bfloat16, got torch.int32"),
    (TypeError, A, B.bool(), OUT, "B must be float32, float64, float16 or bfloat16, got torch.bool"),
    (TypeError, A, B.double(), OUT, "B must have the dtype of A, torch.float32, got torch.float64"),
    (TypeError, A, B, OUT.half(), "out must have the dtype of A, torch.float32, got torch.float16"),
    (ValueError, A, B.to("meta"), OUT, "B must be on the device of A, cpu, got meta"),
    (ValueError, A, B, OUT.to("meta"), "out must be on the device of A, cpu, got meta"),
    (TypeError, A, B.to_sparse(), OUT, "B must be a dense tensor, got layout torch.sparse_coo; call .to_dense()"),
])  # fmt: skip
def test_thin_product_refuses(wrong, A, B, out, message):
    with pytest.raises(wrong, match="^" + re.escape(f"thin_product: {message}") + "$"):
        thin_product(A, B, out)
    assert not OUT.any()


@pytest.mark.parametrize("wrong, A, B, message", [
    (ValueError, A[0], B, FITS), (ValueError, A, B[0], FITS), (ValueError, A, B[:1], FITS),
    (ValueError, A, torch.zeros(()), FITS), (ValueError, A, B[:, :3], FITS),
    (TypeError, A.tolist(), B, "A must be a torch.Tensor, got list"),
    (TypeError, A, B.numpy(), "B must be a torch.Tensor, got ndarray"),
    (TypeError, A, B.double(), "B must have the dtype of A, torch.float32, got torch.float64"),
])  # fmt: skip
def test_thin_product_that_makes_its_result_refuses_as_well(wrong, A, B, message):
    shapes = f"{list(A.shape)}, {list(B.shape)} and None" if message == FITS else ""
    with pytest.raises(wrong, match="^" + re.escape(f"thin_product: {message}{shapes}") + "$"):
        thin_product(A, B)
