"""The training step as one function, and the loop around it.

One step of APD in top-k mode, in this order, which is the research code's (so that its trajectories can be replayed):
unit norm -> learning rate -> batch -> target (recorded) -> attributions -> selection -> masked forward -> losses ->
backward -> tangential gradients -> AdamW. Nothing differentiates through attributions or into the target, and the
forward of all components runs only when a loss or the attribution asks for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastapd import losses
from fastapd._random import stream
from fastapd.attributions import ablation_attributions, activation_attributions, gradient_attributions
from fastapd.components import Components
from fastapd.decomposition import Decomposition
from fastapd.model import ComponentModel, Record, find_sites
from fastapd.ops import Selection, batch_topk, sample_topk

if TYPE_CHECKING:
    from fastapd._rundir import RunDirectory
    from fastapd.config import APD, Optimiser

Activations = Mapping[str, Callable[[Tensor], Tensor]]
Distance = Callable[[Tensor, Tensor], Tensor]


class DivergedError(RuntimeError):
    """A loss became NaN or infinite."""


class Step(NamedTuple):
    """What one evaluation of the losses found."""

    total: Tensor
    """The weighted sum of the terms, averaged over instances: what is differentiated."""
    terms: dict[str, Float[Tensor, " I"]]
    """Each term before its coefficient, one value an instance."""
    attributions: Float[Tensor, "I b C"]
    selection: Selection | None
    """Of the ranked components; None in the Lp form, where all are on."""
    always_on: int
    """How many components, the last ones, are on for every sample and not ranked."""

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
        return torch.nn.functional.pad(self.selection.counts, (0, self.always_on), value=batch)


def learning_rate(step: int, steps: int, optimiser: Optimiser) -> float:
    """The learning rate of a step: linear warm-up from zero, then the schedule over the remaining steps.

    With s steps after the warm-up out of S: constant 1; linear 1 − s/S; cosine cos(½π s/(S−1)); exponential
    0.5^(s/halflife). Source: `get_lr_schedule_fn` and `get_lr_with_warmup` of ApolloResearch/apd.
    """
    warmup = int(steps * optimiser.warmup)
    if step < warmup:
        return optimiser.lr * step / warmup
    s, S = step - warmup, steps - warmup
    if optimiser.schedule == "linear":
        return optimiser.lr * (1 - s / S)
    if optimiser.schedule == "cosine":
        return optimiser.lr * (math.cos(0.5 * math.pi * s / (S - 1)) if S > 1 else 1.0)
    if optimiser.schedule == "exponential":
        assert optimiser.halflife is not None, "checked by the config"
        return optimiser.lr * 0.5 ** (s / optimiser.halflife)
    return optimiser.lr


def select(attributions: Float[Tensor, "I b C"], method: APD, x: Tensor | None = None) -> Selection:
    """The selection that the method makes among ranked components.

    Args:
        attributions: Of the components that are ranked.
        method: `selection` "batch" takes int(topk * batch) pairs of the batch, "sample" takes topk of each sample,
            "exact" as many pairs of the batch as inputs are not zero.
        x: The inputs [n_instances, batch, ..]; only "exact" looks at them.
    """
    n_instances, batch, n_components = attributions.shape
    if method.selection == "sample":
        return sample_topk(attributions, int(method.topk or 0))
    if method.selection == "batch":
        return batch_topk(attributions, int((method.topk or 0) * batch))
    if x is None:
        raise ValueError("select: x must be given for the exact selection, got None")
    active = (x != 0).reshape(n_instances, -1).sum(-1)  # [I]
    if method.reference_exact_count:  # float32 division and truncation lose one now and then
        active = ((active.float() / batch).double() * batch).long()
    return batch_topk(attributions, active.clamp(max=batch * n_components))


def _attributions(model: ComponentModel, method: APD, x: Tensor, target: Record | None, full: Record | None) -> Tensor:
    """By the method's measure; differentiable only in the Lp form, which is the only one that needs it."""
    with torch.set_grad_enabled(method.topk is None and torch.is_grad_enabled()):
        if method.attribution == "activation":
            assert full is not None
            return activation_attributions(model.components, full)
        if method.attribution == "ablation":
            assert full is not None
            return ablation_attributions(model, x, full.output)
        record = target
        if record is None:
            record = model.record_target(x, differentiable=True, of_components=True)
        return gradient_attributions(model, record, method.attribution_norm)


def evaluate(
    model: ComponentModel,
    method: APD,
    x: Tensor,
    activations: Activations | None = None,
    output_reconstruction: bool = False,
    distance: Distance | None = None,
) -> Step:
    """All losses of one batch, differentiable in the components.

    Args:
        model: The target and its components.
        method: Coefficients, selection and attribution; terms with a zero coefficient are not computed.
        x: One batch of the target's inputs.
        activations: For the activation term, what to apply to each compared site's output; None compares all as they
            are.
        output_reconstruction: Also report the error with all components on, whatever its coefficient.
        distance: (output, target's output) -> one value an instance, or a scalar; None for the method's.
    """
    of_target = method.attribution == "gradient" and method.attribution_model == "target"
    target = model.record_target(x, differentiable=of_target)
    output = target.output.detach()
    distance = distance or losses.DISTANCES[method.distance]
    rows = model.to_instances  # outputs as [n_instances, batch, n_outputs]
    output_reconstruction = output_reconstruction or bool(method.output_reconstruction)
    hidden_of_full = method.topk is None and bool(method.activation_reconstruction)
    full: Record | None = None
    if method.attribution != "gradient" or output_reconstruction or hidden_of_full:
        full = model.forward(x)
    attributions = _attributions(model, method, x, target if of_target else None, full)
    always_on = int(method.distil_from_target)
    ranked = attributions[..., : attributions.shape[-1] - always_on]
    selection = None if method.topk is None else select(ranked, method, x)
    step = Step(x.new_zeros(()), {}, attributions, selection, always_on)
    terms = step.terms
    if method.faithfulness:
        terms["faithfulness"] = losses.faithfulness(model.components, model.weights, model.n_params)
    if full is not None and output_reconstruction:
        terms["output_reconstruction"] = distance(rows(full.output), rows(output))
    masked = full
    if selection is not None and (method.minimality or method.activation_reconstruction):
        masked = model.forward(x, selection, always_on)
        if method.minimality:
            terms["minimality"] = distance(rows(masked.output), rows(output))
    if masked is not None and method.activation_reconstruction:
        acts = activations or {name: _identity for name in masked.outputs}
        terms["activation_reconstruction"] = losses.activation_reconstruction(masked.outputs, target.outputs, acts)
    weights: Tensor | None = None
    if method.lp_sparsity or (selection is None and method.simplicity):
        weights = losses.lp_weights(attributions, output.shape[-1], method.lp_p)
        if method.lp_sparsity:
            terms["lp_sparsity"] = losses.lp_sparsity(weights)
    if method.simplicity:
        if selection is not None:
            weights = step.counts
        assert weights is not None
        batch = attributions.shape[1]
        exact = method.schatten == "exact"
        terms["simplicity"] = losses.simplicity(
            model.components, weights, method.p, method.eps, model.n_params, batch, exact
        )
    total = step.total
    for name, term in terms.items():
        if coefficient := getattr(method, name):
            total = total + coefficient * term.mean()
    return step._replace(total=total)


def _identity(x: Tensor) -> Tensor:
    return x


def make_optimiser(components: Components) -> torch.optim.Optimizer:
    """AdamW without weight decay, fused: the research code's optimiser. Its learning rate is set at every step."""
    return torch.optim.AdamW(components.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def train_step(
    model: ComponentModel,
    method: APD,
    optimiser: torch.optim.Optimizer,
    lr: float,
    x: Tensor,
    activations: Activations | None = None,
    distance: Distance | None = None,
) -> Step:
    """One step of training: normalise, evaluate, differentiate, update. Returns what `evaluate` found."""
    if method.unit_norm:
        model.components.normalise_()
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad(set_to_none=True)
    step = evaluate(model, method, x, activations, distance=distance)
    if step.total.requires_grad:
        # only the components: whatever else of the target requires gradients is left alone
        step.total.backward(inputs=list(model.components.parameters()))
        if method.unit_norm:
            model.components.tangent_gradients_()
        optimiser.step()
    return step


def _row(step: Step, index: int, lr: float, started: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": index, "lr": lr, "seconds": round(time.perf_counter() - started, 3)}
    row["total"] = step.total.item()
    for name, term in step.terms.items():
        row[name] = term.detach().mean().item()
        row[f"{name}_per_instance"] = term.detach().reshape(-1).tolist()
    return row


def _forever(data: Iterable[Any]) -> Iterator[Tensor]:
    """Batches without end; an iterable that ends is started again."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch[0] if isinstance(batch, (tuple, list)) else batch
        if empty:
            raise ValueError("decompose: data must yield batches, got none; pass an iterable that can be restarted")


def decompose(
    target: nn.Module,
    data: Iterable[Any],
    targets: Sequence[str],
    C: int,
    *,
    method: APD | None = None,
    optimiser: Optimiser | None = None,
    steps: int = 10_000,
    rank: int | None = None,
    init: Components | None = None,
    init_scale: float = 1.0,
    seed: int = 0,
    activations: Activations | None = None,
    distance: Distance | None = None,
    out: RunDirectory | str | Path | None = None,
    log_every: int = 100,
    progress: bool = False,
) -> Decomposition:
    """Decomposes layers of a target into components by APD.

    Args:
        target: Any module; it is not modified. Call `.eval()` on it first if it has dropout.
        data: Batches of its inputs, [n_instances, batch, ..] for targets with instances; tuples yield their first item.
            Started again when it ends.
        targets: fnmatch patterns over the target's module names: the layers to decompose.
        C: Number of components.
        method: What is optimised; None for `APD(topk=1.0)`.
        optimiser: Learning rate and schedule; None for 1e-3, cosine, 5 % warm-up.
        steps: Optimisation steps; one more batch is drawn for the last row of metrics.
        rank: Of each component; None for full rank.
        init: Initial components; None draws them from `seed`.
        init_scale: Of drawn components.
        seed: Of the initial components.
        activations: For the activation term, what to apply to each compared site's output.
        distance: (output, target's output) -> one value an instance, or a scalar; None for the method's.
        out: The run directory to write metrics, components and status to, which must not hold anything yet, or one
            that was made already; None writes nothing.
        log_every: Steps between two rows of metrics.
        progress: Whether to show a progress bar.

    Returns:
        The `Decomposition`, with the rows of metrics in `history`.

    Raises:
        ValueError: If a target matches nothing or the data has the wrong shape.
        FileExistsError: If `out` is taken.
        DivergedError: If a loss becomes NaN or infinite.
        KeyboardInterrupt: As it came, after the run directory was brought up to date.
    """
    from fastapd._rundir import RunDirectory
    from fastapd.config import APD, Optimiser

    method = method or APD(topk=1.0)
    optimiser = optimiser or Optimiser(lr=1e-3, schedule="cosine", warmup=0.05)
    sites = find_sites(target, targets)
    first = sites[0].weight
    if init is None:
        generator = stream(seed, "components")
        shapes = {site.name: site.shape for site in sites}
        init = Components(
            shapes, C, rank, first.shape[0], init_scale, generator, dtype=first.dtype, device=first.device
        )
    elif init.n_components != C:
        raise ValueError(f"decompose: init must have C = {C} components, got {init.n_components}")
    model = ComponentModel(target, sites, init)
    result = Decomposition(model, method)
    # Claimed when nothing above was refused, so that the same path can be given again.
    run = RunDirectory.create(out, "decompose") if isinstance(out, (str, Path)) else out
    adam = make_optimiser(init)
    batches = _forever(data)
    started = time.perf_counter()
    index, state, message = 0, "failed", ""
    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=steps, desc="decompose", unit="step", mininterval=0.5)
    if run is not None:
        run.set_status("running", 0, steps)
    try:
        for index in range(steps + 1):
            x = next(batches).to(device=first.device, dtype=first.dtype)
            lr = learning_rate(index, steps, optimiser)
            logged = index % log_every == 0 or index == steps
            if index < steps:
                step = train_step(model, method, adam, lr, x, activations, distance)
            else:
                if method.unit_norm:
                    init.normalise_()
                with torch.no_grad():
                    step = evaluate(model, method, x, activations, distance=distance)
            if logged:
                row = _row(step, index, lr, started)
                if not math.isfinite(row["total"]):
                    terms = {name: row[name] for name in step.terms}
                    raise DivergedError(f"decompose: the loss is {row['total']} at step {index}: {terms}; lower the lr")
                result.history.append(row)
                if run is not None:
                    run.log(row)
                    run.set_status("running", index, steps)
                if bar is not None:
                    bar.set_postfix({name: f"{row[name]:.2e}" for name in step.terms}, refresh=False)
            if bar is not None and index < steps:
                bar.update()
        state = "finished"
    except KeyboardInterrupt:
        state, message = "interrupted", f"stopped by the user at step {index} of {steps}"
        raise
    except DivergedError as error:
        state, message = "diverged", str(error)
        raise
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        raise
    finally:
        if bar is not None:
            bar.close()
        if run is not None:
            result.save(run)
            run.set_status(state, index, steps, message)  # type: ignore[arg-type]
            if run is not out:
                run.close()
    return result
