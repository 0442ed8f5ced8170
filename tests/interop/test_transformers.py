"""A language model of Hugging Face's, as it comes: its MLPs are decomposed with every token a sample."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fastapd import APD, Optimiser, _plan, decompose

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError as error:
    pytest.skip(f"transformers cannot be imported: {error}", allow_module_level=True)

MLPS = ["transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj"]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config: Any = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, initializer_range=0.2)
    return GPT2LMHeadModel(config).train()


@pytest.fixture
def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 50, (4, 8), generator=generator)} for _ in range(4)]


@pytest.mark.parametrize("probes", [None, 8])
def test_mlps_of_gpt2_are_decomposed(model, data, probes):
    before = copy.deepcopy(model.state_dict())
    method = APD(topk=4.0, distance="kl", attribution_probes=probes, simplicity=0.1)
    optimiser = Optimiser(lr=5e-3, schedule="cosine")
    result = decompose(model, data, MLPS, 12, method=method, optimiser=optimiser, steps=150, log_every=50, device="cpu")
    first, last = result.history[0], result.history[-1]
    assert last["total"] < 0.5 * first["total"] and last["faithfulness"] < 0.5 * first["faithfulness"]
    assert result.model.target is model and model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    step, masked = result.select(data[0])
    assert step.attributions.shape == (1, 32, 12) and masked.output.shape == (4, 8, 50)
    text = "\n".join(_plan.describe(result.model, data[0], method))
    assert ("8 random directions" if probes else "exact, 128 vector-Jacobian products") in text  # 8 positions of 16
    assert "before the last, wide matrix" in text


def test_attributions_do_not_depend_on_where_the_output_is_taken(model, data):
    """The head is wider than what it gets: gradients before it, and of the logits themselves."""
    from fastapd.attributions import gradient_attributions

    result = decompose(model.double(), data, MLPS, 5, rank=3, steps=1, device="cpu")
    record = result.model.record_target(data[0], differentiable=True)
    assert record.measured is not None
    found = gradient_attributions(result.model, record)
    record = result.model.record_target(data[0], differentiable=True)
    expected = gradient_attributions(result.model, record._replace(measured=None))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_tied_embedding_and_head_of_gpt2(model, data):
    method = APD(topk=4.0, distance="kl", attribution_probes=8, simplicity=0.0)
    optimiser = Optimiser(lr=1e-2, schedule="cosine")
    held = model.transformer.wte.weight.detach().clone()
    layers = ["transformer.wte", "lm_head"]
    settings: dict[str, Any] = {"method": method, "optimiser": optimiser, "steps": 60, "log_every": 60}
    result = decompose(model, data, layers, 6, device="cpu", **settings)
    assert result.model.components.ties == {"lm_head": "transformer.wte"}
    assert result.history[-1]["faithfulness"] < 0.5 * result.history[0]["faithfulness"]
    # one matrix in two places: the head's is the transpose, and so are its components
    torch.testing.assert_close(result.parts("lm_head"), result.parts("transformer.wte").mT, rtol=0, atol=0)
    assert model.lm_head.weight is model.transformer.wte.weight and torch.equal(model.lm_head.weight, held)
    x = {"input_ids": data[0]["input_ids"]}
    torch.testing.assert_close(
        result(x, active=torch.ones(6), residual=True), model.eval()(**x).logits.detach(), rtol=1e-5, atol=1e-5
    )


def test_tied_embedding_and_head_of_gpt2_are_edited_as_one(model, data):
    result = decompose(model, data, ["transformer.wte", "lm_head"], 6, rank=3, steps=1)
    scale, weights = {0: 0.0, 4: -2.0}, torch.tensor([0.0, 1.0, 1.0, 1.0, -2.0, 1.0])
    state = result.state_dict(scale=scale)
    assert set(state) == set(model.state_dict())
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    new: Any = GPT2LMHeadModel(model.config)
    loaded = new.load_state_dict(state, strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert new.lm_head.weight is new.transformer.wte.weight  # still tied
    parts = result.parts("transformer.wte")[0]
    expected = model.transformer.wte.weight.detach() - parts[0] - 3 * parts[4]
    torch.testing.assert_close(new.transformer.wte.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    x = {"input_ids": data[0]["input_ids"]}
    found = new.eval()(**x).logits.detach()
    torch.testing.assert_close(found, result(x, active=weights, residual=True), rtol=1e-4, atol=1e-5)
    assert (found - model.eval()(**x).logits).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"name layers among transformer\.wte, got \['lm_head'\]"):
        result.state_dict(scale={"lm_head": {0: 0.0}})


@pytest.mark.parametrize("how", ["load_state_dict", "save_pretrained"])
def test_edited_mlps_are_loaded_by_the_class_of_hugging_face(model, data, how, tmp_path):
    result = decompose(model, data, MLPS, 6, rank=3, steps=20)
    scale, weights = {"transformer.h.1.mlp.c_proj": {2: 0.0}}, 1.0 - torch.eye(6)[2]
    if how == "load_state_dict":
        new: Any = GPT2LMHeadModel(model.config)
        new.load_state_dict(result.state_dict(scale=scale), strict=True)
    else:
        edited: Any = result.edited(scale)
        edited.save_pretrained(tmp_path)
        new = GPT2LMHeadModel.from_pretrained(tmp_path)
    x = {"input_ids": data[0]["input_ids"]}
    found = new.eval()(**x).logits.detach()
    said = result(x, active={"transformer.h.1.mlp.c_proj": weights}, residual=True)
    torch.testing.assert_close(found, said, rtol=1e-4, atol=1e-5)
    assert (found - model.eval()(**x).logits).abs().max() > 1e-3
    own, its = model.state_dict(), new.state_dict()
    assert {name for name in own if not torch.equal(own[name], its[name])} == {"transformer.h.1.mlp.c_proj.weight"}


@pytest.mark.parametrize("probes, chunk_bytes", [(None, 1 << 28), (None, 1 << 25), (32, 1 << 28)])
def test_the_plan_says_what_the_gradients_of_gpt2_hold(probes, chunk_bytes, monkeypatch):
    from torch.profiler import ProfilerActivity, profile

    from fastapd import attributions

    monkeypatch.setattr(attributions, "CHUNK_BYTES", chunk_bytes)
    config: Any = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=500, n_positions=32)
    x = {"input_ids": torch.randint(0, 500, (4, 8))}
    model = decompose(GPT2LMHeadModel(config), [x], MLPS, 20, rank=4, steps=1, device="cpu").model
    record = model.record_target(x, differentiable=True)
    said = attributions.route(record, probes, 20).n_bytes
    assert said <= chunk_bytes
    # as in a step: only the Lp form differentiates through attributions, and keeps the gradients of all chunks for it
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attributions.gradient_attributions(model, record, probes=probes)
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert 0.8 * peak <= said <= 1.2 * peak
