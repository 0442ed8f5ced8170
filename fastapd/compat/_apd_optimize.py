"""The research code's `optimize` as a loop over fastapd's step.

What it covers is a pair of the research code's own models, components alone being trained; then the parameters of the
component model are what fastapd trains, in place. Everything else runs in the research code's own loop, over the
functions that `patch` put there, and a warning says why.

One term is computed by the research code at every step and only printed: the error with all components on. Here it is
computed where it is printed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastapd.compat._apd_models import NotKnownError, components_of, give_back
from fastapd.config import APD
from fastapd.evaluation import Activations, Step, evaluate
from fastapd.model import ComponentModel
from fastapd.training import descend, learning_rate, make_optimiser, set_learning_rate

if TYPE_CHECKING:
    from fastapd.config import Optimiser

TERMS = {
    "param_match_loss": ("faithfulness", "param_match_coeff"),
    "out_recon_loss": ("output_reconstruction", "out_recon_coeff"),
    "lp_sparsity_loss": ("lp_sparsity", "lp_sparsity_coeff"),
    "topk_recon_loss": ("minimality", "topk_recon_coeff"),
    "act_recon_loss": ("activation_reconstruction", "act_recon_coeff"),
    "schatten_loss": ("simplicity", "schatten_coeff"),
}
"""The research code's terms in the order in which it prints them: ours, and the coefficient's key."""


def method_of(config: Any, n_instances: int) -> APD:
    """The research code's settings as a method.

    Raises:
        NotKnownError: If fastapd's step does not do what these settings ask for.
    """
    if config.topk is None and config.schatten_coeff is not None and config.lp_sparsity_coeff is None:
        raise NotKnownError("schatten_coeff needs topk or lp_sparsity_coeff")
    if config.exact_topk and config.topk is not None and not (config.batch_topk and n_instances == 1):
        raise NotKnownError("exact_topk needs batch_topk and one instance")
    of_mlp = config.task_config.task_name == "residual_mlp"
    if of_mlp and config.act_recon_coeff is not None and config.topk is None:
        raise NotKnownError("act_recon_coeff of a residual MLP needs topk")
    values: dict[str, Any] = {ours: getattr(config, key) or 0.0 for ours, key in TERMS.values()}
    if config.schatten_pnorm is not None:
        values["p"] = config.schatten_pnorm
    elif config.schatten_coeff is not None:
        values["p"] = 1.0
    if config.pnorm is not None:
        values["lp_p"] = config.pnorm
    selection = "exact" if config.exact_topk else "batch" if config.batch_topk else "sample"
    try:
        return APD(
            topk=config.topk,
            selection=selection if config.topk is not None else "batch",
            distil_from_target=config.distil_from_target and config.topk is not None,
            attribution=config.attribution_type,
            unit_norm=config.unit_norm_matrices,
            **values,
        )
    except ValueError as error:
        raise NotKnownError(str(error)) from None


def activations_of(config: Any, names: Iterable[str]) -> Activations | None:
    """What is compared inside the network: of a residual MLP the neurons after ReLU, of others every layer."""
    if config.task_config.task_name != "residual_mlp":
        return None
    return {name: torch.relu for name in names if name.endswith(".mlp_in")}


class Callbacks(NamedTuple):
    """What a run does besides training; the research code's counterparts, or None."""

    write: Callable[[str], None]
    plot: Callable[[int, Tensor | None, Tensor], None] | None = None
    """(step, mask [batch, n_instances, C] or None, batch)."""
    save: Callable[[int], None] | None = None
    log: Callable[[int, dict[str, Any]], None] | None = None
    """Metrics of a printed step, and the norm of the gradient after it."""


def batches(dataloader: Iterable[Any], write: Callable[[str], None]) -> Iterator[Tensor]:
    """The inputs of a loader without end, asked for one at a time; labels are left aside."""
    epoch, source = 0, iter(dataloader)
    while True:
        try:
            item = next(source)
        except StopIteration:
            write(f"Epoch {epoch} finished, starting new epoch")
            epoch, source = epoch + 1, iter(dataloader)
            item = next(source)
        yield item[0]


def terms_of(model: ComponentModel, method: APD, config: Any, x: Tensor, step: Step, acts: Any) -> dict[str, Tensor]:
    """Every term the research code prints, by its name; those with a coefficient of zero are computed for that."""
    zero = {ours: 1.0 for ours, key in TERMS.values() if getattr(config, key) == 0 and ours not in step.terms}
    found = dict(step.terms)
    if zero:
        with torch.no_grad():
            found = evaluate(model, method.model_copy(update=zero), x, acts).terms | found
    shown = {name for name, (_, key) in TERMS.items() if getattr(config, key) is not None} | {"out_recon_loss"}
    return {name: found[ours].detach() for name, (ours, _) in TERMS.items() if name in shown and ours in found}


def train(
    model: ComponentModel,
    method: APD,
    config: Any,
    device: Any,
    data: Iterator[Tensor],
    rate: Callable[[int], float],
    steps: Iterable[int],
    callbacks: Callbacks,
) -> None:
    """Trains `config.steps` steps and evaluates once more, as the research code does.

    Args:
        model: The target and the components, which are changed in place.
        method: From `method_of(config)`.
        config: The research code's settings.
        device: Where the batches go.
        data: Batches [batch, n_instances, n_features].
        rate: The learning rate of a step.
        steps: range(config.steps + 1), or what shows a bar over it.
        callbacks: What is printed, drawn, saved and logged.
    """
    write, plot, save, log = callbacks
    optimiser = make_optimiser(model.components)
    acts = activations_of(config, [site.name for site in model.sites])
    for step in steps:
        if method.unit_norm:
            model.components.normalise_()
        lr = rate(step)
        set_learning_rate(optimiser, lr)
        batch = next(data).to(device=device)
        x = batch.transpose(0, 1).contiguous()
        last = step == config.steps
        printed = step % config.print_freq == 0
        with torch.set_grad_enabled(not last):
            found = evaluate(model, method, x, acts, output_reconstruction=printed, accumulate=not last)
        if printed:
            total = found.total.item()
            terms = terms_of(model, method, config, x, found, acts)
            write(f"Step {step}")
            write(f"Total loss: {total}")
            write(f"lr: {lr}")
            for name, value in terms.items():
                write(f"{name}:\n{value.tolist()}" if value.numel() > 1 else f"{name}: {value.item()}")
            if log is not None:
                means = {name: terms[name].mean().item() if name in terms else None for name in TERMS}
                log(step, {"pnorm": config.pnorm, "lr": lr, "total_loss": total, **means})
        drawn = config.image_freq is not None and step % config.image_freq == 0
        if plot is not None and drawn and (step > 0 or config.image_on_first_step):
            mask = None if found.selection is None else found.mask.transpose(0, 1)
            plot(step, mask, batch)
        saved = config.save_freq is not None and step % config.save_freq == 0 and step > 0
        if save is not None and (saved or last):
            save(step)
        if not last:
            descend(model, method, optimiser, found)
            if printed and log is not None:
                norms = [p.grad.norm() for p in model.components.parameters() if p.grad is not None]
                log(step, {"grad_norm": sum(norms)})


def run(
    model: Any,
    config: Any,
    device: Any,
    dataloader: Iterable[Any],
    target_model: Any,
    param_names: list[str],
    plot_results_fn: Callable[..., Mapping[str, Any]] | None = None,
    out_dir: Path | None = None,
) -> None:
    """`optimize` for a pair of the research code's own models.

    Raises:
        NotKnownError: If fastapd's step does not cover them; then nothing was changed.
    """
    run_spd: Any = sys.modules["spd.run_spd"]
    tqdm, wandb = run_spd.tqdm, run_spd.wandb
    model.to(device=device)
    target_model.to(device=device)
    method = method_of(config, getattr(model, "n_instances", 1))
    engine, moved = components_of(model, target_model, param_names)
    model.zero_grad(set_to_none=True)
    try:
        schedule = run_spd.get_lr_schedule_fn(config.lr_schedule, config.lr_exponential_halflife)

        def rate(step: int) -> float:
            return run_spd.get_lr_with_warmup(
                step=step,
                steps=config.steps,
                lr=config.lr,
                lr_schedule_fn=schedule,
                lr_warmup_pct=config.lr_warmup_pct,
            )

        def plot(step: int, mask: Tensor | None, batch: Tensor) -> None:
            assert plot_results_fn is not None
            figures = plot_results_fn(
                model=model, target_model=target_model, step=step, out_dir=out_dir, device=device, config=config,
                topk_mask=mask, batch=batch,
            )  # fmt: skip
            if config.wandb_project:
                wandb.log({name: wandb.Image(figure) for name, figure in figures.items()}, step=step)

        def save(step: int) -> None:
            assert out_dir is not None
            path = out_dir / f"spd_model_{step}.pth"
            torch.save(contiguous_state(model), path)
            tqdm.write(f"Saved model to {path}")
            if config.wandb_project:
                wandb.save(str(path), base_path=out_dir, policy="now")

        callbacks = Callbacks(
            write=tqdm.write,
            plot=plot if plot_results_fn is not None else None,
            save=save if out_dir is not None else None,
            log=(lambda step, values: wandb.log(values, step=step)) if config.wandb_project else None,
        )
        data = batches(dataloader, tqdm.write)
        train(engine, method, config, device, data, rate, tqdm(range(config.steps + 1), ncols=0), callbacks)
    finally:
        give_back(moved)


def contiguous_state(model: nn.Module) -> dict[str, Any]:
    """A model's state with every tensor laid out plainly, so that files do not depend on how it was trained."""
    state = model.state_dict()
    for name, value in state.items():
        state[name] = value.contiguous()
    return state


def optimize(
    model: Any,
    config: Any,
    device: Any,
    dataloader: Iterable[Any],
    target_model: Any,
    param_names: list[str],
    plot_results_fn: Callable[..., Mapping[str, Any]] | None = None,
    out_dir: Path | None = None,
) -> None:
    """Decomposes the target into the model's components, in place: the research code's `optimize` on fastapd.

    Args:
        model: The component model; its A and B are trained.
        config: `spd.run_spd.Config`.
        device: Where to run.
        dataloader: Its items' first entries are batches [batch, n_instances, n_features].
        target_model: The target, which receives no gradients.
        param_names: The decomposed layers.
        plot_results_fn: Called as there, with `model`, `target_model`, `step`, `out_dir`, `device`, `config`,
            `topk_mask` and `batch`, before the step changes anything.
        out_dir: Where `spd_model_<step>.pth` go.

    Warns:
        UserWarning: When the research code's own loop runs, and why.
    """
    from fastapd.compat import _apd_patch

    arguments = (model, config, device, dataloader, target_model, param_names, plot_results_fn, out_dir)
    original = _apd_patch.originals()["optimize"]
    if others := _apd_patch.replaced_elsewhere():
        reason = f"{', '.join(others)} is somebody else's"
    else:
        try:
            return run(*arguments)
        except NotKnownError as error:
            reason = str(error)
    warnings.warn(
        f"optimize: runs the research code's own loop over fastapd's functions, because {reason}", stacklevel=2
    )
    return original(*arguments)


def rate_of(config: Any) -> Callable[[int], float]:
    """The learning rate of a step where the research code is not there."""
    from fastapd.config import Optimiser

    optimiser: Optimiser = Optimiser.model_construct(
        lr=config.lr, schedule=config.lr_schedule, warmup=config.lr_warmup_pct, halflife=config.lr_exponential_halflife
    )
    return lambda step: learning_rate(step, config.steps, optimiser)
