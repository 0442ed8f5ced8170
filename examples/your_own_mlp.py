"""Decompose a network of your own: train it, decompose it, see whether that worked, ablate, edit, save.

    python examples/your_own_mlp.py

The network computes |x_i| of six numbers at once. Most of them are zero on any one input, so a mechanism for each of
the six is the decomposition that we hope for, and as we know it, we can tell whether we got it. docs/tutorial.md goes
through this file section by section. It writes abs.safetensors into the current directory.
"""

import torch
from torch import nn

import fastapd

# ---- 1. train or load your model

N, SHARE = 6, 0.15  # so many features, each of them there on this share of the inputs
torch.manual_seed(0)


def batch(size: int = 512) -> torch.Tensor:
    present = torch.rand(size, N) < SHARE
    return (2 * torch.rand(size, N) - 1) * present


def new_model() -> nn.Module:
    return nn.Sequential(nn.Linear(N, 24), nn.ReLU(), nn.Linear(24, N))


model = new_model()
adam = torch.optim.Adam(model.parameters(), lr=1e-2)
for step in range(1500):
    adam.param_groups[0]["lr"] = 1e-2 * (1 - step / 1500)
    x = batch()
    loss = (model(x) - x.abs()).square().mean()
    adam.zero_grad()
    loss.backward()
    adam.step()
test = batch(2048)
print(f"mean squared error {(model(test) - test.abs()).square().mean():.1e}, of zeros {test.square().mean():.1e}")

# ---- 2. choose the layers: patterns over the names of the model's modules

for name, module in model.named_modules():
    if name:
        print(f"{name}: {module}")

# ---- 3. decompose


def data():
    """Batches without end, drawn as the model was trained: components are found for these inputs and no others."""
    while True:
        yield batch()


settings = {
    "targets": ["0", "2"],
    # One need not know how many features there are: C has only to be large enough.
    "C": 8,
    "steps": 1500,
    # As many active components as there are features on an average input. Without such knowledge try several.
    "method": fastapd.APD(topk=N * SHARE, minimality=1.0, simplicity=0.1, p=0.9),
    "optimiser": fastapd.Optimiser(lr=1e-2, schedule="cosine", warmup=0.05),
}
first = fastapd.decompose(model, data(), rank=2, **settings)
for row in first.history[::5]:
    print(f"step {row['step']:4}: total {row['total']:.1e}, faithfulness {row['faithfulness']:.1e}")

# ---- 4. is it any good? Faithful, minimal and simple, each beside what components that know nothing get

COLUMNS = ("faithfulness", "reconstruction", "l0", "alive", "effective_rank")


def table(rows: dict[str, dict[str, float]]) -> None:
    print(f"{'':8}", *(f"{column:>15}" for column in COLUMNS))
    for name, row in rows.items():
        print(f"{name:8}", *(f"{row[column]:15.2g}" for column in COLUMNS))


numbers = first.metrics(test)
table({"rank 2": numbers} | numbers["baselines"])


def owners(decomposition: fastapd.Decomposition) -> tuple[list[int], list[float]]:
    """For each feature the component that matters most when it is alone, and its share of all attribution."""
    alone = 0.7 * torch.eye(N)  # sample i has feature i and nothing else
    attributions = decomposition.attributions(alone)[0]  # [sample, component]; the first axis is that of instances
    share = attributions / attributions.sum(-1, keepdim=True)
    return share.argmax(-1).tolist(), share.amax(-1).tolist()


def own(component_of: list[int]) -> int:
    return sum(component_of.count(component) == 1 for component in component_of)


print(f"rank 2: {own(owners(first)[0])} of {N} features have a component to themselves")

# A component of rank 2 has room for two features, and where only one of them is there, the part for the other
# multiplies a zero: no loss objects, and the numbers above do not show it. A component of rank 1 has no such room.
pd = fastapd.decompose(model, data(), rank=1, **settings)
table({"rank 1": pd.metrics(test, baselines=False)})
component_of, share = owners(pd)
print(f"rank 1: {own(component_of)} of {N} features have a component to themselves")

# ---- 5. which components does an input use?

for feature in range(N):
    print(f"feature {feature}: component {component_of[feature]}, {share[feature]:.1%} of the attribution")
step, masked = pd.select(test)  # what the method selects in this batch, and the model's output on that alone
active, wanted = step.mask[0], torch.zeros_like(step.mask[0])
wanted[:, component_of] = test != 0
print(f"{(active & wanted).sum() / active.sum():.0%} of the active components belong to a feature that is there")
missed = test.abs()[(test != 0) & ~active[:, component_of]]
print(f"the median |x_i| of features whose component is not active is {missed.median():.2f}")

# ---- 6. ablate: without its component a feature is lost, and the others are not


def errors(output: torch.Tensor) -> torch.Tensor:
    """Of each output, relative to that of answering 0: 0 is right, 1 is lost."""
    return (output - test.abs()).square().mean(0) / test.square().mean(0)


def lost(output: torch.Tensor) -> str:
    error = errors(output)
    return f"error of feature 2 is {error[2]:.2f}, of the others at most {error[[0, 1, 3, 4, 5]].max():.3f}"


print("without its component,", lost(pd.ablate(test, drop=[component_of[2]])))
print("with only its component,", lost(pd(test, active=[component_of[2]])))

# ---- 7. edit and export: the same in the weights of an ordinary model that knows nothing of components

edited = pd.edited(scale={component_of[2]: 0.0})  # a copy of the model
other = new_model()
other.load_state_dict(pd.state_dict(scale={component_of[2]: 0.0}), strict=True)  # only the weights
print("in the edited model,", lost(edited(test).detach()))
print("its weights in a new model give the same:", torch.equal(other(test), edited(test)))

# ---- 8. save and share: the file has the components and a hash of the weights that they are for, but no weights

pd.save("abs.safetensors")
again = fastapd.Decomposition.load("abs.safetensors", model)
print("loaded, with the same outputs:", torch.equal(again(test, active=[0]), pd(test, active=[0])))
try:
    fastapd.Decomposition.load("abs.safetensors", edited)
except ValueError as error:
    print(error)
print(again)
