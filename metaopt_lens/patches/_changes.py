"""How the changes of a block enter a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from metaopt_lens.models import Hook
from metaopt_lens.patches._site import PatchSite

Rows = Float[Tensor, "row _"]


@runtime_checkable
class Changes(Protocol):
    """What one block's changes add, to tensors of a running pass with one row for every token."""

    def product(self, matrix: str, x: Rows, product: Rows) -> Rows:
        """``dW x`` of an input matrix.

        Args:
            matrix: its name.
            x: the MLP's input.
            product: ``W x``.
        """
        ...

    def output(self, hidden: Rows, out: Rows) -> Rows:
        """``dW h`` of the output matrix.

        Args:
            hidden: what it is applied to.
            out: ``W h``.
        """
        ...

    def scaled(self, normalized: Rows, out: Rows) -> Rows:
        """``y * ds`` of a norm's scale.

        Args:
            normalized: y, the normalised output before the norm's own factor.
            out: ``y * s``.
        """
        ...

    def experts_input(self, x: Rows) -> Rows:
        """The change of the input that does what the changes of router and experts do, which all read it.

        ``(W + W (z_C - z) (x) right) x = W (x + (z_C - z) right . x)`` for every W.

        Args:
            x: the input of router and experts.
        """
        ...

    def experts_output(self, x: Rows, out: Rows) -> Rows:
        """What the change of one active expert's output matrix adds to the mixture's output.

        Args:
            x: the input of router and experts, changed.
            out: the mixture's output.
        """
        ...


def rows_of(tensor: Tensor) -> Rows:
    """One row for every token, sequence after sequence.

    Args:
        tensor: ``[batch, pos, d]``, or already ``[(batch pos), d]``; heads ``[batch, pos, head, d_head]``.
    """
    joined = tensor.flatten(2) if tensor.ndim == 4 else tensor  # -> batch pos (head d_head)
    return joined.reshape(-1, joined.shape[-1])  # -> (batch pos) d


def change_hooks(site: PatchSite, changes: Changes, dtype: torch.dtype) -> list[Hook]:
    """Hooks that make a block's changes in any forward pass.

    Args:
        site: where.
        changes: what they add.
        dtype: sums are made in it, and rounded to the model's once.
    """
    seen: dict[str, Tensor] = {}

    def keep(key: str) -> Callable[[Tensor], None]:
        def store(tensor: Tensor) -> None:
            seen[key] = rows_of(tensor)

        return store

    def adding(added: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def change(tensor: Tensor) -> Tensor:
            rows = rows_of(tensor)
            return (rows.to(dtype) + added(rows)).to(tensor.dtype).reshape(tensor.shape)

        return change

    def product_of(matrix: str) -> Callable[[Tensor], Tensor]:
        return adding(lambda rows: changes.product(matrix, seen["z"], rows))

    hooks: list[Hook] = []
    if site.experts is not None:

        def shifted(tensor: Tensor) -> Tensor:
            moved = adding(changes.experts_input)(tensor)
            keep("z")(moved)
            return moved

        hooks.append((site.experts.input_name, shifted))
    if site.input_hook is not None:
        hooks.append(site.input_hook(keep("z")))
    hooks += [(name, product_of(matrix)) for matrix, name in site.products.items()]
    if site.hidden_name is not None:
        hooks.append((site.hidden_name, keep("hidden")))
    if site.norm is not None:
        hooks.append((site.norm.normalized_name, keep("normalized")))
        added = adding(lambda rows: changes.scaled(seen["normalized"], rows))
    elif site.experts is not None:
        added = adding(lambda rows: changes.experts_output(seen["z"], rows))
    else:
        added = adding(lambda rows: changes.output(seen["hidden"], rows))
    return [*hooks, (site.out_name, added)]
