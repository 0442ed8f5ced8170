"""TransformerLens: the MLPs of a `HookedTransformer`, whose matrices are parameters and no layers, and of a bridge.

Version 4 has no `HookedTransformer`, and version 3 no bridge to a model that is not downloaded: what is not there is
skipped.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastapd import APD, Decomposition, Optimiser, decompose

try:
    import transformer_lens
except ImportError as error:
    pytest.skip(f"transformer_lens cannot be imported: {error}", allow_module_level=True)

lens: Any = transformer_lens
MATRICES = ["blocks.*.mlp.W_in", "blocks.*.mlp.W_out"]
NAMES = [f"blocks.{layer}.mlp.{matrix}" for layer in (0, 1) for matrix in ("W_in", "W_out")]


# random weights, large enough for the MLPs to matter
SIZES = {
    "n_layers": 2, "d_model": 16, "d_head": 8, "d_mlp": 32, "n_heads": 2, "d_vocab": 20, "n_ctx": 8, "act_fn": "gelu",
    "device": "cpu", "seed": 0, "init_weights": True, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    try:
        kind, config = lens.HookedTransformer, lens.HookedTransformerConfig
    except (ImportError, AttributeError) as error:
        pytest.skip(f"transformer_lens has no HookedTransformer: {error}")
    return kind(config(**SIZES))


@pytest.fixture
def bridge() -> Any:
    torch.manual_seed(0)
    try:
        from transformer_lens.model_bridge.sources import native  # type: ignore[attr-defined]
    except ImportError as error:
        pytest.skip(f"transformer_lens bridges to no model without a download: {error}")
    return native.boot(dict(SIZES))


@pytest.fixture
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 20, (4, 8), generator=generator) for _ in range(4)]


def _decomposed(model: Any, data: Any, targets: Any = MATRICES, **settings: Any) -> Decomposition:
    method = APD(topk=4.0, distance="kl", simplicity=0.1)
    settings = {"method": method, "optimiser": Optimiser(lr=5e-3, schedule="cosine"), "log_every": 50} | settings
    return decompose(model, data, targets, 12, **settings)


def _counting(model: Any) -> list[str]:
    """Where permanent hooks of a test have been."""
    seen: list[str] = []
    for name in ("blocks.0.mlp.hook_pre", "blocks.1.hook_mlp_out"):
        model.add_perma_hook(name, lambda value, hook: seen.append(hook.name))
    return seen


def test_mlps_of_a_hooked_transformer_are_decomposed(model, data):
    seen = _counting(model)
    before, modules = copy.deepcopy(model.state_dict()), [set(vars(m)) for m in model.modules()]
    hooks = [tuple(m._forward_hooks) for m in model.modules()]
    logits, cached = model.run_with_cache(data[0])
    result = _decomposed(model, data, steps=150)
    assert [site.name for site in result.model.sites] == NAMES
    first, last = result.history[0], result.history[-1]
    assert last["total"] < 0.5 * first["total"] and last["faithfulness"] < 0.5 * first["faithfulness"]
    step, masked = result.select(data[0])
    assert step.attributions.shape == (1, 32, 12) and masked.output.shape == (4, 8, 20)  # every token is a sample

    torch.testing.assert_close(result(data[0]), logits, rtol=0, atol=1e-5)
    every = torch.ones(12)
    torch.testing.assert_close(result(data[0], active=every, residual=True), logits, rtol=1e-5, atol=1e-5)
    assert (result(data[0], active=[0], residual=False) - logits).abs().max() > 0.1  # components are what runs

    assert result.model.target is model and model.training
    assert set(seen) == {"blocks.0.mlp.hook_pre", "blocks.1.hook_mlp_out"}  # while it was decomposed, too
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [set(vars(m)) for m in model.modules()] == modules
    assert [tuple(m._forward_hooks) for m in model.modules()] == hooks
    again, cache = model.run_with_cache(data[0])
    assert torch.equal(again, logits) and all(torch.equal(cache[name], cached[name]) for name in cached)


@pytest.mark.parametrize("way", ["edited", "state_dict"])
def test_hooks_see_the_edited_weights_of_a_hooked_transformer(model, data, way):
    result = _decomposed(model, data, steps=30)
    scale = {"blocks.0.mlp.W_in": {3: 0.0, 5: -1.0}}
    if way == "edited":
        changed: Any = result.edited(scale)
        assert type(changed) is type(model)
    else:
        changed = type(model)(model.cfg)
        assert changed.load_state_dict(result.state_dict(scale), strict=True).missing_keys == []
    logits, cache = model.run_with_cache(data[0])
    new, edited = changed.run_with_cache(data[0])
    # the first layer's input is as before, and what its matrix writes is that without component 3 and with 5 turned
    x = cache["blocks.0.ln2.hook_normalized"]
    torch.testing.assert_close(edited["blocks.0.ln2.hook_normalized"], x, rtol=0, atol=0)
    parts = result.parts("blocks.0.mlp.W_in")[0]
    moved = x @ (parts[3] + 2 * parts[5])
    assert moved.abs().max() > 1e-3
    torch.testing.assert_close(
        edited["blocks.0.mlp.hook_pre"], cache["blocks.0.mlp.hook_pre"] - moved, rtol=1e-5, atol=1e-5
    )
    weights = torch.ones(12)
    weights[3], weights[5] = 0.0, -1.0
    said = result(data[0], active={"blocks.0.mlp.W_in": weights}, residual=True)
    torch.testing.assert_close(new, said, rtol=1e-4, atol=1e-5)
    assert (new - logits).abs().max() > 1e-3


def test_hooks_of_a_hooked_transformer_see_the_components_that_run(model, data):
    """`run_with_hooks` has its hooks in place for a call; a permanent hook sees what the components write."""
    result = _decomposed(model, data, steps=1)
    held: list[torch.Tensor] = []
    model.add_perma_hook("blocks.0.mlp.hook_pre", lambda value, hook: held.append(value.detach()))
    _, cache = model.run_with_cache(data[0])
    held.clear()
    result(data[0], active={"blocks.0.mlp.W_in": [2]}, residual=False)
    only = cache["blocks.0.ln2.hook_normalized"] @ result.parts("blocks.0.mlp.W_in")[0, 2] + model.blocks[0].mlp.b_in
    torch.testing.assert_close(held[-1], only, rtol=1e-5, atol=1e-5)


# ---- version 4: layers behind a bridge, whose state dict has other names than its modules

LAYERS = ["blocks.*.mlp.*fc_in._original_component", "blocks.*.mlp.*fc_out._original_component"]


def test_mlps_behind_a_bridge_are_decomposed(bridge, data):
    before = {name: t.clone() for name, t in bridge.state_dict().items()}
    logits, cached = bridge.run_with_cache(data[0])
    result = _decomposed(bridge, data, LAYERS, steps=150)
    assert [site.name.split("._")[0] for site in result.model.sites] == ["blocks.0"] * 2 + ["blocks.1"] * 2
    first, last = result.history[0], result.history[-1]
    assert last["total"] < 0.5 * first["total"] and last["faithfulness"] < 0.5 * first["faithfulness"]
    torch.testing.assert_close(
        result(data[0], active=torch.ones(12), residual=True), logits.detach(), rtol=1e-5, atol=1e-5
    )
    assert (result(data[0], active=[0], residual=False) - logits).abs().max() > 0.1
    assert all(torch.equal(t, before[name]) for name, t in bridge.state_dict().items())
    again, cache = bridge.run_with_cache(data[0])
    assert torch.equal(again, logits) and all(torch.equal(cache[name], cached[name]) for name in cached)


@pytest.mark.parametrize("way", ["edited", "state_dict"])
def test_hooks_see_the_edited_weights_behind_a_bridge(bridge, data, way):
    result = _decomposed(bridge, data, LAYERS, steps=30)
    layer = next(site.name for site in result.model.sites)
    scale, weights = {layer: {3: 0.0, 5: -1.0}}, torch.ones(12)
    weights[3], weights[5] = 0.0, -1.0
    logits, cache = bridge.run_with_cache(data[0])
    if way == "edited":
        changed: Any = result.edited(scale)
    else:
        from transformer_lens.model_bridge.sources import native  # type: ignore[attr-defined]

        changed = native.boot(SIZES | {"seed": 1})
        changed.load_state_dict(result.state_dict(scale), strict=True)
    new, edited = changed.run_with_cache(data[0])
    parts = result.parts(layer)[0]
    moved = cache["blocks.0.mlp.hook_in"] @ (parts[3] + 2 * parts[5])
    assert moved.abs().max() > 1e-3
    expected = cache["blocks.0.mlp.hook_pre"] - moved
    torch.testing.assert_close(edited["blocks.0.mlp.hook_pre"], expected, rtol=1e-4, atol=1e-5)
    said = result(data[0], active={layer: weights}, residual=True)
    torch.testing.assert_close(new.detach(), said, rtol=1e-4, atol=1e-5)
    assert torch.equal(bridge(data[0]), logits)
