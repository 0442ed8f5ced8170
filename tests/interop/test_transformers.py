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
    pytest.skip(f"transformers is not installed: {error}", allow_module_level=True)

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
    result = decompose(model, data, ["transformer.wte", "lm_head"], 6, steps=20, log_every=20, device="cpu")
    assert result.model.components.ties == {"lm_head": "transformer.wte"}
    assert result.history[-1]["faithfulness"] < result.history[0]["faithfulness"]


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
