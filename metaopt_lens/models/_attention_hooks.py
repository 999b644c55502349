"""Hooks that put one layer's attention together just before W_O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from metaopt_lens._errors import UnsupportedModelError
from metaopt_lens.models._attention_call import AttentionCall
from metaopt_lens.models._hooks import Hook
from metaopt_lens.models._host import Block, Host
from metaopt_lens.models._info import ModelInfo
from metaopt_lens.models._passes import PASS, HostPass, Standing
from metaopt_lens.models._prefix import Prefix

AttentionCallback = Callable[[AttentionCall], Tensor | None]


def own_hooks(host: Host, layer: int, use: AttentionCallback, prefix: Prefix | None) -> list[Hook]:
    """See `LensModel.attention_hooks`."""

    def standing(tensor: Tensor) -> Standing:
        return Standing.behind(prefix, tensor.shape[1], tensor.device)

    return _layer_hooks(host.info, host.blocks[layer], layer, standing, use, read_pattern=True)


def placed_hooks(
    host: Host, place: Callable[[HostPass], Tensor | None], use: AttentionCallback, layers: Sequence[int]
) -> list[Hook]:
    """See `LensModel.placed_hooks`."""
    running: list[Standing] = []

    def begin(host_pass: HostPass) -> Tensor | None:
        moved = place(host_pass)
        running[:] = [Standing.of(host_pass, moved)]
        return moved

    hooks: list[Hook] = [(PASS, begin)]
    for layer, block in enumerate(host.blocks):
        chosen = use if layer in layers else None
        hooks += _layer_hooks(host.info, block, layer, lambda _: running[0], chosen, read_pattern=False)
    return hooks


def _layer_hooks(
    info: ModelInfo,
    block: Block,
    layer: int,
    standing: Callable[[Tensor], Standing],
    use: AttentionCallback | None,
    *,
    read_pattern: bool,
) -> list[Hook]:
    """Hooks that call `use` with the layer's `AttentionCall` just before W_O; what it returns replaces z.

    Where the host was given other positions than its own, but its masks or biases go by the slot (sliding window,
    ALiBi), z is recomputed first.

    Args:
        info: names the model in errors.
        block: the layer of the host.
        layer: which it is.
        standing: given a tensor of the running pass, ``[batch, pos, ...]``, says where its tokens stand.
        use: None where only moved tokens are put right.
        read_pattern: keep the pattern the host's own hook shows, where it does so before z.
    """
    seen: dict[str, Tensor] = {}
    rule = block.rule()
    by_slot = rule.window is not None or rule.alibi_slopes is not None

    def keep(key: str) -> Callable[[Tensor], None]:
        def store(tensor: Tensor) -> None:
            seen[key] = tensor

        return store

    def take(key: str) -> Tensor:
        if key not in seen:
            raise UnsupportedModelError(
                f"{info.name} ({info.architecture}): the hook on {key} of layer {layer} does not fire before the "
                "heads' outputs are computed, so its attention cannot be read. This architecture is not supported."
            )
        return seen.pop(key)

    def at_z(z: Tensor) -> Tensor | None:
        here = standing(z)
        k = here.all_keys(layer, take("k"), z.shape[1])
        positions = here.positions.to(z.device)
        call = AttentionCall(
            layer,
            q=take("q"),
            k=k,
            v=here.all_values(layer, take("v")),
            z=z,
            rule=rule,
            dst_positions=positions[..., here.n_past :],
            src_positions=positions[..., -k.shape[1] :],
            padded=None if here.valid is None else ~here.valid.to(z.device)[:, -k.shape[1] :],
            host_pattern=take("pattern") if reads_pattern else None,
        )
        corrected = call.attend()[0] if by_slot and here.moved else None
        if corrected is not None:
            call = replace(call, z=corrected)
        edited = None if use is None else use(call)
        return corrected if edited is None else edited

    reads_pattern = read_pattern and block.pattern_before_z
    hooks = block.query_key_hooks(keep("q"), keep("k"), lambda tensor: standing(tensor).new_positions)
    hooks.append((block.hook_name("v"), keep("v")))
    if reads_pattern:
        hooks.append((block.hook_name("pattern"), keep("pattern")))
    return [*hooks, (block.hook_name("z"), at_z)]
