"""A mixture of experts: a router, and MLPs of which every token uses a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ExpertsSite:
    """A router and experts as transformers holds them: all experts' weights in one tensor, nothing shared.

    Attributes:
        router_module: gives logits, weights of the chosen experts, and their numbers.
        experts_module: holds ``gate_up_proj`` and ``down_proj`` of all experts.
        input_name: name of the hook point on the input, which router and experts read and nothing else does.
        out_name: name of the hook point on the weighted sum of the experts' outputs.
    """

    router_module: nn.Module
    experts_module: Any
    input_name: str
    out_name: str

    @property
    def w_router(self) -> Float[Tensor, "expert d_model"]:
        """The router's matrix (column convention)."""
        return self.router_module._parameters["weight"]  # type: ignore[return-value]

    def route(self, x: Float[Tensor, "row d_model"]) -> tuple[Float[Tensor, "row active"], Int[Tensor, "row active"]]:
        """Weights and numbers of the experts that every token uses."""
        _, weights, chosen = self.router_module(x)
        return weights, chosen

    def w_in(self, expert: int) -> Float[Tensor, "d_product d_model"]:
        """Gate and input matrix of an expert, in the order the model keeps their rows (column convention)."""
        weight: Tensor = self.experts_module.gate_up_proj[expert]
        return weight.mT if self.experts_module.is_transposed else weight

    def w_out(self, expert: int) -> Float[Tensor, "d_model d_mlp"]:
        """Output matrix of an expert (column convention)."""
        weight: Tensor = self.experts_module.down_proj[expert]
        return weight.mT if self.experts_module.is_transposed else weight

    def hidden(self, x: Float[Tensor, "row d_model"], experts: Int[Tensor, " row"]) -> Float[Tensor, "row d_mlp"]:
        """What an expert's output matrix is applied to, of one expert for each token."""
        held = self.experts_module
        rows: list[Tensor] = [torch.empty(0)] * len(x)
        for expert in sorted(set(experts.tolist())):
            at = (experts == expert).nonzero()[:, 0]
            product = x[at] @ self.w_in(expert).mT
            if held.has_bias:
                product = product + held.gate_up_proj_bias[expert]
            for row, hidden in zip(at.tolist(), held._apply_gate(product), strict=True):
                rows[row] = hidden
        return torch.stack(rows)


def experts_of(mlp: nn.Module, at: str) -> ExpertsSite | str:
    """The experts behind a bridge's mixture, or why they cannot be read.

    Args:
        mlp: TransformerLens's `MoEBridge`.
        at: its name.
    """
    from transformer_lens.model_bridge.generalized_components.moe import unwrap_bridge

    inner = unwrap_bridge(mlp)
    parts = {name: unwrap_bridge(part) for name, part in inner.named_children()}
    routers = {"gate", "router"} & set(parts)
    unknown = f"the MLP is a mixture of experts of an unknown kind ({type(inner).__name__})"
    if len(routers) != 1 or set(parts) - routers != {"experts"}:
        return unknown  # experts that every token shares, for example
    router, experts = parts[routers.pop()], parts["experts"]
    if {"gate_up_proj", "down_proj"} - set(experts._parameters) or not vars(experts).get("has_gate"):
        return unknown
    return ExpertsSite(router, experts, input_name=f"{at}.hook_in", out_name=f"{at}.hook_out")
