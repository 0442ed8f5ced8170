"""Models that nnsight wraps: decomposed as the modules they are, and traced before, after and once edited."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from fastapd import APD, Decomposition, Optimiser, decompose

try:
    from nnsight import NNsight
except ImportError as error:
    pytest.skip(f"nnsight cannot be imported: {error}", allow_module_level=True)


def _wrapped() -> tuple[Any, nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    layers = OrderedDict(first=nn.Linear(5, 8), act=nn.ReLU(), second=nn.Linear(8, 4))
    module = nn.Sequential(layers)
    return NNsight(module), module, [torch.randn(32, 5) for _ in range(4)]


def _traced(wrapped: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer writes, and the output."""
    with wrapped.trace(x):
        hidden = wrapped.first.output.save()
        output = wrapped.output.save()
    return hidden.detach(), output.detach()


def _decomposed(module: nn.Module, data: Any, steps: int = 200) -> Decomposition:
    settings: dict[str, Any] = {"method": APD(topk=2.0, simplicity=0.1), "log_every": 100, "rank": 2}
    return decompose(
        module, data, ["first", "second"], 6, steps=steps, optimiser=Optimiser(lr=1e-2, schedule="cosine"), **settings
    )


def test_a_module_that_nnsight_wraps_is_decomposed_and_stays_usable():
    wrapped, module, data = _wrapped()
    plain, before = module(data[0]).detach(), copy.deepcopy(module.state_dict())
    traced = _traced(wrapped, data[0])
    torch.testing.assert_close(traced[1], plain, rtol=0, atol=0)
    result = _decomposed(wrapped._module, data)
    assert result.model.target is module
    first, last = result.history[0], result.history[-1]
    assert last["total"] < 0.5 * first["total"] and last["faithfulness"] < 0.5 * first["faithfulness"]
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    again = _traced(wrapped, data[0])
    assert torch.equal(again[0], traced[0]) and torch.equal(again[1], traced[1])
    torch.testing.assert_close(result(data[0], active=torch.ones(6), residual=True), plain, rtol=1e-5, atol=1e-5)


def test_wrapping_by_nnsight_changes_no_number_of_a_decomposition():
    _, module, data = _wrapped()
    bare = nn.Sequential(OrderedDict((name, copy.deepcopy(child)) for name, child in module.named_children()))
    expected = _decomposed(bare, data, 20).history
    found = _decomposed(module, data, 20).history
    assert [row["total"] for row in found] == [row["total"] for row in expected]


def test_nnsight_traces_and_patches_an_edited_copy():
    wrapped, module, data = _wrapped()
    result = _decomposed(module, data)
    x, scale = data[0], {1: 0.0, 4: -1.0}
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, -1.0, 1.0])
    edited = result.edited(scale)
    hidden, output = _traced(NNsight(edited), x)
    torch.testing.assert_close(output, result(x, active=weights, residual=True), rtol=1e-5, atol=1e-5)
    parts = result.parts("first")[0]
    expected = module.get_submodule("first")(x) - x @ (parts[1] + 2 * parts[4])
    torch.testing.assert_close(hidden, expected.detach(), rtol=1e-5, atol=1e-5)
    assert (output - module(x)).abs().max() > 1e-2
    again = NNsight(edited)
    with again.trace(x):
        again.first.output[:] = 0
        patched = again.output.save()
    torch.testing.assert_close(patched, edited.get_submodule("second").bias.expand(32, 4), rtol=1e-6, atol=1e-6)
    kept = _traced(wrapped, x)[1]  # the model itself is as it was
    torch.testing.assert_close(kept, module(x).detach(), rtol=0, atol=0)


def test_gpt2_in_nnsight_is_decomposed_where_transformers_is_installed():
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        pytest.skip(f"transformers cannot be imported: {error}")
    torch.manual_seed(0)
    sizes: Any = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": 30,
        "n_positions": 16,
        "initializer_range": 0.2,
    }
    module = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    wrapped, ids = NNsight(module), torch.randint(0, 30, (2, 6))

    def traced(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with model.trace(input_ids=ids):
            inner = model.transformer.h[0].mlp.c_fc.output.save()
            logits = model.lm_head.output.save()
        return inner.detach(), logits.detach()

    before = traced(wrapped)
    method = APD(topk=3.0, distance="kl", attribution_probes=4, simplicity=0.1)
    result = decompose(module, [{"input_ids": ids}], ["transformer.h.*.mlp.c_fc"], 8, method=method, steps=20)
    after = traced(wrapped)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    edited = traced(NNsight(result.edited({2: 0.0})))
    moved = before[0] - edited[0]
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(
        edited[1], result({"input_ids": ids}, active=1.0 - torch.eye(8)[2], residual=True), rtol=1e-4, atol=1e-5
    )
