"""Reading logits out where they are wanted, starting at a block, and the pieces of the output head and the MLP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosts import HOST_NAMES, build, left_as_it_was, shared
from rounding import PASS, SUM, assert_agree, of_pass
from torch import Tensor

from metaopt_lens import wrap
from metaopt_lens._errors import OptionError, UnsupportedModelError
from metaopt_lens.models import LensModel, Readout, Start

TOKENS = torch.tensor([[1, 30, 31, 3, 32, 4, 34, 3, 36, 37], [1, 50, 3, 52, 4, 54, 3, 16, 17, 3]])
READ = Readout(torch.tensor([[9, 3], [5, 6]]))
SOME = torch.tensor([7, 40, 3])
# Nothing of these MLPs can be taken apart.
NO_MLP = {"bridge:gpt_oss", "bridge:mixtral", "hooked:attn_only"}


def fresh(name: str) -> LensModel:
    """A wrapper that has tried nothing yet."""
    return LensModel(wrap(shared(name)).adapter)


def logits_of(model: LensModel, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    logits = model.run(tokens, **options)
    assert logits is not None
    return logits


def stream(model: LensModel, end: str, layer: int, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    kept: list[Tensor] = []
    model.run(tokens, hooks=[(model.residual_hook(end, layer), kept.append)], **options)
    return kept[0]


@pytest.mark.parametrize("name", HOST_NAMES)
def test_early_exit_of_the_last_stream_gives_the_models_own_logits(name: str) -> None:
    """Of everything, of single rows, and of some tokens only."""
    model = fresh(name)
    own, last = logits_of(model), stream(model, "post", model.info.n_layers - 1)
    with torch.no_grad():
        assert_agree(model.early_exit(last), own, SUM)
        assert_agree(model.early_exit(last[1, 4]), own[1, 4], SUM, of=(own,))
        assert_agree(model.early_exit(last[:, -1], SOME), own[:, -1, SOME], SUM, of=(own,))


@pytest.mark.parametrize("name", HOST_NAMES)
def test_the_head_is_what_its_pieces_say(name: str) -> None:
    """Norm and unembedding written out from kind, eps, gain, bias, matrix."""
    model = fresh(name)
    head, x = model.head, stream(model, "post", model.info.n_layers - 1).double()
    norm = head.fixed_norm
    if norm is not None:
        x = x - x.mean(-1, keepdim=True) if norm.kind == "LN" else x
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        x = x if norm.gain is None else x * norm.gain
        x = x if norm.bias is None else x + norm.bias
    x = x @ head.w_u.double()
    x = x if head.b_u is None else x + head.b_u
    x = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
    assert_agree(x.float().detach(), logits_of(model), SUM)


@pytest.mark.parametrize("name", HOST_NAMES)
@pytest.mark.parametrize("tokens", [None, SOME])
def test_logits_where_they_are_read_are_those_of_the_whole_pass(name: str, tokens: Tensor | None) -> None:
    model = fresh(name)
    read = Readout(READ.positions, tokens)
    whole = logits_of(model)
    expected = torch.stack([whole[0, [9, 3]], whole[1, [5, 6]]])
    expected = expected if tokens is None else expected[..., tokens]
    for _ in range(2):  # the first pass is whole, and tries whether the next ones may be cut short
        assert_agree(logits_of(model, read=read), expected, SUM, of=(whole,))
    assert model.tried.exits is True
    prefix = model.run_prefix(TOKENS[0, :3])
    behind = logits_of(model, TOKENS[:1, 3:], prefix=prefix, read=Readout(torch.tensor([[6, 0]]), tokens))
    assert_agree(behind[0, 0], expected[0, 0], of_pass(name), of=(whole,))
    assert_agree(behind[0, 1], expected[0, 1], of_pass(name), of=(whole,))


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gemma2", "native:rotary"])
def test_the_unembedding_sees_the_chosen_positions_only(name: str) -> None:
    model = fresh(name)
    seen: list[tuple[int, ...]] = []
    hooks = [("unembed.hook_in", lambda x: seen.append(tuple(x.shape)))]
    logits_of(model, read=READ)
    logits_of(model, read=READ, hooks=hooks)
    assert seen == [(1, 4, 32)]


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:gptj", "native:learned"])
def test_gradients_flow_through_what_is_read(name: str) -> None:
    model = fresh(name)
    gradients = []
    for options in ({}, {"read": READ}, {"read": READ}):
        added = torch.zeros(2, 10, 32, requires_grad=True)
        hook = (model.residual_hook("pre", 1), lambda x, added=added: x + added)
        logits = logits_of(model, hooks=[hook], grad=True, **options)
        rows = logits if options else READ.of(logits)
        gradients.append(torch.autograd.grad(rows.square().sum(), added)[0])
    for gradient in gradients[1:]:
        assert_agree(gradient, gradients[0], 2 * PASS)


def test_where_the_exit_is_not_exact_whole_logits_are_read() -> None:
    """A model that scales its logits behind the unembedding, as some families do."""
    bridge = build("bridge:llama")
    own = bridge.original_model.forward

    def scaled(*args: Any, **options: Any) -> Any:
        out = own(*args, **options)
        out.logits = out.logits * 0.5
        return out

    bridge.original_model.forward = scaled
    model = wrap(bridge)
    for _ in range(2):
        torch.testing.assert_close(logits_of(model, read=READ), READ.of(logits_of(model)), rtol=0, atol=0)
    assert model.tried.exits is False


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", HOST_NAMES)
def test_a_pass_that_starts_at_a_block_ends_as_the_whole_one(name: str, layer: int) -> None:
    model = fresh(name)
    whole = logits_of(model)
    start = Start(layer, stream(model, "pre", layer))
    with left_as_it_was(model.host):
        assert_agree(logits_of(model, start=start), whole, of_pass(name))
        assert_agree(logits_of(model, start=start, read=READ), READ.of(whole), of_pass(name), of=(whole,))
        assert_agree(logits_of(model, start=start, read=READ), READ.of(whole), of_pass(name), of=(whole,))
    prefix = model.run_prefix(TOKENS[0, :4])
    behind = Start(layer, start.residual[:1, 4:])
    found = logits_of(model, TOKENS[:1, 4:], prefix=prefix, start=behind)
    assert_agree(found, whole[:1, 4:], of_pass(name), of=(whole,))


@pytest.mark.parametrize("name", HOST_NAMES)
def test_a_pass_in_pieces_ends_as_the_whole_one(name: str) -> None:
    model = fresh(name)
    whole = logits_of(model)
    lower = logits_of(model, until=1)
    assert_agree(lower, stream(model, "pre", 1), PASS)
    middle = logits_of(model, start=Start(1, lower), until=2)
    assert_agree(middle, stream(model, "pre", 2), of_pass(name))
    assert_agree(logits_of(model, start=Start(2, middle)), whole, of_pass(name))
    assert_agree(logits_of(model, until=3), stream(model, "post", 2), PASS)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_blocks_below_the_start_are_not_run_and_edits_above_act(name: str) -> None:
    model = fresh(name)
    fired: list[int] = []

    def halve(call: Any) -> Tensor:
        z = call.z.clone()
        z[:, :, 1] = 0.0
        return z

    edit = model.attention_hooks(2, halve)
    expected = logits_of(model, hooks=edit)
    start = Start(1, stream(model, "pre", 1))
    logits_of(model, start=start)  # tries, once
    hooks = [(model.hook_name("z", layer), lambda z, layer=layer: fired.append(layer)) for layer in range(3)]
    found = logits_of(model, start=start, hooks=[*hooks, *edit])
    assert fired == [1, 2]
    assert_agree(found, expected, of_pass(name))


@pytest.mark.parametrize("name", ["bridge:llama", "bridge:bloom", "native:rotary"])
def test_gradients_flow_from_the_start(name: str) -> None:
    model = fresh(name)
    residual = stream(model, "pre", 1)
    leaf = residual.clone().requires_grad_()
    found = torch.autograd.grad(logits_of(model, start=Start(1, leaf), grad=True).square().sum(), leaf)[0]
    added = torch.zeros_like(residual, requires_grad=True)
    whole = logits_of(model, hooks=[(model.residual_hook("pre", 1), lambda x: x + added)], grad=True)
    expected = torch.autograd.grad(whole.square().sum(), added)[0]
    assert_agree(found, expected, 2 * PASS)


def test_a_host_that_remembers_its_lower_blocks_cannot_start_above_them() -> None:
    """Something outside the residual stream reaches the last block from the first."""
    bridge = build("bridge:llama")
    model = wrap(bridge)
    residual, seen = stream(model, "pre", 1), []

    def remember(tensor: Tensor, hook: Any) -> None:
        seen[:] = [tensor.mean()]

    def recall(tensor: Tensor, hook: Any) -> Tensor:
        return tensor + (seen.pop() if seen else 0.0)

    bridge.hook_dict["blocks.0.attn.hook_z"].add_hook(remember)
    bridge.hook_dict["blocks.2.hook_resid_post"].add_hook(recall)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM\) does not compute the same when it starts at"):
        model.run(TOKENS, start=Start(1, residual))
    bridge.reset_hooks()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": Start(3, torch.zeros(2, 10, 32))}, r"there is no layer 3 to start at: 3 layers, from 0"),
        ({"start": Start(1, torch.zeros(1, 10, 32))}, r"must be \[2, 10, 32\] for these tokens, got \[1, 10, 32\]"),
        ({"until": 0}, r"cannot end before layer 0: there are 3 layers, and it must run one"),
        ({"until": 4}, r"cannot end before layer 4: there are 3 layers"),
        ({"start": Start(2, torch.zeros(2, 10, 32)), "until": 2}, r"cannot end before layer 2"),
        ({"read": Readout(torch.tensor([[9]]))}, r"must be \[2, n\] \(a row for each sequence\)"),
        ({"read": Readout(torch.tensor([[9], [10]]))}, r"from 0 to 9, got \[\[9\], \[10\]\]"),
    ],
)
def test_what_does_not_fit_the_tokens_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fresh("bridge:llama").run(TOKENS, **options)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_the_mlps_matrices_are_those_of_its_products(name: str) -> None:
    """``W u`` is what the hooks on the products show, and ``W_out`` maps activations to the output."""
    model = fresh(name)
    if name in NO_MLP:
        with pytest.raises(
            UnsupportedModelError, match=r"the MLP in layer 1 of .* cannot be read: .*(attention|expert)"
        ):
            model.mlp_site(1)
        return
    site, seen = model.mlp_site(1), {}

    def keep(key: str) -> Any:
        def store(tensor: Tensor) -> None:
            seen[key] = tensor.reshape(-1, tensor.shape[-1])

        return store

    acts = "blocks.1.mlp.hook_post" if name.startswith("hooked:") else "blocks.1.mlp.out.hook_in"
    hooks = [site.input_hook(keep("u")), (acts, keep("act")), (site.out_name, keep("out"))]
    model.run(TOKENS, hooks=[*hooks, *((point, keep(key)) for key, point in site.products.items())])

    def changes(tensor: Tensor) -> Tensor:  # a bias drops out
        return tensor - tensor[:1]

    for key, matrix in site.matrices.items():
        assert_agree(changes(seen["u"]) @ matrix.mT, changes(seen[key]), SUM, of=(seen["u"], seen[key]))
    if not (name.startswith("hooked:") and site.is_normed):  # there the hook shows the normed output
        assert_agree(changes(seen["act"]) @ site.w_out.mT, changes(seen["out"]), SUM, of=(seen["act"], seen["out"]))
    parallel = {"bridge:phi", "bridge:gptj", "bridge:gpt_neox", "bridge:falcon", "hooked:partial_rotary_parallel"}
    normed = {"bridge:gemma2", "bridge:gemma3", "bridge:olmo2", "hooked:window_softcap"}
    assert (site.parallel, site.is_normed) == (name in parallel, name in normed)
