"""A training loop of your own: `fastapd.functional` has the method's formulas, `fastapd.nn` layers of components.

    python examples/own_training_loop.py

`fastapd.decompose` has no option for what this one does: the exponent p of the simplicity loss falls while it trains.
The network computes x_i^2 of five numbers of which most are zero; we hope for one component a number.
"""

import torch
from torch import nn

from fastapd import functional as F
from fastapd.nn import LinearComponents

N, HIDDEN, C, STEPS, LR = 5, 20, 7, 1500, 1e-2
torch.manual_seed(0)


def batch(size: int = 512) -> torch.Tensor:
    return (2 * torch.rand(size, N) - 1) * (torch.rand(size, N) < 0.2)


# ---- the target: trained, then frozen, so that nothing differentiates into it

first, second = nn.Linear(N, HIDDEN), nn.Linear(HIDDEN, N)
adam = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=1e-2)
for step in range(1000):
    adam.param_groups[0]["lr"] = 1e-2 * (1 - step / 1000)
    x = batch()
    loss = (second(first(x).relu()) - x.square()).square().mean()
    adam.zero_grad()
    loss.backward()
    adam.step()
first.requires_grad_(False)
second.requires_grad_(False)

# ---- components of both layers: number c of the first and number c of the second are one component

layers = {
    "first": LinearComponents.from_linear(first, C, rank=1),
    "second": LinearComponents.from_linear(second, C, rank=1),
}
# y = x W here, and nn.Linear stores the transpose
weights = {"first": first.weight.mT, "second": second.weight.mT}
n_params = sum(W.numel() for W in weights.values())
parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]  # biases are not trained
optimiser = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)


def factors() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A and B of every layer, as `functional` takes them."""
    return {name: layer.A for name, layer in layers.items()}, {name: layer.B for name, layer in layers.items()}


def attribute(x: torch.Tensor) -> torch.Tensor:
    """How much each component matters on each sample [batch, C]: gradients of the target, and no graph behind them."""
    hidden = first(x).requires_grad_()  # a graph from here on, though the target is frozen
    inner = hidden.relu()
    output = second(inner)
    gradients = F.output_gradients(output, {"first": hidden, "second": output})
    with torch.no_grad():
        inputs = {"first": x, "second": inner.detach()}
        return F.grad_attributions(inputs, gradients, *factors())


def run(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The network made of components; None runs all of them."""
    return layers["second"](layers["first"](x, mask).relu(), mask)


def faithfulness() -> float:
    """The error of the components' sum, relative to the weights."""
    squares = sum((layers[name].weight - W).square().sum() for name, W in weights.items())
    return (squares / sum(W.square().sum() for W in weights.values())).sqrt().item()


# ---- the loop

print(f"{'step':>5} {'p':>5} {'faithfulness':>13} {'reconstruction':>15} {'simplicity':>11}")
for step in range(STEPS):
    for group in optimiser.param_groups:
        group["lr"] = F.lr_schedule(step, STEPS, LR, "cosine", 0.05)
    p = 2.0 - 1.1 * min(1.0, 2 * step / STEPS)  # from 2 to 0.9 in the first half: first spread out, then few and small
    x = batch()
    target = second(first(x).relu())
    mask = F.batch_topk_mask(attribute(x), k=1.0)  # one component a sample on average, as N * 0.2 numbers are there
    terms = {
        "faithfulness": F.faithfulness_loss(*factors(), weights),
        "reconstruction": F.recon_mse(run(x, mask), target),
        "simplicity": 0.1 * F.schatten_loss(*factors(), mask, p=p, n_params=n_params),
    }
    optimiser.zero_grad()
    sum(terms.values()).backward()
    optimiser.step()
    if step % 300 == 0 or step == STEPS - 1:
        shown = terms["reconstruction"].item(), terms["simplicity"].item()
        print(f"{step:5} {p:5.2f} {faithfulness():13.4f} {shown[0]:15.2e} {shown[1]:11.2e}")

# ---- what came out of it

share = attribute(0.7 * torch.eye(N))  # sample i has number i and nothing else
owner = share.argmax(-1).tolist()
print("component of each number:", *owner)
print("numbers with a component to themselves:", sum(owner.count(c) == 1 for c in owner), "of", N)

# The sum of the components as ordinary layers: no fastapd is needed to run them.
rebuilt = nn.Sequential(layers["first"].to_linear(), nn.ReLU(), layers["second"].to_linear())
x = batch(2048)
target = second(first(x).relu())
error = (rebuilt(x) - target).square().mean() / target.square().mean()
print(f"rebuilt from the sum of the components: relative error {error.item():.1e}")
