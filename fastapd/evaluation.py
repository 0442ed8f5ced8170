"""One batch through the method: attributions, selection, and every term of the loss.

Nothing differentiates into the target. In top-k form nothing differentiates through attributions either, unless their
sparsity is a term of the loss, so they are taken without a graph; the forward pass of all components runs only when a
loss or the attribution asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastapd import losses
from fastapd._refined import refined
from fastapd.attributions import (
    ablation_attributions,
    activation_attributions,
    gradient_attributions,
    n_outputs,
)
from fastapd.model import ComponentModel, Inputs, Record
from fastapd.ops import Selection, batch_topk, sample_topk

if TYPE_CHECKING:
    from jaxtyping import Float

    from fastapd.config import APD

Activations = Mapping[str, Callable[[Tensor], Tensor]]
Distance = Callable[[Tensor, Tensor], Tensor]
"""(output, target's output) -> one value an instance, or a scalar."""


class Step(NamedTuple):
    """What one evaluation of the losses found; the steps of a CUDA graph overwrite that of the step before."""

    terms: dict[str, Float[Tensor, " I"]]
    """Each term before its coefficient, one value an instance."""
    coefficients: dict[str, float]
    """Of the terms that count; others are only reported."""
    attributions: Float[Tensor, "I b C"]
    selection: Selection | None
    """Of the ranked components; None in the Lp form, where all are on."""
    always_on: int
    """How many components, the last ones, are on for every sample and not ranked."""

    @property
    def total(self) -> Tensor:
        """The weighted sum of the terms, averaged over instances: what a step lowers. Computed when it is asked for."""
        weighted = [coefficient * self.terms[name] for name, coefficient in self.coefficients.items()]
        if not weighted:
            return self.attributions.new_zeros(())
        total, *rest = weighted
        for term in rest:
            total = total + term
        return total.mean()

    @property
    def mask(self) -> Tensor:
        """Which components are on, bool [n_instances, batch, C]."""
        if self.selection is None:
            return torch.ones_like(self.attributions, dtype=torch.bool)
        return torch.nn.functional.pad(self.selection.mask, (0, self.always_on), value=True)

    @property
    def counts(self) -> Tensor:
        """How many samples use each component, [n_instances, C]."""
        batch = self.attributions.shape[1]
        if self.selection is None:
            return torch.full_like(self.attributions[:, 0], batch, dtype=torch.int64)
        counts = self.selection.counts
        return torch.nn.functional.pad(counts, (0, self.always_on), value=batch) if self.always_on else counts


def select(
    attributions: Float[Tensor, "I b C"], method: APD, x: Tensor | None = None, hint: Tensor | None = None
) -> Selection:
    """The selection that the method makes among ranked components.

    Args:
        attributions: Of the components that are ranked.
        method: `selection` "batch" takes int(topk * batch) pairs of the batch, "sample" takes topk of each sample,
            "exact" as many pairs of the batch as inputs are not zero.
        x: The inputs [n_instances, batch, ..]; only "exact" looks at them.
        hint: As for `batch_topk`; only "batch" looks at it.
    """
    n_instances, batch, n_components = attributions.shape
    if method.selection == "sample":
        return sample_topk(attributions, int(method.topk or 0))
    if method.selection == "batch":
        return batch_topk(attributions, int((method.topk or 0) * batch), hint)
    if x is None:
        raise ValueError("select: x must be given for the exact selection, got None")
    active = (x != 0).reshape(n_instances, -1).sum(-1)  # [I]
    if method.reference_exact_count:  # float32 division and truncation lose one now and then
        active = ((active.float() / batch).double() * batch).long()
    return batch_topk(attributions, active.clamp(max=batch * n_components))


def _attributions(model: ComponentModel, method: APD, x: Inputs, target: Record | None, full: Record | None) -> Tensor:
    """By the method's measure; differentiable only where the loss holds them, in the Lp form or its sparsity term."""
    needed = method.topk is None or bool(method.lp_sparsity)
    with torch.set_grad_enabled(needed and torch.is_grad_enabled()):
        if method.attribution == "activation":
            assert full is not None
            return activation_attributions(model.components, full)
        if method.attribution == "ablation":
            assert full is not None
            return ablation_attributions(model, x, full.output)
        record = target
        if record is None:
            record = model.record_target(x, model.plan(x).form == "reverse", of_components=True)
        if method.attribution_refined is None:
            return gradient_attributions(model, record, method.attribution_norm, method.attribution_probes)
        found = gradient_attributions(model, record, False, method.attribution_probes)
        if model.estimated:
            found = refined(model, x, found.detach(), method.attribution_refined, method.attribution_model != "target")
        return (found / n_outputs(record)).sqrt() if method.attribution_norm else found


def evaluate(
    model: ComponentModel,
    method: APD,
    x: Inputs,
    activations: Activations | None = None,
    output_reconstruction: bool = False,
    distance: Distance | None = None,
    accumulate: bool = False,
) -> Step:
    """All losses of one batch, differentiable in the components.

    Args:
        model: The target and its components.
        method: Coefficients, selection and attribution; terms with a zero coefficient are not computed.
        x: One batch of the target's inputs, or of its arguments by name.
        activations: For the activation term, what to apply to each compared site's output; None compares all as they
            are.
        output_reconstruction: Also report the error with all components on, whatever its coefficient.
        distance: (output, target's output) -> one value an instance, or a scalar; None for the method's.
        accumulate: Whether the gradients of the total are to be left in the components: those of terms of the weights
            alone replace what is there at once, and the backward passes of the other terms add theirs.
    """
    of_target = method.attribution == "gradient" and method.attribution_model == "target"
    target = model.record_target(x, differentiable=of_target and model.plan(x).form == "reverse")
    output = target.output.detach()
    distance = distance or losses.DISTANCES[method.distance]
    rows = model.to_instances  # outputs as [n_instances, batch, n_outputs]
    output_reconstruction = output_reconstruction or bool(method.output_reconstruction)
    hidden_of_full = method.topk is None and bool(method.activation_reconstruction)
    full: Record | None = None
    if method.attribution != "gradient" or output_reconstruction or hidden_of_full:
        full = model.forward(x, known=target.found)
    attributions = _attributions(model, method, x, target if of_target else None, full)
    always_on = int(method.distil_from_target)
    ranked = attributions[..., : attributions.shape[-1] - always_on]
    selection = None if method.topk is None else select(ranked, method, _active(method, x), model.threshold(ranked))
    step = Step({}, {}, attributions, selection, always_on)
    terms = step.terms
    each = 1 / model.components.n_instances  # the total is a mean over instances
    if accumulate and method.faithfulness:
        scale = method.faithfulness * each
        terms["faithfulness"] = losses.faithfulness_accumulate(model.components, model.weights, model.n_params, scale)
    elif accumulate:
        for name in model.components.multiplicity:
            for gradient in model.components.gradients(name):
                gradient.zero_()
    elif method.faithfulness:
        terms["faithfulness"] = losses.faithfulness(model.components, model.weights, model.n_params)
    if full is not None and output_reconstruction:
        terms["output_reconstruction"] = distance(rows(full.output), rows(output))
    masked = full
    if selection is not None and (method.minimality or method.activation_reconstruction):
        masked = model.forward(x, selection, always_on, accumulate, target.found)
        if method.minimality:
            terms["minimality"] = distance(rows(masked.output), rows(output))
    if masked is not None and method.activation_reconstruction:
        acts = activations or {name: _identity for name in masked.outputs}
        terms["activation_reconstruction"] = losses.activation_reconstruction(masked.outputs, target.outputs, acts)
    weights: Tensor | None = None
    if method.lp_sparsity or (selection is None and method.simplicity):
        weights = losses.lp_weights(attributions, n_outputs(target), method.lp_p)
        if method.lp_sparsity:
            terms["lp_sparsity"] = losses.lp_sparsity(weights)
    if method.simplicity:
        batch, exact = attributions.shape[1], method.schatten == "exact"
        used = step.counts if selection is not None else weights
        assert used is not None
        common = model.components, used, method.p, method.eps, model.n_params, batch, exact
        if accumulate and selection is not None:
            terms["simplicity"] = losses.simplicity_accumulate(*common, scale=method.simplicity * each)
        else:
            terms["simplicity"] = losses.simplicity(*common)
    step.coefficients.update({name: coefficient for name in terms if (coefficient := getattr(method, name))})
    return step


def _active(method: APD, x: Inputs) -> Tensor | None:
    """The inputs of which the exact selection counts what is not zero."""
    if method.topk is None or method.selection != "exact":
        return None
    if not isinstance(x, Tensor):
        raise TypeError("decompose: data must yield tensors for the exact selection, got a dict; take 'batch'")
    return x


def _identity(x: Tensor) -> Tensor:
    return x
