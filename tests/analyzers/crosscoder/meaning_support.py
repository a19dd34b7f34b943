"""Random crosscoders and a model that is linear behind its site."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.adapters import Block, Model
from analyzers.crosscoder.active import Active
from analyzers.crosscoder.weights import Crosscoder, Gate


def random_crosscoder(
    latents: int, snapshots: int, width: int, seed: int = 0, gate: Gate = "shared", threshold: float = 0.5
) -> Crosscoder:
    made = torch.Generator().manual_seed(seed)
    inputs = snapshots * width
    return Crosscoder(
        torch.randn(latents, inputs, generator=made) / inputs**0.5,
        0.1 * torch.randn(latents, generator=made),
        torch.randn(latents, inputs, generator=made) / width**0.5,
        0.1 * torch.randn(inputs, generator=made),
        torch.full((latents,), threshold),
        0.5 + torch.rand(snapshots, generator=made),
        gate=gate,
    )


def perfect_crosscoder(scale: Sequence[float], width: int) -> Crosscoder:
    """Two latents for every input, one for each sign: it gives back what it gets."""
    inputs = len(scale) * width
    both = torch.cat([torch.eye(inputs), -torch.eye(inputs)])
    zero = torch.zeros(2 * inputs)
    return Crosscoder(
        both, zero, both.clone(), torch.zeros(inputs), zero, torch.tensor(scale), activation="relu"
    )


def loud(model: Any) -> Any:
    """A copy with larger logits: those of a random model are so small that little changes its loss."""
    louder = copy.deepcopy(model)
    with torch.no_grad():
        louder.get_output_embeddings().weight *= 20
    return louder


def of_dense(activations: Tensor) -> Active:
    token, feature = torch.nonzero(activations, as_tuple=True)
    return Active(token, feature, activations[token, feature], *activations.shape)


class LinearModel(nn.Module):
    """Embedding, a block, a causal running sum and an unembedding: linear from the block to the logits."""

    def __init__(self, vocabulary: int, width: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, width)
            self.block, self.norm = nn.Identity(), nn.Identity()
            self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embedding(tokens)).cumsum(dim=1)))


def linear_model(vocabulary: int, width: int) -> Model:
    model = LinearModel(vocabulary, width)
    return Model(model, [Block(model.block)], model.embedding, model.norm, model.head, width)
