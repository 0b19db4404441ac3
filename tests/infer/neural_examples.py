"""Pyro's examples with networks in model and guide, rebuilt small: M2, scANVI and AIR."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints


def network(*sizes: int) -> nn.Sequential:
    """Softplus between layers."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Softplus()]
    return nn.Sequential(*layers[:-1])


def joined(*inputs: Tensor) -> Tensor:
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    return torch.cat([x.expand(*leading, x.shape[-1]) for x in inputs], -1)


# The semi-supervised VAE ("M2"): a class that is seen in some batches and summed out in the others.

PIXELS, CLASSES, STYLE = 6, 3, 2
IMAGES = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 0]]).double()
LABELS = torch.eye(CLASSES, dtype=torch.float64)[[2, 0, 1, 2]]


class SemiSupervised(nn.Module):
    def __init__(self, **plate: Any) -> None:
        super().__init__()
        self.plate = plate
        self.class_net = network(PIXELS, 5, CLASSES)
        self.style_net = network(PIXELS + CLASSES, 5, 2 * STYLE)
        self.decoder = network(STYLE + CLASSES, 5, PIXELS)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("m2", self)
        with pyro.plate("data", **self.plate):
            z = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), STYLE), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(xs.new_ones(len(xs), CLASSES) / CLASSES), obs=ys)
            probs = self.decoder(joined(z, y)).sigmoid()
            pyro.sample("x", dist.Bernoulli(probs, validate_args=False).to_event(1), obs=xs)

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data", **self.plate):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(self.class_net(xs).softmax(-1)))
            loc, log_scale = self.style_net(joined(xs, ys)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def model_classify(self, xs: Tensor, ys: Tensor) -> None:
        pyro.module("m2", self)
        with pyro.plate("data", **self.plate), poutine.scale(scale=46.0):
            pyro.sample("y_aux", dist.OneHotCategorical(self.class_net(xs).softmax(-1)), obs=ys)

    def guide_classify(self, xs: Tensor, ys: Tensor) -> None:
        pass


# scANVI: counts of genes; a class of cells that few labels name, between two codes, and a cost of the classifier.

GENES, CODE = 6, 2


class Cells(nn.Module):
    """``has_rsample``: what the guide says of its classification loss; Pyro's example says False."""

    def __init__(self, has_rsample: bool = False) -> None:
        super().__init__()
        self.has_rsample = has_rsample
        self.z2_net = self.normed(CODE + CLASSES, 2 * CODE)
        self.gene_net = self.normed(CODE, 2 * GENES)
        self.z2l_net = self.normed(GENES, 2 * CODE + 2)
        self.class_net = self.normed(CODE, CLASSES)
        self.z1_net = self.normed(CODE + CLASSES, 2 * CODE)

    def normed(self, inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, outputs))

    def normal(self, net: nn.Module, *inputs: Tensor) -> dist.TorchDistribution:
        flat = joined(*inputs)
        loc, scale = net(flat.reshape(-1, flat.shape[-1])).reshape(*flat.shape[:-1], -1).chunk(2, -1)
        return dist.Normal(loc, F.softplus(scale)).to_event(1)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("cells", self)
        theta = pyro.param("theta", torch.ones(GENES), constraint=constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=1 / (len(x) * GENES)):
            z1 = pyro.sample("z1", dist.Normal(0.0, x.new_ones(CODE)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(CLASSES)), obs=y)
            z2 = pyro.sample("z2", self.normal(self.z2_net, z1, y))
            size = pyro.sample("l", dist.LogNormal(1.0, x.new_ones(1)).to_event(1))
            gate, share = self.gene_net(z2).chunk(2, -1)
            logits = (size * share.softmax(-1) + 1e-6).log() - (theta + 1e-6).log()
            counts = dist.ZeroInflatedNegativeBinomial(gate_logits=gate, total_count=theta, logits=logits)
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("cells", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=1 / (len(x) * GENES)):
            loc, scale = self.z2l_net(x.log1p()).chunk(2, -1)
            pyro.sample("l", dist.LogNormal(loc[..., -1:], F.softplus(scale[..., -1:])).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(loc[..., :-1], F.softplus(scale[..., :-1])).to_event(1))
            cell_class = dist.OneHotCategorical(logits=self.class_net(z2))
            if y is None:
                y = pyro.sample("y", cell_class)
            else:
                cost = -0.01 * cell_class.log_prob(y)
                pyro.factor("classification_loss", cost, has_rsample=self.has_rsample)
            pyro.sample("z1", self.normal(self.z1_net, z2, y))


# AIR ("attend, infer, repeat"): an image is a sum of objects; presence is discrete, with a recurrent baseline.

SIDE, WINDOW, WHAT, MEMORY, OBJECTS = 6, 3, 2, 4, 2


def transformed(where: Tensor, side: int, images: Tensor) -> Tensor:
    zero = torch.zeros_like(where[:, 0])
    rows = [torch.stack([where[:, 0], zero, where[:, 1]], -1), torch.stack([zero, where[:, 0], where[:, 2]], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(where), 1, side, side], align_corners=False)
    return F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)


class Scenes(nn.Module):
    """``baseline``: what the value of the baseline's networks is multiplied by; None leaves them out."""

    def __init__(self, baseline: float | None) -> None:
        super().__init__()
        self.baseline = baseline
        self.cell = nn.LSTMCell(SIDE**2 + 3 + WHAT + 1, MEMORY)
        self.predict = network(MEMORY, 5, 1 + 6)
        self.encode, self.decode = network(WINDOW**2, 5, 2 * WHAT), network(WHAT, 5, WINDOW**2)
        self.baseline_cell, self.baseline_net = nn.LSTMCell(SIDE**2 + 3 + WHAT + 1, MEMORY), network(MEMORY, 1)
        self.where_loc, self.where_scale = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.1, 1.0, 1.0])

    def model(self, data: Tensor, batch_size: int) -> None:
        pyro.module("decode", self.decode)
        with pyro.plate("data", len(data)) as ix:
            batch = data[ix]
            n = len(batch)
            x, present = torch.zeros(n, SIDE, SIDE), torch.ones(n, 1)
            for t in range(OBJECTS):
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.5 * present).to_event(1))
                prior = dist.Normal(self.where_loc.expand(n, 3), self.where_scale.expand(n, 3))
                where = pyro.sample(f"z_where_{t}", prior.mask(present).to_event(1))
                what = pyro.sample(f"z_what_{t}", dist.Normal(torch.zeros(n, WHAT), 1.0).mask(present).to_event(1))
                drawn = transformed(where, SIDE, self.decode(what).reshape(-1, WINDOW, WINDOW))
                x = x + drawn * present.reshape(-1, 1, 1)
            pyro.sample("obs", dist.Normal(x.reshape(n, -1), 0.3).to_event(1), obs=batch.reshape(n, -1))

    def guide(self, data: Tensor, batch_size: int) -> None:
        pyro.module("scenes", self)
        with pyro.plate("data", len(data), subsample_size=batch_size) as ix:
            batch = data[ix]
            n, flat = len(batch), batch.flatten(1)
            state = baseline_state = (torch.zeros(n, MEMORY), torch.zeros(n, MEMORY))
            present, where, what = torch.ones(n, 1), torch.zeros(n, 3), torch.zeros(n, WHAT)
            for t in range(OBJECTS):
                state = self.cell(torch.cat([flat, where, what, present], 1), state)
                infer = {}
                if self.baseline is not None:
                    seen = [flat, where.detach(), what.detach(), present.detach()]
                    baseline_state = self.baseline_cell(torch.cat(seen, 1), baseline_state)
                    value = self.baseline_net(baseline_state[0]) * present
                    infer = {"baseline": {"baseline_value": self.baseline * value.squeeze(-1)}}
                logit, loc, scale = self.predict(state[0]).split([1, 3, 3], -1)
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(logit.sigmoid() * present).to_event(1), infer=infer)
                fn = dist.Normal(loc + self.where_loc, F.softplus(scale) * self.where_scale)
                where = pyro.sample(f"z_where_{t}", fn.mask(present).to_event(1))
                inverse = torch.cat([torch.ones(n, 1), -where[:, 1:]], 1) / where[:, :1]
                loc, scale = self.encode(transformed(inverse, WINDOW, batch).flatten(1)).chunk(2, -1)
                what = pyro.sample(f"z_what_{t}", dist.Normal(loc, F.softplus(scale)).mask(present).to_event(1))
