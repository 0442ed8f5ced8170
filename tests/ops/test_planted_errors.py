"""For every op and backend of `backends.TABLE` that runs on the CPU: an error in that function turns its test red.

Each `wrong(right, *args)` is a mistake one could make in a kernel. A new row of the table needs one here.
"""

from __future__ import annotations

import pytest
import torch

from fastapd import backends, ops, testing

ROWS = [(op, backend) for op in backends.TABLE for backend in testing.cpu_backends(op) if backend != "triton"]


def without_the_last_component(right, A, B, *target):
    return right(A[:, :-1], B[:, :-1], *target)


def residual_of_the_wrong_sign(right, A, B, target):
    loss, residual = right(A, B, target)
    return loss, -residual


def loss_of_the_mean(right, A, B, target):
    loss, residual = right(A, B, target)
    return loss / residual[0].numel(), residual


def without_the_mask(right, x, A, B, mask):
    return right(x, A, B, mask.ceil())


def without_one_component(right, x, A, B, *selection):
    B = B.clone()
    B[:, -1] = 0
    return right(x, A, B, *selection)


def never_written(right, x, A, B, *selection):
    y, u = right(x, A, B, *selection)
    fresh = torch.empty_like(y)
    fresh[:, :-1] = y[:, :-1]
    return fresh, u


def without_one_gradient(right, *args):
    grad_x, grad_At, grad_B = right(*args)
    grad_B[:, -1] = 0
    return grad_x, grad_At, grad_B


def gradient_of_the_wrong_sample(right, *args):
    grad_x, grad_At, grad_B = right(*args)
    return grad_x.roll(1, 1), grad_At, grad_B


def buffers_overwritten(right, *args):
    for buffer in args[-2:]:
        buffer.zero_()
    return right(*args)


def added_twice(right, *args):
    right(*args)
    return right(*args)


def added_but_for_the_last_component(right, *args):
    before = [buffer[:, -1].clone() for buffer in args[-2:]]
    grad_x = right(*args)
    for buffer, last in zip(args[-2:], before, strict=True):
        buffer[:, -1] = last
    return grad_x


def squared_before_the_sum(right, xs, gs, As, Bs):
    layers = zip(xs, gs, As, Bs, strict=True)
    return sum(right([x], [g], [A], [B]) for x, g, A, B in layers)


def gradient_of_layers_apart(right, grad, xs, gs, As, Bs):
    layers = zip(xs, gs, As, Bs, strict=True)
    apart = [right(grad, [x], [g], [A], [B]) for x, g, A, B in layers]
    return [a for a, _ in apart] + [b for _, b in apart]


def gradient_without_the_last_sample(right, grad, *args):
    grad = grad.clone()
    grad[:, -1] = 0
    return right(grad, *args)


def gradients_of_shared_outputs_from_the_first_sample_only(right, grad, xs, gs, As, Bs):
    return right(grad, xs, [g[:, :1] for g in gs], As, Bs)


def without_links(right, xs, As, Fs, gates, links, *wiring):
    return right(xs, As, Fs, gates, [torch.zeros_like(L) for L in links], *wiring)


def without_gates(right, xs, As, Fs, gates, *rest):
    return right(xs, As, Fs, [torch.ones_like(g) for g in gates], *rest)


def squared_term_by_term(right, xs, As, Fs, gates, links, lefts, terms, *wiring):
    pairs = zip(terms[::2], terms[1::2], strict=True)
    return sum(right(xs, As, [F], gates, links, lefts, list(p), *wiring) for F, p in zip(Fs, pairs, strict=True))


def gradient_through_open_gates(right, grad, xs, As, Fs, gates, *rest):
    return right(grad, xs, As, Fs, [torch.ones_like(g) for g in gates], *rest)


def gradient_without_links(right, grad, *args):
    return without_links(lambda *args: right(grad, *args), *args)


def gradient_of_the_factors_swapped(right, grad, *args):
    *grads, around, second = right(grad, *args)
    return [*grads, second, around]


def ties_to_the_highest_index(right, scores, *limits):
    mask = ops.Selection(*right(scores.flip(1, 2), *limits)).mask.flip(1, 2)
    return right(mask.to(scores.dtype), *limits)


def position_of_the_other_order(right, scores, *limits):
    sample, offsets, component, sample_offsets, position = right(scores, *limits)
    return sample, offsets, component, sample_offsets, position.flip(-1)


def everything_above_the_hint(right, scores, hint, n_pairs):
    """A selection that believes its hint: what lies below is not looked at."""
    below = scores < hint[:, None, None]
    return right(scores.masked_fill(below, scores.min()), hint, n_pairs)


def threshold_that_is_the_hint(right, scores, hint, n_pairs):
    return *right(scores, hint, n_pairs)[:5], hint.clone()


def padding_that_is_a_pair(right, scores, counts, capacity):
    sample, *rest = right(scores, counts, capacity)
    for i, n in enumerate(counts.tolist()):
        sample[i, n:] = 1
    return sample, *rest


def ascending(right, A, B):
    return right(A, B).flip(-1)


def values_of_the_gram_matrix_in_half_the_digits(right, A, B):
    return right(A, B).square().float().sqrt().to(A.dtype) if A.dtype == torch.float64 else right(A, B).half().float()


def without_rotation(right, A, B):
    """The values of the column form: a Jacobi that never rotates."""
    return (A.square().sum(-2) * B.square().sum(-1)).sqrt().sort(-1, descending=True).values


def epsilon_outside_the_power(right, A, B, weights, p, eps, *rest):
    total, *grads = right(A, B, weights, p, 0.0, *rest)
    return total + eps ** (p / 2), *grads


def counts_forgotten_in_the_gradient(right, A, B, counts, *rest):
    total, *_ = right(A, B, counts, *rest)
    _, *grads = right(A, B, torch.ones_like(counts), *rest)
    return total, *grads


def gradient_of_A_in_the_layout_of_A(right, A, *rest):
    total, grad_At, *grads = right(A, *rest)
    return total, grad_At.mT.reshape(grad_At.shape), *grads


def gradient_replaced(right, *args):
    for t in args[-2:]:
        t.zero_()
    return right(*args)


def gradient_with_the_scale_forgotten(right, *args):
    return right(*args[:7], 1.0, *args[8:])


def value_with_the_scale(right, *args):
    return args[7] * right(*args)


def gradient_added_twice(right, *args):
    right(*args)
    return right(*args)


def gradient_of_the_mask_without_the_last_rank(right, A, B, *rest):
    total, grad_At, grad_B, _ = right(A, B, *rest)
    return total, grad_At, grad_B, right(A[..., :-1].contiguous(), B[..., :-1, :].contiguous(), *rest)[3]


def product_with_the_factor_forgotten(right, A, B, out, alpha, accumulate):
    right(A, B, out, 1.0, accumulate)


def product_replaced(right, A, B, out, alpha, accumulate):
    right(A, B, out, alpha, False)


def product_without_the_last_term(right, A, B, *rest):
    right(A[..., :-1], B[:, :-1], *rest)


def product_of_the_first_instance(right, A, B, *rest):
    right(A, B[:1].expand_as(B), *rest)


def divided_by_the_square(right, rows):
    square = rows.square().sum(-1, keepdim=True)
    rows.div_(torch.where(square > 0, square, 1))


def zero_rows_divided(right, rows):
    rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))


def columns_for_rows(right, rows):
    columns = rows.mT.contiguous()
    right(columns)
    rows.copy_(columns.mT)


def added_along(right, grad, rows):
    before = grad.clone()
    right(grad, rows)
    grad.copy_(2 * before - grad)


def last_row_left(right, grad, rows):
    before = grad[:, -1, -1].clone()
    right(grad, rows)
    grad[:, -1, -1] = before


def along_the_row_before(right, grad, rows):
    right(grad, rows.roll(1, -2))


SUMS = [epsilon_outside_the_power, gradient_of_A_in_the_layout_of_A]
# what goes wrong in each op of the table; a gradient's op is reached by that of its forward op
PLANTED = {
    "component_sum": [without_the_last_component],
    "component_sum_loss": [without_the_last_component, residual_of_the_wrong_sign, loss_of_the_mean],
    "component_forward": [without_the_mask],
    "component_forward_selected": [without_one_component, never_written],
    "component_forward_selected_backward": [without_one_gradient, gradient_of_the_wrong_sample],
    "component_forward_selected_accumulate": [buffers_overwritten, added_twice, added_but_for_the_last_component],
    "attribution_reduce": [squared_before_the_sum],
    "attribution_reduce_backward": [
        gradient_of_layers_apart,
        gradient_without_the_last_sample,
        gradients_of_shared_outputs_from_the_first_sample_only,
    ],
    "attribution_tangent": [without_links, without_gates, squared_term_by_term],
    "attribution_tangent_backward": [
        gradient_without_the_last_sample,
        gradient_through_open_gates,
        gradient_without_links,
        gradient_of_the_factors_swapped,
    ],
    "batch_topk": [ties_to_the_highest_index, position_of_the_other_order],
    "batch_topk_warm": [everything_above_the_hint, threshold_that_is_the_hint],
    "batch_topk_counts": [ties_to_the_highest_index, position_of_the_other_order, padding_that_is_a_pair],
    "sample_topk": [ties_to_the_highest_index, position_of_the_other_order],
    "component_svdvals": [ascending, values_of_the_gram_matrix_in_half_the_digits, without_rotation],
    "schatten": [*SUMS, counts_forgotten_in_the_gradient],
    "schatten_factored": [*SUMS, counts_forgotten_in_the_gradient],
    "schatten_accumulate": [
        gradient_replaced,
        gradient_with_the_scale_forgotten,
        value_with_the_scale,
        gradient_added_twice,
    ],
    "schatten_factored_masked": [*SUMS, gradient_of_the_mask_without_the_last_rank],
    "thin_product": [
        product_with_the_factor_forgotten,
        product_replaced,
        product_without_the_last_term,
        product_of_the_first_instance,
    ],
    "unit_norm": [divided_by_the_square, zero_rows_divided, columns_for_rows],
    "remove_along": [added_along, last_row_left, along_the_row_before],
}


def arguments(op: str, dtype: torch.dtype) -> tuple:
    args = testing.inputs(op, "odd" if op.startswith("schatten") else "tms", dtype)
    if op.startswith("schatten"):
        A, B, weights, p, _, *batch = args
        return A, B, weights, p, 1e-2, *batch
    if op == "unit_norm":  # a row without length
        args[0][:, 1, 1] = 0
    if "topk" in op:  # ties
        return args[0].round(), *args[1:]
    return args


def test_planted_errors_exist_for_every_op():
    assert set(PLANTED) == set(backends.TABLE)
    assert all(PLANTED.values())
    assert {op for op, _ in ROWS} == set(backends.TABLE), "every op has a backend that runs here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "planted, backend, wrong",
    [(op, backend, wrong) for op, backend in ROWS for wrong in PLANTED.get(op, [])],
    indirect=["backend"],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_planted_error_is_found(planted, backend, wrong, dtype, plant):
    op = planted.removesuffix("_backward")
    args = arguments(op, dtype)
    cotangents = testing.random_cotangents(testing.run(op, args).outputs)

    def check() -> None:
        if "topk" in op:
            testing.assert_matches_reference(op, testing.run(op, args).outputs, args, backend)
        else:
            outputs, grads = testing.run(op, args, cotangents)
            testing.assert_matches_reference(op, outputs, args, backend, grads=grads, cotangents=cotangents)

    check()  # green before
    plant(planted, backend, wrong)
    with pytest.raises(AssertionError, match=f"^{op} on {backend}, (outputs|grads)"):
        check()
