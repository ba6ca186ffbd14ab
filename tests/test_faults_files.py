"""Damaged files: every kind the product keeps, with a bit flipped or an end cut off, is named and never used."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ensemblelora import artifacts, gguf, pipeline
from ensemblelora.adapters import THETA0, load_adapter, save_adapter
from ensemblelora.api import load_run
from ensemblelora.artifacts import RunFolder, find_seal_fault, seal_folder
from ensemblelora.config import DataConfig
from ensemblelora.data.batching import collate
from ensemblelora.data.loading import load_tasks
from ensemblelora.errors import EnsembleLoraError, ModelError, OutputError, StoreError
from ensemblelora.files import (
    atomic_folder,
    file_sha256,
    fingerprint,
    load_arrays,
    map_new_array,
    save_array,
    save_arrays,
    write_json,
)
from ensemblelora.gradients.exact import _reserve
from ensemblelora.journal import Journal, append_line
from ensemblelora.passes import run_lower, with_cache
from ensemblelora.store import FeatureStore, _join_files
from ensemblelora.tensors import load_tensors, save_tensors
from tests.faults import ROOT, cut, files_limited, flip_bit
from tests.test_prefix import make_top
from tests.test_security import poisons
from tests.tiny import make_adapted, make_split
from tests.tiny_run import copy_run, finished_run, read_config, read_json, tensors_of
from tests.toys import write_rows

DAMAGE = [*(lambda path, bit=bit: flip_bit(path, bit) for bit in (3, -3)), cut]
UNWATCHED = {".lock", ".config.yaml", "config.yaml"}
"""the last is the user's to edit; its settings are compared with what was made, by its copy where that can be read"""


def guarded(run: Path) -> set[Path]:
    """Files whose content is held against a checksum before it is used."""
    recorded = {name for marker in (run / "stages").glob("*.json") for name in artifacts.read_json(marker)["files"]}
    blocks = {path for path in (run / "features").rglob("*") if path.is_file() and path.name != "manifest.json.lock"}
    archives = set(run.rglob("*.npz"))  # with checksums of their own, see below
    objects = {path for path in run.rglob("*.json") if "checksum of the rest" in json.loads(path.read_bytes())}
    return {run / name for name in recorded} | blocks | archives | objects


def test_every_file_of_a_run_is_guarded():
    run = finished_run() / "run"
    files = {path for path in run.rglob("*") if path.is_file() and path.suffix != ".lock"} - guarded(run)
    assert {path.relative_to(run).as_posix() for path in files} <= UNWATCHED, "a file that no checksum watches"


@pytest.mark.parametrize("damage", DAMAGE, ids=["first byte", "last byte", "cut"])
def test_what_a_stage_left_is_refused_by_name_once_it_is_damaged(tmp_path, damage):
    shutil.copytree(finished_run() / "run", tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    markers = [artifacts.read_json(marker) for marker in (folder.path / "stages").glob("*.json")]
    names = sorted({name for marker in markers for name in marker["files"]})
    folder.check(*names)
    for name in names:
        before = (folder.path / name).read_bytes()
        damage(folder.path / name)
        with pytest.raises(StoreError, match=f"{name}.*it is made anew by: ensemblelora run"):
            folder.check(name)
        (folder.path / name).write_bytes(before)
    folder.check("adapters", *names)


@pytest.mark.parametrize("damage", DAMAGE, ids=["first byte", "last byte", "cut"])
def test_every_file_of_the_feature_store_is_refused_by_name_once_it_is_damaged(tmp_path, damage):
    store = FeatureStore(shutil.copytree(finished_run() / "run" / "features", tmp_path / "features"))
    manifest = artifacts.read_json(store.folder / "manifest.json")["blocks"]
    for block in manifest[:2]:
        for file in sorted((store.folder / block["folder"]).iterdir()):
            before = file.read_bytes()
            damage(file)
            with pytest.raises(StoreError, match=file.name):
                store.read(block["task"], block["split"])
            file.write_bytes(before)


def test_no_flipped_bit_of_a_stores_manifest_changes_what_it_says(tmp_path):
    store = FeatureStore(shutil.copytree(finished_run() / "run" / "features", tmp_path / "features"))
    manifest, generator = store._read_manifest(), random.Random(0)
    whole = (store.folder / "manifest.json").read_bytes()
    for _ in range(100):
        flip_bit(store.folder / "manifest.json", generator.randrange(8 * len(whole)))
        try:
            assert store._read_manifest() == manifest
        except StoreError as error:
            assert "manifest.json" in str(error)
        (store.folder / "manifest.json").write_bytes(whole)


def test_a_finished_run_holds_no_pickle():
    kinds = {path.suffix for path in (finished_run() / "run").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".npy", ".npz", ".safetensors", ".yaml", ".html", ".md", ".lock", ""}


def test_a_poisoned_feature_file_is_refused_even_with_the_right_checksums(tmp_path):
    mark = tmp_path / "it ran"
    store = FeatureStore(shutil.copytree(finished_run() / "run" / "features", tmp_path / "features"))
    manifest = json.loads((store.folder / "manifest.json").read_text(encoding="utf-8"))
    block = manifest["blocks"][0]
    name = block["shards"][0]["files"]["features"]["file"]
    (store.folder / block["folder"] / name).write_bytes(poisons(mark)["npy"])
    path = store.folder / block["folder"] / name
    block["shards"][0]["files"]["features"] |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(store.folder / "manifest.json", manifest | {"sha256": fingerprint(manifest["blocks"])})
    with pytest.raises(StoreError, match=name):
        store.read(block["task"], block["split"])
    assert not mark.exists()


@pytest.mark.parametrize("name", ["plan.json", "results.json", "ensemble.json", "oracle.json", "tasks.json"])
def test_a_finished_run_is_not_used_with_a_changed_digit(tmp_path, name):
    shutil.copytree(finished_run() / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    text = path.read_text(encoding="utf-8")
    place = next(i for i in range(len(text) - 1, 0, -1) if text[i].isdigit())
    path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :], encoding="utf-8")
    json.loads(path.read_text(encoding="utf-8"))
    uses = {
        "plan.json": lambda: load_run(tmp_path / "run").plan,
        "results.json": lambda: load_run(tmp_path / "run").results,
        "ensemble.json": lambda: load_run(tmp_path / "run").predict("family0_task0", ["x"]),
        "oracle.json": lambda: load_run(tmp_path / "run").ask(["family0_task0"]),
        "tasks.json": lambda: load_run(tmp_path / "run"),
    }
    with pytest.raises(StoreError, match=name):
        uses[name]()
    if name in ("plan.json", "results.json"):
        with pytest.raises(StoreError, match=name):
            pipeline.read_result(tmp_path / "run")


def test_an_adapter_that_was_swapped_for_another_does_not_predict(tmp_path):
    shutil.copytree(finished_run() / "run", tmp_path / "run")
    adapters = tmp_path / "run" / "adapters"
    first, second = (adapters / name / "adapter_model.safetensors" for name in ("group-0", "group-1"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(StoreError, match=r"group-0/adapter_model.safetensors: altered"):
        load_run(tmp_path / "run").predict("family0_task0", ["x"])


@pytest.mark.slow
def test_a_run_with_many_kinds_of_damage_mends_itself_and_ends_with_the_same_bits(tmp_path, caplog):
    recipe, run = copy_run(tmp_path), tmp_path / "run"
    flip_bit(run / "adapters" / "group-0" / "adapter_model.safetensors", -5)
    weights = run / "adapters" / "shared" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.popitem()
    save_file(tensors, weights, metadata={"format": "pt"})
    for name in ("affinity.npz", "plan.json", "oracle.json"):
        flip_bit(run / name, 8 * ((run / name).stat().st_size // 2))
    cut(run / "results.json", 20)
    flip_bit(run / "stages" / "combine.json", 333)
    with caplog.at_level(logging.WARNING):
        pipeline.run(read_config(recipe))
    assert tensors_of(tmp_path) == tensors_of(finished_run())
    for name in ("affinity.npz", "plan.json", "ensemble.json", "results.json"):
        assert (run / name).read_bytes() == (finished_run() / "run" / name).read_bytes(), name
    for stage in ("affinity", "train", "baselines"):
        assert f"stage {stage} is done again" in caplog.text


def test_a_missing_tensor_is_named(tmp_path):
    adapted = make_adapted("llama")
    save_adapter(adapted, THETA0, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    missing = sorted(tensors)[1]
    save_file({name: tensor for name, tensor in tensors.items() if name != missing}, weights, metadata={"format": "pt"})
    with pytest.raises(StoreError, match=f"1 tensors missing, unknown or of another shape, first '{missing}'"):
        load_adapter(adapted, "stranger", tmp_path)
    for size in (100, 7, 0):  # safetensors' own header, cut
        weights.write_bytes(weights.read_bytes()[:size])
        with pytest.raises(StoreError, match="can't be read"):
            load_adapter(adapted, "stranger", tmp_path)


def test_no_flipped_bit_of_an_archive_of_arrays_changes_a_number(tmp_path):
    path, values = tmp_path / "a.npz", {"x": np.arange(6.0).reshape(2, 3), "y": np.array(["a", "bc"])}
    save_arrays(path, values)
    whole, generator, n_refused = path.read_bytes(), random.Random(1), 0
    for bit in generator.sample(range(8 * len(whole)), 200):
        flip_bit(path, bit)
        try:
            found = load_arrays(path)
        except StoreError as error:
            assert "a.npz" in str(error)
            n_refused += 1
        else:
            assert all(np.array_equal(values[name], found[name]) for name in found)
        path.write_bytes(whole)
    assert n_refused > 60


def test_no_flipped_bit_of_a_journal_changes_an_entry(tmp_path):
    path = tmp_path / "journal.jsonl"
    written = {f"run {i}": {"identity": f"run {i}", "nll": 0.5 + i / 7, "tasks": ["ä", "b"]} for i in range(3)}
    for entry in written.values():
        append_line(path, entry)
    whole = path.read_bytes()
    bits = random.Random(2).sample(range(8 * len(whole)), 150)
    for bit in [*bits, *range(8 * len(whole) - 8, 8 * len(whole))]:
        flip_bit(path, bit)
        try:
            journal = Journal(path)
        except StoreError as error:
            assert "journal.jsonl line" in str(error)
        else:
            for name, entry in written.items():
                found = journal.find(name)
                assert found is None or {key: found[key] for key in entry} == entry
            if bit < 8 * (len(whole) - 1):  # the last line alone may count as unfinished
                assert journal.find("run 0") and journal.find("run 1")
        path.write_bytes(whole)


def test_lines_of_earlier_versions_have_no_checksum(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"identity": "a", "nll": 1.5}\n', encoding="utf-8")
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add("b", {"nll": 2.5})
    again = Journal(tmp_path / "journal.jsonl")
    assert again.find("a") == {"identity": "a", "nll": 1.5}
    assert again.find("b") == journal.find("b") == {"identity": "b", "nll": 2.5}


def test_a_seal_sees_every_change_and_holds_nothing_back(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights").write_bytes(bytes(range(64)))
    (folder / "note.json").write_text("{}", encoding="utf-8")
    assert "not whole" in (find_seal_fault(folder) or "")
    assert find_seal_fault(folder, may_lack_seal=True) is None
    assert find_seal_fault(tmp_path / "nowhere", may_lack_seal=True) is not None
    seal_folder(folder)
    assert find_seal_fault(folder) is None
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for damage in (*DAMAGE, Path.unlink):
            before = file.read_bytes()
            damage(file)
            assert find_seal_fault(folder) is not None or json.loads(before) == json.loads(file.read_bytes())
            file.write_bytes(before)
    assert find_seal_fault(folder) is None


# Caches: what may be left of another model, another file, or of better days


def test_kept_activations_with_a_flipped_bit_are_computed_again(tmp_path, caplog):
    split = make_split("verbalizer", n=6)
    batch = collate([(split, e) for e in range(6)], 0)
    expected = run_lower(with_cache(make_top(), tmp_path, [split], max_bytes=10**8), batch)
    (file,) = tmp_path.rglob("hidden.npy")
    written = file.read_bytes()
    for damage in DAMAGE:
        damage(file)
        found = run_lower(with_cache(make_top(), tmp_path, [split], max_bytes=10**8), batch)
        assert torch.equal(found, expected)
        assert file.read_bytes() == written
        assert f"{file}" in caplog.text and "computed again" in caplog.text
        caplog.clear()


def test_activations_that_the_disk_has_no_room_for_are_computed_each_time(tmp_path, capsys):
    split = make_split("verbalizer", n=6)
    batch = collate([(split, e) for e in range(6)], 0)
    expected = run_lower(with_cache(make_top(), tmp_path / "a", [split], max_bytes=10**8), batch)
    with files_limited(1000):
        found = run_lower(with_cache(make_top(), tmp_path / "b", [split], max_bytes=10**8), batch)
    real = torch.from_numpy(batch.attention_mask).bool()  # what is kept has zeros in place of padding
    torch.testing.assert_close(found[real], expected[real])
    assert not list((tmp_path / "b").rglob("*"))


def test_a_converted_model_with_a_flipped_bit_is_made_again(tmp_path, monkeypatch, empty_cache, caplog):
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        made.append(folder)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(bytes(100))

    monkeypatch.setattr(gguf, "_dequantise", convert)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for n_made in (1, 1):
        folder = gguf.convert_gguf(tmp_path / "model.gguf")
        assert len(made) == n_made
    flip_bit(folder / "model.safetensors", 77)
    assert gguf.convert_gguf(tmp_path / "model.gguf") == folder
    assert len(made) == 2 and "model.safetensors: altered" in caplog.text
    assert find_seal_fault(folder) is None
    (tmp_path / "model.gguf").write_bytes(b"another")
    assert gguf.convert_gguf(tmp_path / "model.gguf") != folder, "another file is another model"


def test_rows_of_another_file_with_the_same_name_size_and_time_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path, when = tmp_path / "toy.jsonl", (1_700_000_000, 1_700_000_000)

    def texts_of(letter: str) -> set[str]:
        write_rows(path, [{"text": f"{letter}{i:02d}", "label": i % 2} for i in range(40)])
        os.utime(path, when)
        (task,) = load_tasks(DataConfig(tasks=(str(path),)), seed=0).tasks
        return {example.context[0] for split in task.splits.values() for example in split}

    assert [texts_of(letter) for letter in "ab"] == [{"a"}, {"b"}]


@pytest.mark.slow
def test_a_run_whose_model_has_become_another_revision_uses_nothing_of_the_old_one(tmp_path, caplog):
    recipe = copy_run(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    model = {"name": str(tmp_path / "model")}
    with caplog.at_level(logging.WARNING):
        pipeline.run(read_config(recipe, model=model), until="affinity")
    assert "was finished with other inputs" in caplog.text and "done again from stage features on" in caplog.text
    pipeline.run(read_config(recipe, model=model, out=str(tmp_path / "fresh" / "run")), until="affinity")
    affinities = [(folder / "run" / "affinity.npz").read_bytes() for folder in (tmp_path, tmp_path / "fresh")]
    assert affinities[0] == affinities[1] != (finished_run() / "run" / "affinity.npz").read_bytes()
    assert not (tmp_path / "run" / "plan.json").exists(), "what was made of it is gone"


# No room: a write that fails part of the way leaves the old content, or nothing


def write_everything(folder: Path) -> None:
    """Every way in which the product writes a file, each larger than the limit."""
    folder.mkdir(exist_ok=True)
    large = np.arange(4000.0)
    ways = {
        "mapped": lambda: map_new_array(folder / "mapped.npy", (4000,), "f4"),
        "text": lambda: artifacts.write_text(folder / "a.txt", "x" * 9000),
        "json": lambda: artifacts.write_json(folder / "a.json", list(range(5000))),
        "array": lambda: save_array(folder / "a.npy", large),
        "arrays": lambda: save_arrays(folder / "a.npz", {"x": large}),
        "tensors": lambda: save_tensors(folder / "a.safetensors", {"x": torch.zeros(4000)}),
        "line": lambda: append_line(folder / "a.jsonl", {"identity": "x" * 9000}),
    }
    for name, write in ways.items():
        with pytest.raises(OutputError, match="can't be written") as caught:
            write()
        assert "\n" not in str(caught.value), name


def test_a_disk_without_room_is_an_output_error_and_leaves_no_half_file(tmp_path):
    append_line(tmp_path / "full" / "a.jsonl", {"identity": "before", "x": 1})
    with files_limited(4096):
        write_everything(tmp_path / "full")
        with pytest.raises(OutputError), atomic_folder(tmp_path / "folder") as scratch:
            (scratch / "weights").write_bytes(bytes(9000))
    assert not (tmp_path / "folder").exists() and not list(tmp_path.glob(".*"))
    left = {path.name for path in (tmp_path / "full").iterdir()} - {"a.safetensors", "mapped.npy"}  # unread as yet
    assert left == {"a.jsonl"}
    journal = Journal(tmp_path / "full" / "a.jsonl")
    assert journal.find("before") == {"identity": "before", "x": 1}
    assert journal.add("after", {"x": 2}) == Journal(journal.path).find("after")


FULL = """
import sys
from pathlib import Path
from tests.faults import fill_disk, mount_disk
if not mount_disk(sys.argv[1]):
    print("no disk of its own"), sys.exit()
from tests.test_faults_files import write_everything, fill_stores
folder = Path(sys.argv[1])
fill_disk(sys.argv[1], 1)
write_everything(folder)
fill_stores(folder)
print("told")
"""


def fill_stores(folder: Path) -> None:
    """Writers of mapped files: without room on the disk, touching one of their pages would kill the process."""
    block = FeatureStore(finished_run() / "run" / "features").read("family0_task0", "train")
    for path in folder.iterdir():
        if path.name != "filler":
            path.unlink()
    with pytest.raises(OutputError, match="No space left on device"):
        _join_files(folder / "joined.npy", [np.repeat(block.features, 99, axis=0)] * 2)
    (folder / "joined.npy").unlink()
    split = make_split("verbalizer", n=60)
    adapted = with_cache(make_top(), folder / "kept", [split], max_bytes=10**8)
    run_lower(adapted, collate([(split, e) for e in range(6)], 0))
    assert not list((folder / "kept").rglob("hidden.npy"))
    with pytest.raises(OSError, match="No space left"):
        _reserve(folder / "gradients", 10**5)


@pytest.mark.slow
def test_every_writer_is_told_of_a_disk_that_is_really_full_and_none_is_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "scripts", ROOT)))}
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.splitlines()[-1] in ("told", "no disk of its own")


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"null", b"[]", b'{"format": 2}', b"[" * 1100])
def test_files_of_a_run_that_hold_something_else_are_named(tmp_path, content):
    for name in ("run.json", "tasks.json", "config.yaml"):
        for file in ("run.json", "tasks.json", "config.yaml"):
            shutil.copy(finished_run() / "run" / file, tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EnsembleLoraError, match=name) as caught:
            load_run(tmp_path)
        assert "\n" not in str(caught.value)


def test_tensors_that_are_none_are_named(tmp_path):
    for content in (b"", b"\x80\x04}", (2**63).to_bytes(8, "little") + b"{}"):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(StoreError, match=r"a\.safetensors: can't be read"):
            load_tensors(tmp_path / "a.safetensors")


def test_a_run_goes_on_with_the_commit_of_the_model_that_it_was_begun_with(tmp_path, monkeypatch):
    recipe, run = copy_run(tmp_path), tmp_path / "run"
    environment = read_json(tmp_path, "environment.json")
    assert environment["model"]["revision"] is None, "a local folder has no commit"
    environment["model"]["revision"] = "a" * 40
    artifacts.write_json(run / "environment.json", environment)
    asked: list[str | None] = []

    def load(config, **options):
        asked.append(config.revision)
        raise ModelError("enough")

    for place in ("stages.request", "members"):
        monkeypatch.setattr(f"ensemblelora.{place}.load_base", load)
    model = [{}, {"revision": "main"}, {"name": "another/model"}]
    for changes in (*({"model": change} for change in model), {"out": str(tmp_path / "new")}):
        with pytest.raises(ModelError, match="enough"):
            pipeline.run(read_config(recipe, **changes))
    with pytest.raises(ModelError, match="enough"):
        load_run(run).predict("family0_task0", ["x"])
    assert asked == ["a" * 40, "main", None, None, "a" * 40]
