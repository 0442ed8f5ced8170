"""Every CUDA kernel on a card, at few sizes: what compute-sanitizer watches.

By hand: make sanitize-gpu

Equivalence in full, a thousand repeats, side streams, a second device and graph capture are `bench/gpu.py`'s; here a
run is short enough for a tool that makes kernels a hundred times slower, and memory is full once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastapd import backends, ops, testing
from fastapd.ops._unit_norm import unit_norm

QUICK = (
    testing.Case("few", 2, 5, 3, 2, 5, 6, n_outputs=3, k=1.5, tied=True),
    testing.Case("over", 1, 18, 17, 9, 33, 20, n_outputs=17, k=1.0),
    testing.Case("tiles", 2, 3, 2, 2, 131, 67, n_outputs=2, k=1.0),
)
CUDA = [op for op in testing.OPS if "cuda" in backends.TABLE[op]]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


def on_card(tree: Any) -> Any:
    return testing.map_tensors(lambda t: t.cuda(), tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
@pytest.mark.parametrize("op", CUDA)
def test_kernels_match_the_reference(op, case, dtype):
    args = testing.inputs(op, case, dtype)
    cotangents = None
    if testing._OPS[op].differentiable:
        cotangents = testing.random_cotangents(testing.reference(op, args).outputs)
    with backends.use_backend("cuda", "reference"):
        there = None if cotangents is None else [t.cuda() for t in cotangents]
        outputs, grads = testing.run(op, on_card(args), there)
    outputs, grads = [t.cpu() for t in outputs], [t.cpu() for t in grads]
    testing.assert_matches_reference(op, outputs, args, "cuda", grads=grads if there else None, cotangents=cotangents)


def test_out_of_memory_is_said_by_torch_and_harms_nothing():
    """A residual of 2^38 numbers, from factors and a target that are one number in memory."""
    one, d = torch.ones(1, device="cuda"), 1 << 19
    A, B, target = one.expand(1, d, 1), one.expand(1, 1, d), one.expand(d, d)
    rows = torch.rand(4, 8, device="cuda")
    wanted = torch.nn.functional.normalize(rows, dim=-1)
    with backends.use_backend("cuda", "reference"):
        with pytest.raises(torch.OutOfMemoryError):
            ops.component_sum_loss(A, B, target)
        unit_norm(rows)
    torch.testing.assert_close(rows, wanted)
