"""The research code's `optimize` on fastapd: the same loop, files, prints and calls around another step.

The error with all components on, which the research code computes at every step and only prints, is computed where it
is printed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastapd.compat._apd_models import NotKnownError, components_of, give_back
from fastapd.compat._apd_steps import TERMS, AnyStep, KnownStep, StepForm, of_residual_mlp
from fastapd.config import APD, Optimiser
from fastapd.training import learning_rate

_LOG = logging.getLogger("fastapd.compat.apd")


def method_of(config: Any, n_instances: int) -> APD:
    """The research code's settings as a method.

    Raises:
        NotKnownError: If fastapd's step does not do what these settings ask for.
    """
    if config.topk is None and config.schatten_coeff is not None and config.lp_sparsity_coeff is None:
        raise NotKnownError("schatten_coeff needs topk or lp_sparsity_coeff")
    if config.exact_topk and config.topk is not None and not (config.batch_topk and n_instances == 1):
        raise NotKnownError("exact_topk needs batch_topk and one instance")
    if of_residual_mlp(config) and config.act_recon_coeff is not None and config.topk is None:
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
        item = next(source, None)
        if item is None:
            write(f"Epoch {epoch} finished, starting new epoch")
            epoch, source = epoch + 1, iter(dataloader)
            item = next(source, None)
            if item is None:
                raise ValueError("optimize: dataloader must yield batches, got none")
        yield item[0] if isinstance(item, (tuple, list)) else item


def train(
    form: StepForm,
    config: Any,
    device: Any,
    data: Iterator[Tensor],
    rate: Callable[[int], float],
    steps: Iterable[int],
    callbacks: Callbacks,
) -> None:
    """Trains `config.steps` steps and evaluates once more, as the research code does.

    Args:
        form: What a step computes.
        config: The research code's settings.
        device: Where the batches go.
        data: Batches [batch, .., n_features].
        rate: The learning rate of a step.
        steps: range(config.steps + 1), or what shows a bar over it.
        callbacks: What is printed, drawn, saved and logged.
    """
    write, plot, save, log = callbacks
    for step in steps:
        lr = rate(step)
        form.prepare(lr)
        batch = next(data).to(device=device)
        last, printed = step == config.steps, step % config.print_freq == 0
        found = form.evaluate(batch, printed, last)
        if printed:
            assert found.total is not None
            total = found.total.item()
            write(f"Step {step}")
            write(f"Total loss: {total}")
            write(f"lr: {lr}")
            for name, value in found.terms.items():
                write(f"{name}:\n{value.tolist()}" if value.numel() > 1 else f"{name}: {value.item()}")
            if log is not None:
                means = {name: found.terms[name].mean().item() if name in found.terms else None for name in TERMS}
                log(step, {"pnorm": config.pnorm, "lr": lr, "total_loss": total, **means})
        drawn = config.image_freq is not None and step % config.image_freq == 0
        if plot is not None and drawn and (step > 0 or config.image_on_first_step):
            plot(step, found.mask, batch)
        saved = config.save_freq is not None and step % config.save_freq == 0 and step > 0
        if save is not None and (saved or last):
            save(step)
        if not last:
            form.descend()
            if printed and log is not None:
                log(step, {"grad_norm": sum(g.norm() for g in form.gradients())})


def _form(
    model: Any, config: Any, device: Any, target_model: Any, param_names: list[str], others: list[str]
) -> tuple[StepForm, list[nn.Parameter]]:
    """The step for these models, and the parameters that `give_back` has to lay out again."""
    try:
        if others:
            raise NotKnownError(f"{', '.join(others)} is somebody else's")
        method = method_of(config, getattr(model, "n_instances", 1))
        known, moved = components_of(model, target_model, param_names)
        return KnownStep(known, method, config), moved
    except NotKnownError as reason:
        _LOG.debug("optimize: takes the step for any model, as %s", reason)
        return AnyStep(model, target_model, config, device, param_names), []


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
        model: The component model; its A and B are trained, and whatever else of it requires gradients.
        config: `spd.run_spd.Config`.
        device: Where to run.
        dataloader: Its items' first entries are batches [batch, (n_instances,) n_features].
        target_model: The target, which receives no gradients.
        param_names: The decomposed layers.
        plot_results_fn: Called as there, with `model`, `target_model`, `step`, `out_dir`, `device`, `config`,
            `topk_mask` and `batch`, before the step changes anything.
        out_dir: Where `spd_model_<step>.pth` go.

    Raises:
        ValueError: If settings contradict each other or the model, where the research code asserts.
    """
    from fastapd.compat._apd_patch import replaced_elsewhere

    run_spd: Any = sys.modules["spd.run_spd"]
    tqdm, wandb = run_spd.tqdm, run_spd.wandb
    model.to(device=device)
    target_model.to(device=device)
    form, moved = _form(model, config, device, target_model, param_names, replaced_elsewhere())
    model.zero_grad(set_to_none=True)
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
        path = Path(out_dir) / f"spd_model_{step}.pth"
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
    try:
        data = batches(dataloader, tqdm.write)
        train(form, config, device, data, rate, tqdm(range(config.steps + 1), ncols=0), callbacks)
    finally:
        give_back(moved)


def contiguous_state(model: nn.Module) -> dict[str, Any]:
    """A model's state with every tensor laid out plainly, so that files do not depend on how it was trained."""
    state = model.state_dict()
    for name, value in state.items():
        state[name] = value.contiguous()
    return state


def rate_of(config: Any) -> Callable[[int], float]:
    """The learning rate of a step where the research code is not there."""
    # a warm-up of all steps is valid there
    optimiser = Optimiser.model_construct(
        lr=config.lr, schedule=config.lr_schedule, warmup=config.lr_warmup_pct, halflife=config.lr_exponential_halflife
    )
    return lambda step: learning_rate(step, config.steps, optimiser)
