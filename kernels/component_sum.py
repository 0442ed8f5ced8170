"""W = sum over components of A_c B_c on a GPU: one GEMM over the concatenated ranks, W = At^T B.

Program (tile of d_in, tile of d_out, instance) owns one [BLOCK_IN, BLOCK_OUT] tile of W and walks the K = C * rank rows
of At [K, d_in] and B [K, d_out] in steps of BLOCK_RANK; it accumulates in float32 and writes once, so the result is
deterministic. Strides are explicit, so the transposed view A of At needs no copy. Past toy sizes a library GEMM is as
good: this kernel exists for its epilogues, and to prove the mapping of `kernels/` to `fastapd.kernels`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _component_sum_kernel(
    at_ptr,  # [I, K, d_in]
    b_ptr,  # [I, K, d_out]
    w_ptr,  # [I, d_in, d_out], contiguous
    n_rows,  # K = n_components * rank
    d_in,
    d_out,
    stride_at_i,
    stride_at_k,
    stride_at_in,
    stride_b_i,
    stride_b_k,
    stride_b_out,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    o_in = tl.program_id(0).to(tl.int64) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    o_out = tl.program_id(1).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    instance = tl.program_id(2).to(tl.int64)
    m_in, m_out = o_in < d_in, o_out < d_out
    acc = tl.zeros((BLOCK_IN, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, n_rows, BLOCK_RANK):
        o_k = start + tl.arange(0, BLOCK_RANK).to(tl.int64)
        m_k = o_k < n_rows
        p_at = at_ptr + instance * stride_at_i + o_k[None, :] * stride_at_k + o_in[:, None] * stride_at_in
        p_b = b_ptr + instance * stride_b_i + o_k[:, None] * stride_b_k + o_out[None, :] * stride_b_out
        b_at = tl.load(p_at, mask=m_in[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_out[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(b_at, b_b, acc, input_precision="ieee")
    p_w = w_ptr + (instance * d_in + o_in[:, None]) * d_out + o_out[None, :]
    tl.store(p_w, acc.to(w_ptr.dtype.element_ty), mask=m_in[:, None] & m_out[None, :])


def component_sum(A: Tensor, B: Tensor) -> Tensor:
    """Launches the kernel for A [I, C, d_in, m] and B [I, C, m, d_out]; returns W [I, d_in, d_out]."""
    n_instances, n_components, d_in, rank = A.shape
    d_out = B.shape[-1]
    n_rows = n_components * rank
    w = A.new_empty(n_instances, d_in, d_out)
    if n_rows == 0:
        return w.zero_()
    if w.numel() == 0:
        return w
    At = A.mT.reshape(n_instances, n_rows, d_in)  # a view in the house layout
    flat_B = B.reshape(n_instances, n_rows, d_out)
    block_in, block_out, block_rank = 32, 32, 32
    grid = (triton.cdiv(d_in, block_in), triton.cdiv(d_out, block_out), n_instances)
    with torch.cuda.device_of(A):
        _component_sum_kernel[grid](
            At,
            flat_B,
            w,
            n_rows,
            d_in,
            d_out,
            *At.stride(),
            *flat_B.stride(),
            BLOCK_IN=block_in,
            BLOCK_OUT=block_out,
            BLOCK_RANK=block_rank,
        )
    return w
