"""Forward passes of a wrapped model: whole, behind a prefix, from a block upwards, with logits where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.models._hooks import Hook, Late, StopForward, attached, check_hook_names, inference_state
from metaopt_lens.models._host import Host
from metaopt_lens.models._partial_passes import Readout, Start, recording_widths, skipping
from metaopt_lens.models._passes import PASS, HostPass, Standing
from metaopt_lens.models._prefix import Prefix

if TYPE_CHECKING:
    from metaopt_lens.models._lens import LensModel

_N_TRIED = 8  # tokens, of a pass that is only a trial
# Largest difference of two ways to compute the same, relative to the largest entry.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@contextmanager
def hooked(host: Host, hooks: Sequence[Hook]) -> Iterator[None]:
    """See `LensModel.hooked`."""
    begins = [function for name, function in hooks if name == PASS]
    others = [hook for hook in hooks if hook[0] != PASS]
    check_hook_names(host.hook_points, [name for name, _ in others], owner=host.info.name)

    def begin(host_pass: HostPass) -> Tensor | None:
        placed = [function(host_pass) for function in begins]
        return next((positions for positions in placed if positions is not None), None)

    with ExitStack() as stack:
        if begins:
            stack.enter_context(host.watching(begin))
        stack.enter_context(attached(host.hook_points, others))
        yield


def run(
    model: LensModel,
    tokens: Tensor,
    *,
    hooks: Sequence[Hook],
    prefix: Prefix | None,
    start: Start | None,
    read: Readout | None,
    until: int | None,
    stop_after_attention: bool,
    stop_after_blocks: bool,
    grad: bool,
) -> Tensor | None:
    """See `LensModel.run`."""
    _check(model, tokens, start, read, until)
    if start is not None and model.tried.widths is None:
        _try_start(model, tokens[:1], prefix, start.layer)
    last = model.info.n_layers - 1
    own: list[Hook] = []
    if start is not None:
        own.append((model.residual_hook("pre", start.layer), lambda _: start.residual))
    stop: list[Hook] = []
    stream: list[Tensor] = []
    if until is not None:
        stop = [(model.residual_hook("post", until - 1), Late(_keep(stream, and_stop=True)))]
    elif stop_after_blocks:
        stop = [(model.residual_hook("post", last), Late(_halt))]
    elif stop_after_attention:
        stop = [(model.hook_name("z", last), _halt)]
    elif read is not None and model.exits_exactly:
        stop = [(model.residual_hook("post", last), Late(_keep(stream, and_stop=True)))]
    below = () if start is None else model.adapter.blocks[: start.layer]
    skip = skipping(below, (model.tried.widths or [])[: len(below)]) if below else nullcontext()
    with inference_state(model.adapter.roots, grad=grad), skip, model.hooked([*own, *hooks, *stop]):
        try:
            logits = model.adapter.forward(tokens.to(model.device), prefix)
        except StopForward:
            if until is not None:
                return stream[0]
            if stop_after_blocks:
                return None
            return None if stop_after_attention else _exit(model, stream[0], read)
        return logits if read is None else read.of(logits)


def run_prefix(model: LensModel, tokens: Tensor, *, hooks: Sequence[Hook], grad: bool) -> Prefix:
    """See `LensModel.run_prefix`."""
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    last = model.info.n_layers - 1

    def keep(store: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
        def use(tensor: Tensor) -> None:
            store[layer] = tensor[0]
            if layer == last and layer in keys and layer in values:
                raise StopForward  # the last layer's attention is read by nobody

        return use

    def positions(tensor: Tensor) -> Tensor:
        return torch.arange(tensor.shape[1], device=tensor.device)

    own: list[Hook] = []
    for layer, block in enumerate(model.adapter.blocks):
        own += block.query_key_hooks(lambda _: None, keep(keys, layer), positions)
        own.append((block.hook_name("v"), keep(values, layer)))
    with inference_state(model.adapter.roots, grad=grad), model.hooked([*hooks, *own]):
        read_cache = model.adapter.fill(tokens[None].to(model.device))
    k, v = (tuple(store[layer] for layer in range(last + 1)) for store in (keys, values))
    return Prefix(k=k, v=v, host_k=read_cache() or k)


def keys_and_values(
    model: LensModel, tokens: Tensor, *, start: Start, prefix: Prefix | None, hooks: Sequence[Hook]
) -> tuple[Tensor, Tensor]:
    """See `LensModel.keys_and_values`."""
    seen: dict[str, Tensor] = {}
    n_new = tokens.shape[1]

    def keep(name: str) -> Callable[[Tensor], None]:
        def use(tensor: Tensor) -> None:
            seen[name] = tensor[:, -n_new:]  # a host may show the prefix's too
            if len(seen) == 2:
                raise StopForward

        return use

    def positions(tensor: Tensor) -> Tensor:
        return Standing.behind(prefix, n_new, tensor.device).new_positions

    block = model.adapter.blocks[start.layer]
    own = [*block.query_key_hooks(lambda _: None, keep("k"), positions), (block.hook_name("v"), keep("v"))]
    model.run(tokens, hooks=[*hooks, *own], prefix=prefix, start=start, stop_after_attention=True)
    return seen["k"], seen["v"]


def try_exit(model: LensModel) -> bool:
    """See `LensModel.exits_exactly`: tried on a few tokens of one sequence."""
    tokens = (torch.arange(min(_N_TRIED, model.info.n_ctx)) * 7919 + 5) % model.info.d_vocab
    stream: list[Tensor] = []
    last = (model.residual_hook("post", model.info.n_layers - 1), Late(_keep(stream, and_stop=False)))
    with inference_state(model.adapter.roots, grad=False), model.hooked([last]):
        logits = model.adapter.forward(tokens[None].to(model.device), None)
        return _agree(model, model.early_exit(stream[0]), logits)


def _try_start(model: LensModel, tokens: Tensor, prefix: Prefix | None, layer: int) -> None:
    """Require that a pass which starts at a layer ends as the whole pass does; tried once, on one sequence."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    reads: list[Hook] = [
        (model.residual_hook("pre", layer), Late(_keep(before, and_stop=False))),
        (model.residual_hook("post", model.info.n_layers - 1), Late(_keep(after, and_stop=False))),
    ]

    def once() -> None:
        with inference_state(model.adapter.roots, grad=False), model.hooked(reads):
            model.adapter.forward(tokens.to(model.device), prefix)

    with recording_widths(model.adapter.blocks) as widths:
        once()
    with skipping(model.adapter.blocks[:layer], widths[:layer]):
        reads.insert(0, (model.residual_hook("pre", layer), lambda _: before[0]))
        once()
    if not _agree(model, after[1], after[0]):
        raise UnsupportedModelError(
            f"{model.info.name} ({model.info.architecture}) does not compute the same when it starts at layer {layer} "
            "from a stored residual stream: run it from the tokens."
        )
    model.tried.widths = widths


def _check(model: LensModel, tokens: Tensor, start: Start | None, read: Readout | None, until: int | None) -> None:
    if until is not None and not (0 if start is None else start.layer) < until <= model.info.n_layers:
        raise OptionError(
            f"a pass cannot end before layer {until}: there are {model.info.n_layers} layers, and it must run one."
        )
    if start is not None:
        if not 0 <= start.layer < model.info.n_layers:
            raise OptionError(f"there is no layer {start.layer} to start at: {model.info.n_layers} layers, from 0.")
        wanted = (*tokens.shape, model.info.d_model)
        if start.residual.shape != wanted:
            raise OptionError(
                f"the residual stream to start from must be {list(wanted)} for these tokens, got "
                f"{list(start.residual.shape)}."
            )
    if read is not None:
        at, n_rows, n_pos = read.positions, len(tokens), tokens.shape[1]
        if at.ndim != 2 or len(at) != n_rows or not bool(((at >= 0) & (at < n_pos)).all()):
            raise OptionError(
                f"positions to read must be [{n_rows}, n] (a row for each sequence) and from 0 to {n_pos - 1}, got "
                f"{at.tolist()}."
            )


def _exit(model: LensModel, stream: Tensor, read: Readout | None) -> Tensor:
    assert read is not None  # nothing else stops at the last residual stream
    return model.early_exit(read.rows(stream), read.tokens)


def _agree(model: LensModel, one: Tensor, other: Tensor) -> bool:
    error = (one - other).abs().max() / other.abs().max().clamp_min(1e-30)
    return bool(error <= _TOLERANCE[model.info.dtype])


def _keep(store: list[Tensor], *, and_stop: bool) -> Callable[[Tensor], None]:
    def use(tensor: Tensor) -> None:
        store.append(tensor)
        if and_stop:
            raise StopForward

    return use


def _halt(_: Tensor) -> None:
    raise StopForward
