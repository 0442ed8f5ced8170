"""The training step as one function, and the loop around it.

One step of APD in top-k mode, in this order, which is the research code's (so that its trajectories can be replayed):
learning rate -> batch -> unit norm -> target (recorded) -> attributions -> selection -> masked forward -> losses ->
backward -> tangential gradients -> AdamW. Nothing differentiates into the target, nor through attributions except in
the Lp form's terms; the forward of all components runs only when a loss or the attribution asks for it.

From unit norm on, a step is `update`, which on a CUDA device never waits for it: `_cuda_graph` makes one graph of it.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastapd._random import stream
from fastapd._schedule import scheduled
from fastapd.components import Components
from fastapd.decomposition import Decomposition
from fastapd.evaluation import Activations, Distance, Step, evaluate
from fastapd.model import ComponentModel, Inputs, Site, find_sites, leading

if TYPE_CHECKING:
    from fastapd._rundir import RunDirectory
    from fastapd.config import APD, Optimiser


class DivergedError(RuntimeError):
    """A loss became NaN or infinite."""


def learning_rate(step: int, steps: int, optimiser: Optimiser) -> float:
    """The learning rate of a step: linear warm-up from zero, then the schedule over the remaining steps.

    With s steps after the warm-up out of S: constant 1; linear 1 − s/S; cosine cos(½π s/(S−1)); exponential
    0.5^(s/halflife). Source: `get_lr_schedule_fn` and `get_lr_with_warmup` of ApolloResearch/apd.
    """
    return scheduled(step, steps, optimiser.lr, optimiser.schedule, optimiser.warmup, optimiser.halflife)


def make_optimiser(components: Components, capturable: bool | None = None) -> torch.optim.Optimizer:
    """AdamW without weight decay, fused: the research code's optimiser. Its learning rate is set at every step.

    Args:
        components: What it trains.
        capturable: Whether its steps can be captured in a CUDA graph: the learning rate is then a float32 tensor on the
            device. None for whether they are on a CUDA device, so that there a graph does not change a number.
    """
    parameters = list(components.parameters())
    capturable = parameters[0].is_cuda if capturable is None else capturable
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True, capturable=capturable)
    if capturable:
        for group in optimiser.param_groups:
            group["lr"] = torch.zeros((), device=parameters[0].device)
    return optimiser


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the steps to come; where it is a tensor, that keeps its place."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def train_step(
    model: ComponentModel,
    method: APD,
    optimiser: torch.optim.Optimizer,
    lr: float,
    x: Inputs,
    activations: Activations | None = None,
    distance: Distance | None = None,
) -> Step:
    """One step of training: normalise, evaluate, differentiate, update. Returns what `evaluate` found."""
    set_learning_rate(optimiser, lr)
    return update(model, method, optimiser, x, activations, distance)


def update(
    model: ComponentModel,
    method: APD,
    optimiser: torch.optim.Optimizer,
    x: Inputs,
    activations: Activations | None = None,
    distance: Distance | None = None,
) -> Step:
    """`train_step` at the learning rate that is set: what a CUDA graph captures, so nothing here waits for the device.

    What lives on from one step to the next stays in its place: parameters, their gradients, the optimiser's state, the
    threshold of the selection, and what the plan keeps of the target.
    """
    if method.unit_norm:
        model.components.normalise_()
    step = evaluate(model, method, x, activations, distance=distance, accumulate=True)
    descend(model, method, optimiser, step)
    return step


def descend(model: ComponentModel, method: APD, optimiser: torch.optim.Optimizer, step: Step) -> None:
    """The half of `update` behind the evaluation, which has to be one that accumulates: differentiate and update."""
    if step.terms:
        differentiable = [name for name in step.coefficients if step.terms[name].requires_grad]
        if differentiable:
            terms = [step.terms[name] for name in differentiable]
            slopes = [_slope(step.coefficients[name], term) for name, term in zip(differentiable, terms, strict=True)]
            # only the components: whatever else of the target requires gradients is left alone
            torch.autograd.backward(terms, slopes, inputs=list(model.components.parameters()))
        if method.unit_norm:
            model.components.tangent_gradients_()
        optimiser.step()


def _slope(coefficient: float, term: Tensor) -> Tensor:
    """The derivative of the total, a mean over instances, by a term: a pass back through the total costs more."""
    return term.new_full(term.shape, _mean_slope(coefficient, term.numel(), term.dtype))


@functools.cache
def _mean_slope(coefficient: float, n: int, dtype: torch.dtype) -> float:
    """coefficient / n, rounded as autograd does."""
    return (torch.ones((), dtype=dtype, device="cpu") / n * coefficient).item()


def _row(step: Step, index: int, lr: float, started: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": index, "lr": lr, "seconds": round(time.perf_counter() - started, 3)}
    row["total"] = step.total.item()
    for name, term in step.terms.items():
        row[name] = term.detach().mean().item()
        row[f"{name}_per_instance"] = term.detach().reshape(-1).tolist()
    return row


def _forever(data: Iterable[Any]) -> Iterator[Inputs]:
    """Batches without end; an iterable that ends is started again."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield _inputs(batch)
        if empty:
            raise ValueError("decompose: data must yield batches, got none; pass an iterable that can be restarted")


def _inputs(batch: Any) -> Inputs:
    """What the model is called with: a tensor, the first item of a tuple or list, or arguments by name."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, (Tensor, Mapping)):
        raise TypeError(
            f"decompose: data must yield tensors, tuples of which the first is one, or dicts of the model's arguments, "
            f"got {type(batch).__name__}"
        )
    if isinstance(batch, Tensor):
        return batch
    leading(batch)  # one of them must be a tensor
    return dict(batch)


def _sent(x: Inputs, like: Tensor) -> Inputs:
    """A batch on the device of `like`, numbers with a fraction in its dtype."""
    if isinstance(x, Tensor):
        return _tensor_sent(x, like)
    return {name: _tensor_sent(t, like) if isinstance(t, Tensor) else t for name, t in x.items()}


def _tensor_sent(x: Tensor, like: Tensor) -> Tensor:
    """By way of pinned memory of our own where that spares a wait."""
    dtype = like.dtype if x.is_floating_point() else x.dtype
    if like.is_cuda and x.device.type == "cpu":
        pinned = torch.empty(x.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(x)
        return pinned.to(like.device, non_blocking=True)
    return x.to(device=like.device, dtype=dtype)


def _not_finite(x: Inputs) -> bool:
    tensors = [x] if isinstance(x, Tensor) else [t for t in x.values() if isinstance(t, Tensor)]
    return not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def _diverged(row: dict[str, Any], step: Step, index: int, x: Inputs, log_every: int) -> DivergedError:
    terms = {name: row[name] for name in step.terms}
    text = f"decompose: the loss is {row['total']} at step {index}: {terms}; "
    if _not_finite(x):
        return DivergedError(text + "its batch has NaN or infinite values: the data must be finite")
    if index == 0:
        return DivergedError(text + "nothing was trained yet: the model's output or its weights are not finite")
    between = "" if log_every == 1 else f", and see that the data since step {max(index - log_every, 0)} is finite"
    return DivergedError(f"{text}lower the lr{between}")


def _on_device(
    model: nn.Module, device: torch.device | str, patterns: Sequence[str] | str, init: Components | None
) -> tuple[nn.Module, list[Site]]:
    """The model, or a copy of it where it is to run elsewhere, and its sites."""
    sites = find_sites(model, patterns)
    held = sites[0].adapter.held(sites[0].module)
    if held.is_meta:
        raise ValueError(f"decompose: model must have values, got {sites[0].name} on the meta device")
    if device == "auto":
        stays = held.is_cuda or init is not None or not torch.cuda.is_available()
        wanted = held.device if stays else torch.device("cuda")
    else:
        try:
            wanted = torch.device(device)
        except RuntimeError:
            raise ValueError(f"decompose: device must be 'auto' or a device of torch's, got {device!r}") from None
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"decompose: device must be one that there is, got {device!r} without a GPU")
    if wanted.type == held.device.type and wanted.index in (None, held.device.index):
        return model, sites
    model = copy.deepcopy(model).to(wanted)  # the caller's own stays where it is
    return model, find_sites(model, patterns)


def _at_least_one(**values: Any) -> None:
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"decompose: {name} must be a whole number of at least 1, got {value!r}")


def decompose(
    model: nn.Module,
    data: Iterable[Any],
    targets: Sequence[str] | str,
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
    output: Callable[[Any], Tensor] | None = None,
    device: torch.device | str = "auto",
    out: RunDirectory | str | Path | None = None,
    log_every: int = 100,
    progress: bool = False,
    cuda_graph: bool = False,
    track: Callable[[dict[str, Any]], object] | None = None,
) -> Decomposition:
    """Decomposes layers of a model into components by APD.

    Args:
        model: Any module. It is not modified, and runs in evaluation mode. Its batch is on the first axis, and what
            it does with one element of the batch does not depend on the others.
        data: Batches of its inputs, [n_instances, batch, ..] for models with instances; tuples yield their first item,
            dicts are the arguments of the model's `forward` by name. Started again when it ends. Numbers with a
            fraction are brought to the model's dtype, everything to its device.
        targets: fnmatch patterns over the names of the model's modules: the layers to decompose. `nn.Linear`,
            `nn.Embedding`, Hugging Face's `Conv1D`, this package's own; or names of parameters that are used as
            matrices, `blocks.*.mlp.W_in`. Every row of their inputs, each position of a sequence, is a sample.
        C: Number of components.
        method: What is optimised; None for `APD(topk=1.0)`.
        optimiser: Learning rate and schedule; None for 1e-3, cosine, 5 % warm-up.
        steps: Optimisation steps; one more batch is drawn for the last row of metrics.
        rank: Of each component; None for full rank.
        init: Initial components; None draws them from `seed`.
        init_scale: Of drawn components.
        seed: Of the initial components.
        activations: For the activation term, what to apply to each compared site's output.
        distance: (output, target's output) -> one value an instance, or a scalar; None for the method's. Both are
            [n_instances, samples, n_outputs].
        output: Takes the tensor to compare from what the model returns; None if that is a tensor or has `logits`.
        device: "auto" leaves a model on a GPU or beside given components where it is, and otherwise takes a GPU if
            there is one; a model that is elsewhere is copied, not moved.
        out: The run directory to write metrics, components and status to, which must not hold anything yet, or one
            that was made already; None writes nothing.
        log_every: Steps between two rows of metrics.
        progress: Whether to show a progress bar.
        cuda_graph: Whether steps are replayed as one CUDA graph, which changes no number and spares a small step most
            of its time: after the first three a step is captured, and again if the target's parameters or buffers
            change. For float32, float16 and bfloat16 targets on a CUDA device and batches of one shape; `activations`
            and `distance` must not wait for the device.
        track: Called with every row of metrics; `fastapd.trackers` has sinks. Closed with the run if it has a `close`.

    Returns:
        The `Decomposition`, with the rows of metrics in `history`; with `attribution_probes` in a row where the
        attributions were estimated by so many, and `attribution_refined` where so many of a sample were then computed.

    Raises:
        ValueError: If a target matches nothing, the data has the wrong shape, or `cuda_graph` is not for this model,
            method or data.
        TypeError: If a target, the data or what the model returns is of a type that nothing is known of.
        NotImplementedError: If a step cannot be captured.
        FileExistsError: If `out` is taken.
        DivergedError: If a loss becomes NaN or infinite.
        KeyboardInterrupt: As it came, after the run directory was brought up to date.
    """
    from fastapd import _cuda_graph
    from fastapd._rundir import RunDirectory
    from fastapd.config import APD, Optimiser

    method = method or APD(topk=1.0)
    optimiser = optimiser or Optimiser(lr=1e-3, schedule="cosine", warmup=0.05)
    if isinstance(data, (Tensor, Mapping)):
        raise TypeError(
            f"decompose: data must be batches one after the other, got a {type(data).__name__}; pass [data]"
        )
    _at_least_one(C=C, rank=rank, log_every=log_every)
    if method.topk is not None and method.topk > C - method.distil_from_target:
        raise ValueError(f"decompose: method.topk must be at most {C - method.distil_from_target}, got {method.topk}")
    model = getattr(model, "_orig_mod", model)  # of a compiled module, whose code would run without the components
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"decompose: model must not mix the samples of a batch, got {name}, a {type(module).__name__} without "
                "running statistics"
            )
    target, sites = _on_device(model, device, targets, init)
    first = sites[0].weight.to(sites[0].dtype)
    if init is None:
        generator = stream(seed, "components")
        shapes = {site.name: site.shape for site in sites}
        dtype = torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else first.dtype
        init = Components(shapes, C, rank, first.shape[0], init_scale, generator, dtype=dtype, device=first.device)
    elif init.n_components != C:
        raise ValueError(f"decompose: init must have C = {C} components, got {init.n_components}")
    components = init
    running = ComponentModel(target, sites, components, output)
    running.probes = stream(seed, "probes")
    result = Decomposition(running, method)
    if cuda_graph:
        _cuda_graph.refuse(running, method)
    # Claimed when nothing above was refused, so that the same path can be given again.
    run = RunDirectory.create(out, "decompose") if isinstance(out, (str, Path)) else out
    if cuda_graph:
        take_step = _cuda_graph.GraphedSteps(running, method, make_optimiser(components, True), activations, distance)
    else:
        adam = make_optimiser(components)
        take_step = lambda lr, x: train_step(running, method, adam, lr, x, activations, distance)  # noqa: E731
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
            x = _sent(next(batches), first)
            lr = learning_rate(index, steps, optimiser)
            logged = index % log_every == 0 or index == steps
            if index < steps:
                step = take_step(lr, x)
            else:
                result.last_batch = x
                if method.unit_norm:
                    components.normalise_()
                with torch.no_grad():
                    step = evaluate(running, method, x, activations, distance=distance)
            if logged:
                row = _row(step, index, lr, started)
                if not math.isfinite(row["total"]):
                    raise _diverged(row, step, index, x, log_every)
                if running.estimated:
                    row["attribution_probes"] = method.attribution_probes
                    if method.attribution_refined is not None:
                        row["attribution_refined"] = method.attribution_refined
                result.history.append(row)
                if run is not None:
                    run.log(row)
                    run.set_status("running", index, steps)
                if track is not None:
                    track(row)
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
        if close := getattr(track, "close", None):
            close()
    return result
