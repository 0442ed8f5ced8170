"""Decompose the MLPs of a GPT-2: every token is a sample, and outputs are compared by KL divergence.

    python examples/gpt2_mlps.py

Needs transformers and says so where it is missing; nothing is downloaded. The model is Hugging Face's own class, two
layers small and trained here for some seconds, so expect numbers and no discoveries. For pretrained weights replace
`make_model` by `GPT2LMHeadModel.from_pretrained(...)` and `batch` by tokens of text.
"""

import torch

import fastapd

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError as error:
    print(f"transformers cannot be imported, so there is nothing to decompose: {error}")
    raise SystemExit(0) from None

TOKENS, LENGTH = 16, 8
torch.manual_seed(0)
order = torch.randperm(TOKENS)  # the language: after token t comes order[t], except that one in four is noise


def batch(size: int = 16) -> dict[str, torch.Tensor]:
    ids = [torch.randint(0, TOKENS, (size,))]
    for _ in range(LENGTH - 1):
        noise = torch.rand(size) < 0.25
        ids.append(torch.where(noise, torch.randint(0, TOKENS, (size,)), order[ids[-1]]))
    return {"input_ids": torch.stack(ids, 1)}  # a dict is the arguments of the model's forward, by name


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """In nats."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def make_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        x = batch(32)
        loss = next_token_loss(model(**x).logits, x["input_ids"])
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval()


model = make_model()
test = batch(64)

# ---- decompose: c_fc and c_proj of both blocks, 24 components that each have a part in all four matrices


def data():
    while True:
        yield batch()


pd = fastapd.decompose(
    model,
    data(),
    targets=["transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj"],
    C=24,
    rank=4,
    steps=400,
    # A component is active on a token, not on a text. Exact attributions need the gradient of every output that a token
    # reaches; eight random directions estimate the same sum of squares without bias, at a fixed cost.
    method=fastapd.APD(topk=3.0, distance="kl", attribution_probes=8, simplicity=0.01),
    optimiser=fastapd.Optimiser(lr=1e-2, schedule="cosine", warmup=0.05),
)
print(pd)

# ---- is it any good?

numbers = pd.metrics(test)
columns = ("faithfulness", "reconstruction", "reconstruction_all", "l0", "alive")
print(f"{'':8}", *(f"{column:>18}" for column in columns))
for name, row in ({"fastapd": numbers} | numbers["baselines"]).items():
    print(f"{name:8}", *(f"{row[column]:18.3g}" for column in columns))

# How much is there to explain? The loss of the model, of what the method selects, and of it without any component in
# its MLPs (their biases stay).
selection, masked = pd.select(test)
outputs = {
    "the model": pd(test),
    "selected components": masked.output,
    "no components": pd(test, active=[], residual=False),
}
for name, output in outputs.items():
    print(f"next-token loss of {name}: {next_token_loss(output, test['input_ids']):.3f}")

# ---- which components does a token use? Averages over all places where it stands.

attributions = pd.attributions(test)[0]  # [tokens of the batch, component]
tokens = test["input_ids"].flatten()
for token in range(4):
    share = attributions[tokens == token].mean(0)
    most = share.argsort(descending=True)[:3].tolist()
    print(f"token {token:2}:", ", ".join(f"component {c} {share[c] / share.sum():.0%}" for c in most))

# ---- edit and export: Hugging Face's class loads it strictly

strongest = int(attributions.mean(0).argmax())
edited = GPT2LMHeadModel(model.config)
edited.load_state_dict(pd.state_dict(scale={strongest: 0.0}), strict=True)
with torch.no_grad():
    loss = next_token_loss(edited.eval()(**test).logits, test["input_ids"])
print(f"next-token loss of the model without component {strongest}: {loss:.3f}")
