"""The public hot operations, one file each; the same stem names an op's reference, kernels, tests and benchmark."""

from fastapd.ops._attribution_reduce import attribution_reduce as attribution_reduce
from fastapd.ops._attribution_tangent import TangentBarrier as TangentBarrier
from fastapd.ops._attribution_tangent import TangentSource as TangentSource
from fastapd.ops._attribution_tangent import attribution_tangent as attribution_tangent
from fastapd.ops._batch_topk import Selection as Selection
from fastapd.ops._batch_topk import batch_topk as batch_topk
from fastapd.ops._batch_topk import sample_topk as sample_topk
from fastapd.ops._batched_svd import component_svdvals as component_svdvals
from fastapd.ops._batched_svd import schatten as schatten
from fastapd.ops._batched_svd import schatten_factored as schatten_factored
from fastapd.ops._component_forward import component_forward as component_forward
from fastapd.ops._component_forward import component_forward_selected as component_forward_selected
from fastapd.ops._component_sum import component_sum as component_sum
from fastapd.ops._component_sum import component_sum_loss as component_sum_loss

__all__ = [
    "Selection",
    "TangentBarrier",
    "TangentSource",
    "attribution_reduce",
    "attribution_tangent",
    "batch_topk",
    "component_forward",
    "component_forward_selected",
    "component_sum",
    "component_sum_loss",
    "component_svdvals",
    "sample_topk",
    "schatten",
    "schatten_factored",
]
