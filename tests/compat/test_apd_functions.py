"""Every function that `patch` replaces against the research code's own: values, gradients, shapes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastapd.compat import _apd_attributions, _apd_patch


def _both(spd: Any, patched: Any, name: str, call: Any, **flags: Any) -> tuple[Any, Any]:
    theirs = call(getattr(spd, name))
    with patched(**flags):
        assert getattr(spd, name) is not None
        return call(getattr(spd, name)), theirs


def _close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max() + 1e-30)
    )


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    cotangent = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return [
        torch.zeros_like(leaf) if g is None else g
        for leaf, g in zip(leaves, torch.autograd.grad(value, leaves, cotangent, allow_unused=True), strict=True)
    ]


def _compare(spd: Any, patched: Any, name: str, call: Any, leaves: list[Tensor]) -> None:
    """Values and gradients of a function of leaves."""

    def run(function: Any) -> Any:
        value = call(function)
        return value, _gradients(value, leaves)

    (ours, our_grads), (theirs, their_grads) = _both(spd, patched, name, run)
    _close(ours, theirs)
    for a, b in zip(our_grads, their_grads, strict=True):
        _close(a, b, 1e-4)


def test_every_replaced_function_keeps_its_signature(spd, patched):
    before = {name: getattr(spd, name) for names in _apd_patch._FUNCTIONS.values() for name in names}
    with patched():
        for name, old in before.items():
            new = getattr(spd, name)
            assert new is not old
            ours, theirs = inspect.signature(new).parameters, inspect.signature(old).parameters
            assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
            assert inspect.getdoc(new)


def _network(instances: bool) -> dict[str, Any]:
    """Two layers with a nonlinearity between them: what attributions want, with or without instances."""
    n = (3,) if instances else ()
    W1, W2 = torch.randn(*n, 5, 4), torch.randn(*n, 4, 6)
    x = torch.randn(7, *n, 5)
    mul = "bni,nio->bno" if instances else "bi,io->bo"
    post1 = torch.einsum(mul, x, W1).requires_grad_()
    pre2 = torch.tanh(post1)
    post2 = torch.einsum(mul, pre2, W2)
    factors = {
        name: (torch.randn(*n, 8, d_in, 2).requires_grad_(), torch.randn(*n, 8, 2, d_out).requires_grad_())
        for name, d_in, d_out in (("first", 5, 4), ("second", 4, 6))
    }
    return {
        "target_out": torch.relu(post2) + post2.pow(2),
        "pre_weight_acts": {"first.hook_pre": x, "second.hook_pre": pre2},
        "post_weight_acts": {"first.hook_post": post1, "second.hook_post": post2},
        "factors": factors,
    }


@pytest.mark.parametrize("instances", [False, True])
@pytest.mark.parametrize("parts", [False, True])
def test_calc_grad_attributions(spd, patched, monkeypatch, instances, parts):
    if parts:  # a few outputs, a few samples at a time
        monkeypatch.setattr(_apd_attributions, "MOST_ENTRIES", 200)
    network = _network(instances)
    factors = network.pop("factors")
    leaves = [t for pair in factors.values() for t in pair]

    def call(function: Any) -> Tensor:
        return function(**network, component_weights={name: A @ B for name, (A, B) in factors.items()}, C=8)

    _compare(spd, patched, "calc_grad_attributions", call, leaves)


def test_calc_grad_attributions_of_a_target_that_cannot_be_batched(spd, patched):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            assert float(grads[0].sum()) > -1e9  # reads a value, as vmap does not allow
            return 2 * x * grads[0]

    network = _network(True)
    factors = network.pop("factors")
    network["target_out"] = Square.apply(network["target_out"])

    def call(function: Any) -> Tensor:
        return function(**network, component_weights={name: A @ B for name, (A, B) in factors.items()}, C=8)

    ours, theirs = _both(spd, patched, "calc_grad_attributions", call)
    _close(ours, theirs)


@pytest.mark.parametrize("kind", ["gradient", "activation"])
@pytest.mark.parametrize("model", ["tms", "tms-hidden", "mlp"])
def test_calculate_attributions(spd, patched, kind, model):
    pair = {"tms": spd.tms, "tms-hidden": lambda: spd.tms(hidden=2), "mlp": lambda: spd.mlp(n=2)}[model]()
    batch = torch.rand(9, 2, 6 if model == "mlp" else 5)
    leaves = [p for p in pair[0].parameters() if p.requires_grad]

    def call(function: Any) -> Tensor:
        return function(**spd.caches(*pair, batch), attribution_type=kind)

    _compare(spd, patched, "calculate_attributions", call, leaves)


def test_calculate_attributions_uses_a_gradient_that_somebody_else_put_there(spd, patched):
    model, target = spd.tms()
    arguments = spd.caches(model, target, torch.rand(3, 2, 5))
    with patched(), pytest.MonkeyPatch.context() as monkey:
        own = spd.calc_grad_attributions
        monkey.setattr(spd.modules["utils"], "calc_grad_attributions", lambda **k: own(**k) + 1)
        changed = spd.calculate_attributions(**arguments, attribution_type="gradient")
    with patched():
        _close(changed, spd.calculate_attributions(**arguments, attribution_type="gradient") + 1)


def test_calculate_attributions_refuses_another_type(spd, patched):
    arguments = spd.caches(*spd.tms(), torch.rand(3, 2, 5))
    with patched(), pytest.raises(ValueError, match=r"attribution_type must be .*, got 'other'"):
        spd.calculate_attributions(**arguments, attribution_type="other")


def test_calc_ablation_attributions_is_what_the_research_code_means(spd, patched):
    model, _ = spd.tms()
    batch = torch.rand(4, 2, 5)
    out = model(batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with patched():
        found = spd.calc_ablation_attributions(model, batch, out)
    for c in range(model.C):
        mask = torch.ones(4, 2, model.C, dtype=torch.bool)
        mask[..., c] = False
        _close(found[..., c], ((out - model(batch, topk_mask=mask)) ** 2).mean(-1).detach(), 1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_calc_ablation_attributions_restores_the_model_when_it_fails(spd, patched):
    model, _ = spd.tms()
    before = model.linear1.A.detach().clone()
    with patched(), pytest.raises(RuntimeError):
        spd.calc_ablation_attributions(model, torch.rand(4, 2, 99), torch.rand(4, 2, 5))
    assert torch.equal(model.linear1.A, before)


@pytest.mark.parametrize("n", [None, 2])
def test_collect_subnetwork_attributions(spd, patched, n):
    pair = spd.tms()
    if n is None:
        pair = spd.mlp(n=1)
    ours, theirs = _both(
        spd, patched, "collect_subnetwork_attributions", lambda f: f(*pair, device="cpu", n_instances=n or 1)
    )
    _close(ours, theirs)


@pytest.mark.parametrize("shape", [(9, 4), (9, 3, 4)])
@pytest.mark.parametrize(("topk", "batch_topk"), [(1.5, True), (0.0, True), (4.0, True), (2, False), (4.0, False)])
def test_calc_topk_mask(spd, patched, shape, topk, batch_topk):
    scores = torch.randn(shape)
    ours, theirs = _both(spd, patched, "calc_topk_mask", lambda f: f(scores, topk, batch_topk=batch_topk))
    assert ours.dtype is torch.bool
    assert torch.equal(ours, theirs)


def test_calc_topk_mask_of_whole_numbers(spd, patched):
    scores = torch.randperm(36).view(9, 4)
    ours, theirs = _both(spd, patched, "calc_topk_mask", lambda f: f(scores, 1.5, True))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch", [49, 100, 256, 1000])
def test_calc_topk_mask_takes_as_many_as_the_float32_quotient_meant(spd, patched, batch):
    scores = torch.rand(batch, 4)
    for count in range(0, 3 * batch, 7):
        quotient = (torch.tensor(count) / batch).item()
        ours, theirs = _both(spd, patched, "calc_topk_mask", lambda f, q=quotient: f(scores, q, batch_topk=True))
        assert int(ours.sum()) == count
        again, _ = _both(
            spd, patched, "calc_topk_mask", lambda f, q=quotient: f(scores, q, batch_topk=True), as_reference=True
        )
        assert torch.equal(again, theirs)


def test_calc_topk_mask_leaves_a_topk_of_a_config_as_it_is(spd, patched):
    assert int(0.29 * 100) == 28
    ours, theirs = _both(spd, patched, "calc_topk_mask", lambda f: f(torch.rand(100, 4), 0.29, batch_topk=True))
    assert int(ours.sum()) == int(theirs.sum()) == 28


@pytest.mark.parametrize("shape", [(7, 4), (7, 3, 4)])
def test_calc_recon_mse(spd, patched, shape):
    output, labels = torch.randn(shape, requires_grad=True), torch.randn(shape)
    _compare(spd, patched, "calc_recon_mse", lambda f: f(output, labels, len(shape) == 3), [output])


def test_calc_recon_mse_refuses_other_axes(spd, patched):
    with patched(), pytest.raises(ValueError, match="has_instance_dim must be true"):
        spd.calc_recon_mse(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with patched(), pytest.raises(ValueError, match="output must have 2 or 3 axes, got 1"):
        spd.calc_recon_mse(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize(("as_reference", "expected"), [(False, False), (True, True)])
def test_losses_leave_the_target_alone_unless_as_the_reference(spd, patched, as_reference, expected):
    model, target = spd.tms()
    with patched(as_reference=as_reference):
        out = target(torch.rand(3, 2, 5))
        loss = spd.calc_recon_mse(model(torch.rand(3, 2, 5)), out, True).sum()
        loss = loss + spd.calc_param_match_loss(["linear1"], target, model, 20, "cpu").sum()
        loss = loss + spd.calc_act_recon({"a": out}, {"a": model(torch.rand(3, 2, 5))}).sum()
        loss.backward()
    assert (target.linear1.weight.grad is not None) is expected


@pytest.mark.parametrize("instances", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float", "long"])
@pytest.mark.parametrize("p", [0.5, 0.9, 1.0, 2.0])
def test_calc_schatten_loss(spd, patched, instances, kind, p):
    n = (3,) if instances else ()
    As = {k: torch.randn(*n, 6, d, 2, requires_grad=True) for k, d in (("a", 5), ("b", 4))}
    Bs = {k: torch.randn(*n, 6, 2, d, requires_grad=True) for k, d in (("a", 4), ("b", 5))}
    mask = torch.rand(8, *n, 6)
    leaves = [*As.values(), *Bs.values()]
    if kind == "float":
        leaves.append(mask.requires_grad_())
    else:
        mask = (mask > 0.6).to(torch.bool if kind == "bool" else torch.int64)
    _compare(spd, patched, "calc_schatten_loss", lambda f: f(As, Bs, mask, p, 12.5, "cpu"), leaves)


@pytest.mark.parametrize("model", ["tms", "mlp"])
def test_calc_param_match_loss(spd, patched, model):
    pair = spd.tms() if model == "tms" else spd.mlp()
    names = ["linear1", "linear2"] if model == "tms" else ["layers.0.mlp_in", "layers.1.mlp_out"]
    leaves = [p for p in pair[0].parameters() if p.requires_grad]
    _compare(spd, patched, "calc_param_match_loss", lambda f: f(names, pair[1], pair[0], 21.0, "cpu"), leaves)


@pytest.mark.parametrize("shape", [(7, 4), (7, 3, 4)])
def test_calc_lp_sparsity_loss(spd, patched, shape):
    out, attributions = torch.randn(*shape[:-1], 5), torch.rand(shape, requires_grad=True)
    _compare(spd, patched, "calc_lp_sparsity_loss", lambda f: f(out, attributions, 0.9), [attributions])


@pytest.mark.parametrize("n", [(), (3,)])
def test_calc_act_recon(spd, patched, n):
    target = {"a": torch.randn(7, *n, 4), "b": torch.randn(7, *n, 6)}
    acts = {k: torch.randn_like(v).requires_grad_() for k, v in target.items()}
    _compare(spd, patched, "calc_act_recon", lambda f: f(target, acts), list(acts.values()))
    with patched(), pytest.raises(ValueError, match="target_post_weight_acts must name the layers"):
        spd.calc_act_recon({"a": target["a"]}, acts)


@pytest.mark.parametrize("n", [None, 3])
@pytest.mark.parametrize("mask", ["none", "sparse", "dense", "float", "empty"])
@pytest.mark.parametrize("hooked", [False, True])
def test_linear_component_forward(spd, patched, n, mask, hooked):
    layer = spd.modules["models.components"].LinearComponent(5, 4, C=8, n_instances=n, m=2)
    axes = () if n is None else (n,)
    x = torch.randn(6, *axes, 5, requires_grad=True)
    scores = torch.rand(6, *axes, 8)
    given = {"none": None, "float": scores, "sparse": scores < 0.1, "dense": scores < 0.7, "empty": scores < -1}[mask]
    leaves = [x, layer.A, layer.B]
    seen: list[Tensor] = []
    for point in (layer.hook_pre, layer.hook_post, *([layer.hook_component_acts] if hooked else [])):
        point.add_hook(lambda t, hook: seen.append(t))

    def run() -> Any:
        y = layer(x, topk_mask=given)
        return y, _gradients(y, leaves)

    (theirs, their_grads), their_seen = run(), seen[:]
    seen.clear()
    with patched():
        ours, our_grads = run()
        _close(layer.weight, torch.einsum("...cim,...cmo->...io", layer.A, layer.B))
    _close(ours, theirs)
    for a, b in [*zip(our_grads, their_grads, strict=True), *zip(seen, their_seen, strict=True)]:
        _close(a, b, 1e-4)


@pytest.mark.parametrize("axes", [(6, 3, 5), (2, 6, 3, 5)])
def test_linear_component_forward_broadcasts_as_einsum_does(spd, patched, axes):
    layer = spd.modules["models.components"].LinearComponent(5, 4, C=8, m=2)
    x = torch.randn(axes)
    theirs = layer(x)
    with patched():
        _close(layer(x), theirs)


def test_linear_component_forward_refuses_a_mask_of_another_shape(spd, patched):
    layer = spd.modules["models.components"].LinearComponent(5, 4, C=8, m=2)
    with patched(), pytest.raises(ValueError, match=r"topk_mask must have shape \[6, 8\]"):
        layer(torch.randn(6, 5), topk_mask=torch.ones(6, 7, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["gradient", "activation"])
@pytest.mark.parametrize("distil", [False, True])
def test_run_spd_forward_pass(spd, patched, kind, distil):
    pair, batch = spd.mlp(n=2), torch.rand(9, 2, 6)
    ours, theirs = _both(
        spd, patched, "run_spd_forward_pass", lambda f: f(*pair, batch, kind, True, 1.5, distil_from_target=distil)
    )
    assert ours._fields == theirs._fields
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        if isinstance(b, dict):
            assert list(a) == list(b), name
            for key, value in b.items():
                _close(a[key], value)
        elif b.dtype is torch.bool:
            assert torch.equal(a, b)
        else:
            _close(a, b)


def test_set_As_to_unit_norm(spd, patched):
    pair = spd.tms()[0], spd.tms()[0]
    pair[0].set_As_to_unit_norm()
    with patched():
        pair[1].set_As_to_unit_norm()
        _close(pair[1].linear1.A, pair[0].linear1.A)
        pair[1].linear1.A.data[0, 0, :, 0] = 0
        pair[1].set_As_to_unit_norm()
        assert not pair[1].linear1.A[0, 0, :, 0].any()
        assert pair[1].linear1.A.isfinite().all()
