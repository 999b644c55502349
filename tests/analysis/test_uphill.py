"""Finetuning up the gradient: what changes sign with the direction, and what does not."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hosts import shared, tokenized

from metaopt_lens import ICLPrompt
from metaopt_lens.analysis import Comparison, Controls, compare, findings, uphill_update
from metaopt_lens.analysis._measure_set import _half
from metaopt_lens.finetuning import WeightUpdate, finetune, updated_memory
from metaopt_lens.models import wrap
from metaopt_lens.runs import Keep, Runs, record

F64 = torch.float64
NAME = "bridge:llama"
DEMOS = [("w30 w31", "w32"), ("w34", "w36"), ("w38 w39", "w32"), ("w42", "w36")]
PROMPTS = [ICLPrompt(DEMOS, q, label=label) for q, label in (("w16 w17", "w36"), ("w18", "w32"), ("w19 w20", "w32"))]


def learned(lr: float, **options: int | None) -> tuple[WeightUpdate, WeightUpdate]:
    """Downhill and uphill."""
    model = shared(NAME, F64)
    down = finetune(model, PROMPTS[0], lr=lr, progress=False, **options)  # type: ignore[arg-type]
    return down, uphill_update(model, PROMPTS[0], like=down)


def recorded(update: WeightUpdate) -> list[Runs]:
    model = wrap(shared(NAME, F64))
    rows = [tokenized(model.host, p) for p in PROMPTS]
    settings = ("icl", "zs", "zs_matched", "ft", "ft_matched")
    return record(model, rows, settings=settings, update=update, keep=Keep(raw_q=True, own_stream=True))


def test_one_step_uphill_is_minus_one_step_downhill() -> None:
    down, up = learned(0.5, batch_size=None)
    assert down.norm() > 0
    for name, tensor in down.tensors().items():
        torch.testing.assert_close(up.tensors()[name], -tensor, rtol=0, atol=0)


def test_odd_and_even_part_make_up_the_update() -> None:
    down, up = map(recorded, learned(0.5))
    for first, second in zip(down, up, strict=True):
        odd, even = _half(first, second, -1), _half(first, second, 1)
        for setting, plain in (("ft", "zs"), ("ft_matched", "zs_matched")):
            zs = first[plain].z  # type: ignore[index]
            whole = first[setting].z - zs  # type: ignore[index]
            parts = [half[setting].z - zs for half in (odd, even)]  # type: ignore[index]
            torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-12)
            torch.testing.assert_close(parts[1] - parts[0], second[setting].z - zs, rtol=0, atol=1e-12)  # type: ignore[index]
            assert float(parts[1].norm()) > 1e-9


def test_halving_the_rate_halves_the_share_of_the_even_part() -> None:
    """Downhill and uphill agree in the odd part to O(lr^2): the even part is of second order."""

    def share(lr: float) -> float:
        down, up = map(recorded, learned(lr))
        rows = [_half(first, second, 1).ft.z - first.zs.z for first, second in zip(down, up, strict=True)]
        wholes = [first.ft.z - first.zs.z for first in down]
        return float(torch.stack(rows).norm() / torch.stack(wholes).norm())

    shares = [share(lr) for lr in (0.008, 0.004, 0.002)]
    assert shares[0] / shares[1] == pytest.approx(2, rel=0.05)
    assert shares[1] / shares[2] == pytest.approx(2, rel=0.03)


@cache
def comparison() -> Comparison:
    down, _ = learned(0.5)
    controls = Controls(shuffled_labels=0, flipped_labels=False, unrelated_text=False, n_null_draws=4)
    return compare(shared(NAME, F64), PROMPTS, down, controls=controls, progress=False)


def test_a_comparison_holds_uphill_odd_and_even() -> None:
    found = comparison()
    down, up = map(recorded, learned(0.5))
    for name, vectors in (
        ("uphill", [second.ft.z - first.zs.z for first, second in zip(down, up, strict=True)]),
        ("uphill, odd part", [(first.ft.z - second.ft.z) / 2 for first, second in zip(down, up, strict=True)]),
        (
            "uphill, even part",
            [(first.ft.z + second.ft.z) / 2 - first.zs.z for first, second in zip(down, up, strict=True)],
        ),
    ):
        icl = torch.stack([first.icl.z[-1] - first.zs.z[-1] for first in down])
        wanted = torch.nn.functional.cosine_similarity(icl, torch.stack(vectors)[:, -1], dim=-1)
        null = found["z total"].nulls[name]
        known = ~null.isnan()
        assert known.float().mean() > 0.5
        torch.testing.assert_close(null[known], wanted.float()[known], rtol=0, atol=1e-4)
    assert "uphill" in found["linear"].nulls
    assert "uphill, odd part" not in found["linear"].nulls  # it does not read head outputs alone
    even = torch.stack([((a.ft.z + b.ft.z) / 2 - a.zs.z)[-1] for a, b in zip(down, up, strict=True)]).norm(dim=-1)
    whole = torch.stack([(a.ft.z - a.zs.z)[-1] for a in down]).norm(dim=-1)
    torch.testing.assert_close(found.norms["ft_even_share"], (even / whole).float(), rtol=1e-3, atol=1e-6)
    asked = [f.control for f in findings(found) if f.control]
    assert asked == ["other query", "random", "uphill", "uphill, even part"]
    (finding,) = (f for f in findings(found) if f.control == "uphill")
    assert finding.question == "Is it about descending at all?"


def test_a_rate_that_diverges_uphill_is_left_out_by_name() -> None:
    down, _ = learned(0.5)
    assert down.settings is not None
    steep = dataclasses.replace(down, settings=dataclasses.replace(down.settings, lr=1e300), trained_on=None)
    controls = Controls(shuffled_labels=0, flipped_labels=False, unrelated_text=False, n_null_draws=4)
    found = compare(shared(NAME, F64), PROMPTS, steep, controls=controls, progress=False)
    (note,) = (n for n in found.notes if "uphill" in n)
    assert note.startswith("the control 'uphill' is left out: uphill, learning rate 1e+300 diverges (the ")
    assert "uphill" not in found["z total"].nulls


def test_the_linear_form_read_with_keys_is_brute_force() -> None:
    """sum over D of v (k . k_last), and the same of dW_FT's own keys and values."""
    found = comparison()["linear, keys for queries"]
    down, _ = learned(0.5)
    memories = updated_memory(wrap(shared(NAME, F64)), down, [r.zs_matched for r in recorded(down)])
    for row, runs in enumerate(recorded(down)):
        run, memory = runs.icl, memories[row]
        demos = run.tokens.demonstrations.slice
        group = run.model.n_heads // run.model.n_kv_heads
        for layer in range(run.model.n_layers):
            for head in range(run.model.n_heads):
                kv = head // group
                keys, values = run.k_of(layer)[:, kv], run.v_of(layer)[:, kv]
                icl = sum(v * (k @ keys[-1]) for k, v in zip(keys[demos], values[demos], strict=True))
                pairs = [(memory.k_updated, memory.v_updated, 1), (memory.k, memory.v, -1)]
                ft = sum(s * (v[layer, :, kv].mT @ (k[layer, :, kv] @ keys[-1])) for k, v, s in pairs)
                wanted = torch.nn.functional.cosine_similarity(icl, ft, dim=0)  # type: ignore[arg-type]
                assert float(found.values[row, layer, head]) == pytest.approx(float(wanted), abs=1e-4)
