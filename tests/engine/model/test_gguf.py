"""Base models in GGUF files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf

from nat_plugin_evsys.engine.model import gguf
from nat_plugin_evsys.engine.model.loading import load_base_model, load_tokenizer
from nat_plugin_evsys.errors import ModelError
from nat_plugin_evsys.runtime.bases import BaseModels


@pytest.fixture(scope="module")
def file(model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(model_dir("qwen2"), tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_a_file_gives_the_model_that_was_written_to_it(file: Path, model_dir: Callable[[str], Path]) -> None:
    plain, unpacked = (load_base_model(str(path), device="cpu") for path in (model_dir("qwen2"), file))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(unpacked.model(ids).logits, plain.model(ids).logits, atol=1e-5)
    assert unpacked.identity["weights_sha256"] == plain.identity["weights_sha256"]
    assert unpacked.context_length == plain.context_length
    assert unpacked.tokenizer.decode(unpacked.tokenizer.encode("Hi")) == "Hi"
    assert load_tokenizer(str(file)).encode("Hi") == unpacked.tokenizer.encode("Hi")


def test_it_is_the_same_model_when_it_is_saved_and_loaded_again(file: Path, tmp_path: Path) -> None:
    unpacked = load_base_model(str(file), device="cpu")
    unpacked.model.save_pretrained(tmp_path)
    unpacked.tokenizer.save_pretrained(tmp_path)
    assert load_base_model(str(tmp_path), device="cpu").identity == unpacked.identity


def test_a_file_and_its_directory_are_one_model_in_memory(file: Path) -> None:
    bases = BaseModels(max_batch_size=1, device="cpu")
    shared = bases.get(str(file))
    assert bases.get(str(file.parent)) is shared
    assert bases.get(f"{file.parent}/../{file.parent.name}/{file.name}") is shared
    bases.close()


def test_several_files_in_a_directory_are_named(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(ModelError, match=r"several \.gguf files \(a\.gguf, b\.gguf\); name one.*/a\.gguf"):
        load_base_model(str(tmp_path))
    assert load_base_model(str(tmp_path / "b.gguf"), device="cpu").identity == load_base_model(str(file)).identity


def test_what_is_no_gguf_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("missing.gguf", "./missing.gguf"):
        with pytest.raises(ModelError, match=r"no such file below .*a hub id such as"):
            load_base_model(name)
    Path("weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"'weights\.bin' is a file, but not a \.gguf file"):
        load_base_model("weights.bin")
    Path("torn.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"'torn\.gguf' cannot be loaded from torn\.gguf"):
        load_base_model("torn.gguf")


def test_without_the_reader_the_error_says_what_to_type(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "READERS", ("gguf_reader_that_is_not_installed",))
    with pytest.raises(ModelError, match=r"small\.gguf' is a GGUF file.*: pip install accelerate gguf$"):
        load_base_model(str(file))
