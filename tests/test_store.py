"""The feature store keeps what was written, or says why it can't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblelora import store as store_module
from ensemblelora.errors import StoreError
from ensemblelora.files import fingerprint
from ensemblelora.store import FeatureBlock, FeatureStore, helmert

N_CLASSES, PROJ_DIM = 4, 6


def make_rows(n: int, *, mode: str = "contrast", seed: int = 0, first: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    n_outputs = N_CLASSES - 1 if mode == "contrast" else 1
    n_choices = rng.integers(2, N_CLASSES + 1, n) if mode == "contrast" else np.full(n, 2)
    labels = rng.integers(0, n_choices) if mode in ("margin", "contrast") else np.zeros(n, dtype=int)
    return {
        "outputs": rng.normal(size=(n, n_outputs)).astype(np.float32),
        "features": rng.normal(size=(n, n_outputs, PROJ_DIM)).astype(np.float32),
        "labels": labels,
        "n_choices": n_choices,
        "squared_norms": rng.random(n).astype(np.float32),
        "groups": rng.integers(0, 3, n),
        "ids": tuple(f"train:{first + e}" for e in range(n)),
    }


def write(store: FeatureStore, task: str, n: int = 5, *, fingerprint: str = "f", seed: int = 0) -> dict[str, Any]:
    rows = make_rows(n, seed=seed)
    with store.writer(task, "train", fingerprint, mode="contrast") as writer:
        writer.append(**rows)
    return rows


def only_file(store: FeatureStore, pattern: str) -> Path:
    (path,) = store.folder.glob(f"*/{pattern}")
    return path


def assert_holds(block: FeatureBlock, rows: dict[str, Any]) -> None:
    for name in ("outputs", "features", "labels", "n_choices", "squared_norms", "groups"):
        np.testing.assert_array_equal(getattr(block, name), rows[name])
    assert block.ids == tuple(rows["ids"])


@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_contrasts_are_orthonormal_and_sum_to_zero(n_classes: int) -> None:
    contrasts = helmert(n_classes)
    np.testing.assert_allclose(contrasts @ contrasts.T, np.eye(n_classes - 1), atol=1e-14)
    np.testing.assert_allclose(contrasts.sum(axis=1), 0, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6))
def test_contrasts_reproduce_the_softmax(logits: list[float]) -> None:
    z = np.array(logits)
    contrasts = helmert(len(z))
    back = contrasts.T @ (contrasts @ z)
    np.testing.assert_allclose(back, z - z.mean(), atol=1e-12)


def test_one_class_has_no_contrasts() -> None:
    with pytest.raises(StoreError, match=r"1 class.*expected 2"):
        helmert(1)


@pytest.mark.parametrize("mode", ["margin", "logodds", "sequence"])
def test_two_class_decoders_give_softplus_of_the_output(mode: str) -> None:
    rows = make_rows(8, mode=mode)
    block = FeatureBlock("t", "train", mode, **_as_typed(rows))  # type: ignore[arg-type]
    logits = block.outputs @ block.decoder.T
    nll = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(8), block.labels]
    signs = np.where(block.labels == 1, 1, -1) if mode == "margin" else 1
    np.testing.assert_allclose(nll, np.logaddexp(0, -signs * block.outputs[:, 0]), rtol=1e-6)


def test_contrast_decoder_inverts_the_contrasts_and_masks_absent_classes() -> None:
    block = FeatureBlock("t", "train", "contrast", **_as_typed(make_rows(8)))
    assert block.decoder.shape == (N_CLASSES, N_CLASSES - 1)
    np.testing.assert_array_equal(block.decoder, helmert(N_CLASSES).T)
    np.testing.assert_array_equal(block.class_mask.sum(axis=1), block.n_choices)
    assert block.class_mask[:, 0].all()


def test_take_keeps_every_array_in_the_asked_order() -> None:
    rows = make_rows(6)
    taken = FeatureBlock("t", "train", "contrast", **_as_typed(rows)).take([4, 0])
    assert taken.ids == ("train:4", "train:0")
    np.testing.assert_array_equal(taken.features, rows["features"][[4, 0]])
    np.testing.assert_array_equal(taken.labels, rows["labels"][[4, 0]])


def test_written_rows_come_back_memory_mapped(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features")
    rows = write(store, "rte")
    block = store.read("rte", "train")
    assert_holds(block, rows)
    assert isinstance(block.features, np.memmap)
    assert (block.mode, block.n_examples, block.n_outputs, block.proj_dim) == ("contrast", 5, 3, PROJ_DIM)
    assert {array.dtype for array in (block.outputs, block.features, block.squared_norms)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("shard_bytes", [1, 200, 10**9])
def test_pieces_and_shards_do_not_change_what_is_read(tmp_path: Path, shard_bytes: int) -> None:
    store = FeatureStore(tmp_path)
    pieces = [make_rows(n, seed=n, first=10 * n) for n in (3, 0, 1, 4)]
    with store.writer("t", "train", "f", mode="contrast", shard_bytes=shard_bytes) as writer:
        for piece in pieces:
            writer.append(**piece)
    together = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0] if name != "ids"}
    assert_holds(store.read("t", "train"), {**together, "ids": [text for piece in pieces for text in piece["ids"]]})


def test_a_writer_holds_at_most_one_shard(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with store.writer("t", "train", "f", mode="contrast", shard_bytes=1) as writer:
        for e in range(3):
            writer.append(**make_rows(1, first=e))
            assert len(list(tmp_path.glob("*/features-*.npy"))) == e + 1


def test_appended_arrays_may_be_reused_by_the_caller(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    rows = make_rows(3)
    expected = rows["features"].copy()
    with store.writer("t", "train", "f", mode="contrast") as writer:
        writer.append(**rows)
        rows["features"][:] = 0
    np.testing.assert_array_equal(store.read("t", "train").features, expected)


def test_only_the_same_fingerprint_counts_as_there(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    assert not store.has("t", "train", "f")
    write(store, "t")
    assert FeatureStore(tmp_path).has("t", "train", "f")
    assert not store.has("t", "train", "g")
    assert not store.has("t", "validation", "f")


def test_a_new_fingerprint_replaces_the_old_block_and_no_other(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    kept = write(store, "a")
    write(store, "b", fingerprint="old", seed=1)
    rows = write(store, "b", fingerprint="new", seed=2)
    assert store.has("b", "train", "new") and not store.has("b", "train", "old")
    assert_holds(store.read("b", "train"), rows)
    assert_holds(store.read("a", "train"), kept)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_an_error_while_writing_keeps_the_old_block(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    rows = write(store, "t")
    with pytest.raises(KeyboardInterrupt), store.writer("t", "train", "g", mode="contrast", shard_bytes=1) as writer:
        writer.append(**make_rows(2, seed=5))
        raise KeyboardInterrupt
    assert store.has("t", "train", "f")
    assert_holds(store.read("t", "train"), rows)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_a_killed_writer_leaves_no_block_and_its_files_go_with_the_next(tmp_path: Path) -> None:
    code = "import os, sys; sys.path[:0] = sys.argv[2:]; import test_store\n"
    code += "from ensemblelora.store import FeatureStore\n"
    code += "with FeatureStore(sys.argv[1]).writer('t', 'train', 'f', mode='contrast', shard_bytes=1) as writer:\n"
    code += "    writer.append(**test_store.make_rows(2))\n"
    code += "    os._exit(9)"
    paths = [str(Path(store_module.__file__).parents[1]), str(Path(__file__).parent)]
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path), *paths], check=False).returncode == 9
    store = FeatureStore(tmp_path)
    assert len(list(tmp_path.glob("*/features-*.npy"))) == 1
    assert not store.has("t", "train", "f")
    write(store, "t")
    assert len(list(tmp_path.glob("*/features-*.npy"))) == 1


@pytest.mark.parametrize("task", ["../../etc/passwd", "a/b", "", "..", "CON", "<script>", "ü" * 300, "a\nb", "*[?]"])
def test_no_task_name_leaves_the_folder(tmp_path: Path, task: str) -> None:
    store = FeatureStore(tmp_path / "in" / "features")
    rows = write(store, task)
    assert_holds(store.read(task, "train"), rows)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and store.folder not in path.parents]
    assert outside == []


def test_names_that_look_alike_stay_apart(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    rows = {task: write(store, task, seed=k) for k, task in enumerate(["a/b", "a_b", "a b", "x" * 90, "x" * 91])}
    for task, expected in rows.items():
        assert_holds(store.read(task, "train"), expected)


@pytest.mark.parametrize("pattern", ["features-00000.npy", "labels-00000.npy", "ids-00000.json"])
def test_a_truncated_file_is_named_with_its_remedy(tmp_path: Path, pattern: str) -> None:
    store = FeatureStore(tmp_path)
    write(store, "t")
    path = only_file(store, pattern)
    path.write_bytes(path.read_bytes()[:-3])
    for verify in (True, False):
        with pytest.raises(StoreError, match=rf"{pattern}.*truncated.*delete .* and run again"):
            store.read("t", "train", verify=verify)


@pytest.mark.parametrize("pattern", ["features-00000.npy", "outputs-00000.npy", "ids-00000.json"])
def test_a_flipped_bit_is_found_even_after_a_good_read(tmp_path: Path, pattern: str) -> None:
    store = FeatureStore(tmp_path)
    write(store, "t")
    store.read("t", "train")
    path = only_file(store, pattern)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StoreError, match=rf"{pattern}.*SHA-256.*delete .* and run again"):
        store.read("t", "train")


def test_an_intact_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path)
    write(store, "t")
    store.read("t", "train")
    monkeypatch.setattr("ensemblelora.store.file_sha256", lambda path: pytest.fail(f"{path} hashed again"))
    store.read("t", "train")
    FeatureStore(tmp_path).read("t", "train")


def test_the_remedy_works(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    write(store, "t")
    folder = only_file(store, "features-00000.npy").parent
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert not store.has("t", "train", "f")
    rows = write(store, "t", seed=3)
    assert_holds(store.read("t", "train"), rows)


def test_pickles_are_refused(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    write(store, "t")
    path = only_file(store, "labels-00000.npy")
    np.save(path, np.array([{}] * 5, dtype=object), allow_pickle=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["blocks"][0]["shards"][0]["files"]["labels"]["bytes"] = path.stat().st_size
    manifest["sha256"] = fingerprint(manifest["blocks"])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"labels-00000\.npy"):
        store.read("t", "train", verify=False)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"blocks": []}', '{"format": 1, "blocks": [], "sha256": "0"}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json.*delete .* and run"):
        FeatureStore(tmp_path).read("t", "train")


def test_a_manifest_of_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": 9, "blocks": [], "sha256": "0"}')
    with pytest.raises(StoreError, match="format 9, this version reads 1"):
        FeatureStore(tmp_path).read("t", "train")


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no features of task 'cb', validation; run the features stage"):
        FeatureStore(tmp_path).read("cb", "validation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((5, 2, PROJ_DIM))}, "expected .n, c. and .n, c, proj_dim."),
        ({"outputs": np.zeros(5)}, "expected .n, c."),
        ({"labels": np.zeros(4)}, "labels has shape .4,., expected 5 rows"),
        ({"groups": np.zeros((5, 1))}, "groups has shape"),
        ({"ids": ("a",) * 5}, "written twice"),
        ({"labels": np.full(5, N_CLASSES)}, "label is not below"),
        ({"labels": np.full(5, -1)}, "label is not below"),
        ({"n_choices": np.full(5, N_CLASSES + 1)}, r"n_choices outside 1\.\.4"),
        ({"features": np.full((5, 3, PROJ_DIM), np.nan)}, "features of example 'train:0' are not finite"),
        ({"outputs": np.full((5, 3), np.inf)}, "outputs of example 'train:0' are not finite"),
    ],
)
def test_rows_that_cannot_be_right_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    store = FeatureStore(tmp_path)
    with pytest.raises(StoreError, match=message), store.writer("t", "train", "f", mode="contrast") as writer:
        writer.append(**{**make_rows(5), **change})
    assert not store.has("t", "train", "f")


def test_modes_hold_their_own_shapes_and_labels(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with pytest.raises(StoreError, match="one output"), store.writer("t", "train", "f", mode="margin") as writer:
        writer.append(**make_rows(2))
    wrong = {**make_rows(2, mode="sequence"), "labels": np.array([0, 1])}
    with pytest.raises(StoreError, match="all be 0"), store.writer("t", "train", "f", mode="sequence") as writer:
        writer.append(**wrong)
    with pytest.raises(StoreError, match="output mode 'x'"):
        store.writer("t", "train", "f", mode="x")  # type: ignore[arg-type]


def test_later_rows_must_fit_the_first(tmp_path: Path) -> None:
    other = {**make_rows(2, first=7), "features": np.zeros((2, 3, PROJ_DIM + 1))}
    with (
        pytest.raises(StoreError, match=r"\(3, 7\) after rows of shape \(3, 6\)"),
        FeatureStore(tmp_path).writer("t", "train", "f", mode="contrast") as writer,
    ):
        writer.append(**make_rows(2))
        writer.append(**other)


def test_an_example_may_not_come_twice(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=r"written twice \(train:1\)"),
        FeatureStore(tmp_path).writer("t", "train", "f", mode="contrast") as writer,
    ):
        writer.append(**make_rows(2))
        writer.append(**make_rows(2, first=1))


def test_a_block_without_rows_is_refused(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    with pytest.raises(StoreError, match="no rows"), store.writer("t", "train", "f", mode="contrast"):
        pass
    assert not store.has("t", "train", "f")


def _as_typed(rows: dict[str, Any]) -> dict[str, Any]:
    return {**rows, "labels": rows["labels"].astype(np.int64)}
