"""One step of the research code's loop, in two forms that the loop does not tell apart.

`KnownStep` trains the factors of a pair of the research code's own models through fastapd's `evaluate` and `descend`.
`AnyStep` takes every other model that keeps the research code's contract (`run_with_cache`, hook names, modules with A
and B), and calls the loss functions that stand in `spd.run_spd` at that moment, whoever put them there. Both leave out
what the research code computes without need: the forward pass of all components, single components' outputs, the
graph of attributions that only rank, and gradients of the target.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastapd.compat._apd_common import settings
from fastapd.config import APD
from fastapd.evaluation import Activations, Step, evaluate
from fastapd.model import ComponentModel
from fastapd.training import descend, make_optimiser, set_learning_rate

TERMS = {
    "param_match_loss": ("faithfulness", "param_match_coeff"),
    "out_recon_loss": ("output_reconstruction", "out_recon_coeff"),
    "lp_sparsity_loss": ("lp_sparsity", "lp_sparsity_coeff"),
    "topk_recon_loss": ("minimality", "topk_recon_coeff"),
    "act_recon_loss": ("activation_reconstruction", "act_recon_coeff"),
    "schatten_loss": ("simplicity", "schatten_coeff"),
}
"""The research code's terms in the order in which it prints them: ours, and the coefficient's key."""


class Found(NamedTuple):
    """What a step found; terms and total only if they are to be printed."""

    terms: dict[str, Tensor]
    total: Tensor | None
    mask: Tensor | None
    """[batch, (n_instances,) C]; None without top-k."""


class StepForm(Protocol):
    """What the loop asks of a step, in this order."""

    def prepare(self, lr: float) -> None:
        """Unit norm, if asked for, and the learning rate."""
        ...

    def evaluate(self, batch: Tensor, printed: bool, last: bool) -> Found:
        """All terms of a batch; of the last one no gradients are needed."""
        ...

    def descend(self) -> None:
        """Gradients of what was evaluated, and the optimiser's step."""
        ...

    def gradients(self) -> list[Tensor]: ...


def of_residual_mlp(config: Any) -> bool:
    return config.task_config.task_name == "residual_mlp"


def activations_of(config: Any, names: list[str]) -> Activations | None:
    """What is compared inside the network: of a residual MLP the neurons after ReLU, of others every layer."""
    if not of_residual_mlp(config):
        return None
    return {name: torch.relu for name in names if name.endswith(".mlp_in")}


class KnownStep:
    """The step of fastapd's own trainer.

    Args:
        model: The target and the components, which are changed in place.
        method: From the configuration.
        config: The research code's settings.
    """

    def __init__(self, model: ComponentModel, method: APD, config: Any) -> None:
        self.model, self.method, self.config = model, method, config
        self.acts = activations_of(config, [site.name for site in model.sites])
        self.optimiser = make_optimiser(model.components)
        self._step: Step | None = None

    def prepare(self, lr: float) -> None:
        if self.method.unit_norm:
            self.model.components.normalise_()
        set_learning_rate(self.optimiser, lr)

    def evaluate(self, batch: Tensor, printed: bool, last: bool) -> Found:
        x = batch.transpose(0, 1).contiguous()
        with torch.set_grad_enabled(not last):
            step = evaluate(self.model, self.method, x, self.acts, output_reconstruction=printed, accumulate=not last)
        self._step = step
        mask = None if step.selection is None else step.mask.transpose(0, 1)
        return Found(self._terms(x, step), step.total.detach(), mask) if printed else Found({}, None, mask)

    def _terms(self, x: Tensor, step: Step) -> dict[str, Tensor]:
        """By the research code's names; those with a coefficient of zero are computed for that."""
        coefficients = {name: (ours, getattr(self.config, key)) for name, (ours, key) in TERMS.items()}
        zero = {ours: 1.0 for ours, value in coefficients.values() if value == 0 and ours not in step.terms}
        found = dict(step.terms)
        if zero:
            with torch.no_grad():
                found = evaluate(self.model, self.method.model_copy(update=zero), x, self.acts).terms | found
        shown = {name for name, (_, value) in coefficients.items() if value is not None} | {"out_recon_loss"}
        return {n: found[ours].detach() for n, (ours, _) in coefficients.items() if n in shown and ours in found}

    def descend(self) -> None:
        assert self._step is not None
        descend(self.model, self.method, self.optimiser, self._step)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.components.parameters() if p.grad is not None]


def _of(cache: Any, suffix: str) -> dict[str, Tensor]:
    return {key: value for key, value in cache.items() if key.endswith(suffix)}


def _need(condition: bool, argument: str, what: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"optimize: {argument} must {what}, got {got}")


class AnyStep:
    """The step of any model that keeps the research code's contract.

    Args:
        model: The component model; whatever of it requires gradients is trained.
        target_model: The target; it receives no gradients.
        config: The research code's settings.
        device: Where both are.
        param_names: The layers whose weights are compared.

    Raises:
        ValueError: If settings contradict each other or the model.
    """

    def __init__(self, model: Any, target_model: Any, config: Any, device: Any, param_names: list[str]) -> None:
        self.model, self.target, self.config, self.device = model, target_model, config, device
        self.param_names = param_names
        weights: list[Any] = [target_model.get_submodule(name).weight for name in param_names]
        self.has_instances = hasattr(model, "n_instances")
        self.n_params = sum(w.numel() for w in weights) / (model.n_instances if self.has_instances else 1)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
        self._loss: Tensor | None = None
        topk, lp = config.topk, config.lp_sparsity_coeff
        if config.exact_topk and topk is not None:
            one = getattr(model, "n_instances", None) == 1
            _need(config.batch_topk and one, "exact_topk", "be false without batch_topk and one instance", True)
        if config.schatten_coeff is not None:
            _need(
                topk is not None or lp is not None,
                "topk",
                "be given, or lp_sparsity_coeff, with schatten_coeff",
                "nothing",
            )
        if config.act_recon_coeff is not None and of_residual_mlp(config):
            _need(topk is not None, "topk", "be given with act_recon_coeff of a residual MLP", "nothing")

    def _own(self, name: str) -> Any:
        """A function of the research code's as it is there now."""
        return getattr(sys.modules["spd.run_spd"], name)

    def prepare(self, lr: float) -> None:
        if self.config.unit_norm_matrices:
            self.model.set_As_to_unit_norm()
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)

    def evaluate(self, batch: Tensor, printed: bool, last: bool) -> Found:
        config, by_gradient = self.config, self.config.attribution_type == "gradient"
        with torch.set_grad_enabled(by_gradient):
            target_out, cache = self.target.run_with_cache(
                batch, names_filter=lambda key: key.endswith((".hook_pre", ".hook_post"))
            )
        pre, post = _of(cache, "hook_pre"), _of(cache, "hook_post")
        with torch.set_grad_enabled(not last):
            out, own = self._full(batch, printed)
            ranks_only = config.topk is not None and config.lp_sparsity_coeff is None
            with torch.set_grad_enabled(not last and not ranks_only):
                attributions = self._own("calculate_attributions")(
                    model=self.model, batch=batch, out=target_out if out is None else out, target_out=target_out,
                    pre_weight_acts=pre, post_weight_acts=post, component_acts=_of(own, "hook_component_acts"),
                    attribution_type=config.attribution_type,
                )  # fmt: skip
            wanted = {key: value.detach() for key, value in post.items()}
            return self._losses(batch, printed, target_out.detach(), wanted, out, _of(own, "hook_post"), attributions)

    def _full(self, batch: Tensor, printed: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The forward pass of all components, where something asks for it."""
        config = self.config
        hidden = config.topk is None and config.act_recon_coeff is not None
        counts = hidden or config.out_recon_coeff is not None
        if not (printed or counts or config.attribution_type != "gradient"):
            return None, {}
        suffixes = (".hook_post", ".hook_component_acts") if config.attribution_type == "activation" else ".hook_post"
        counts = counts or config.topk is None or config.lp_sparsity_coeff is not None
        with torch.set_grad_enabled(counts and torch.is_grad_enabled()):
            return self.model.run_with_cache(batch, names_filter=lambda key: key.endswith(suffixes))

    def _mask(self, batch: Tensor, attributions: Tensor) -> Tensor:
        config = self.config
        ranked = attributions[..., :-1] if config.distil_from_target else attributions
        topk = config.topk
        if config.exact_topk:
            topk = ((batch != 0).sum() / batch.shape[0]).item()
        mask = self._own("calc_topk_mask")(ranked, topk, batch_topk=config.batch_topk or config.exact_topk)
        return nn.functional.pad(mask, (0, 1), value=True) if config.distil_from_target else mask

    def _losses(
        self, batch: Tensor, printed: bool, target_out: Tensor, post: dict[str, Tensor], out: Tensor | None,
        hidden: dict[str, Tensor], attributions: Tensor,
    ) -> Found:  # fmt: skip
        config = self.config
        found: dict[str, Tensor] = {}
        if config.param_match_coeff is not None:
            found["param_match_loss"] = self._own("calc_param_match_loss")(
                param_names=self.param_names, target_model=self.target, spd_model=self.model, n_params=self.n_params,
                device=self.device,
            )  # fmt: skip
        mse = self._own("calc_recon_mse")
        if out is not None:
            found["out_recon_loss"] = mse(out, target_out, self.has_instances)
        per_component = mask = None
        if config.lp_sparsity_coeff is not None:
            per_component = self._own("calc_lp_sparsity_loss")(
                out=target_out, attributions=attributions, step_pnorm=config.pnorm
            )
            found["lp_sparsity_loss"] = per_component.sum(-1).mean(0)
        if config.topk is not None:
            mask = self._mask(batch, attributions)
            if config.topk_recon_coeff is not None or config.act_recon_coeff is not None:
                out, cache = self.model.run_with_cache(
                    batch, names_filter=lambda key: key.endswith(".hook_post"), topk_mask=mask
                )
                hidden = _of(cache, "hook_post")
            if config.topk_recon_coeff is not None:
                assert out is not None
                found["topk_recon_loss"] = mse(out, target_out, self.has_instances)
        if config.act_recon_coeff is not None:
            found["act_recon_loss"] = self._act_recon(post, hidden)
        if config.schatten_coeff is not None:
            modules: list[tuple[str, Any]] = [(n, m) for n, m in self.model.named_modules() if hasattr(m, "A")]
            found["schatten_loss"] = self._own("calc_schatten_loss")(
                As={name: m.A for name, m in modules}, Bs={name: m.B for name, m in modules},
                mask=per_component if mask is None else mask, p=config.schatten_pnorm or 1.0, n_params=self.n_params,
                device=self.device,
            )  # fmt: skip
        coefficients = {name: getattr(config, key) for name, (_, key) in TERMS.items()}
        weighted = [c * found[name].mean() for name, c in coefficients.items() if c is not None]
        self._loss = torch.stack([w.reshape(()) for w in weighted]).sum() if weighted else target_out.new_zeros(())
        if not printed:
            return Found({}, None, mask)
        return Found({n: found[n].detach() for n in TERMS if n in found}, self._loss.detach(), mask)

    def _act_recon(self, post: dict[str, Tensor], hidden: dict[str, Tensor]) -> Tensor:
        if of_residual_mlp(self.config):
            names = [f"layers.{i}.mlp_in.hook_post" for i in range(len(self.target.layers))]
            post, hidden = ({name: torch.relu(acts[name]) for name in names} for acts in (post, hidden))
        return self._own("calc_act_recon")(target_post_weight_acts=post, layer_acts=hidden)

    def descend(self) -> None:
        assert self._loss is not None
        assert not settings.as_reference, "the research code's own loop runs then"
        self._loss.backward()
        if self.config.unit_norm_matrices:
            self.model.fix_normalized_adam_gradients()
        self.optimiser.step()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]
