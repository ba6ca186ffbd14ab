"""What servers of many adapters load, what hubs read, and what is uploaded."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.numpy import save_file

from ensemblelora.cli import main
from ensemblelora.ensemble import Ensemble, Member
from ensemblelora.errors import OutputError, StoreError, UsageError
from ensemblelora.exporting import export_run
from ensemblelora.exporting.card import Origin, describe_member, write_header, write_origin
from ensemblelora.exporting.layout import VLLM_RANKS, Server, list_layout_faults
from ensemblelora.exporting.notes import BaseNote
from ensemblelora.exporting.push import push_export
from tests.test_exporting import MEMBERS, USED, make_run

BASE = BaseNote("org/base-1b", "org/base-1b", "bfloat16", "lm", 2)
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none",
    "modules_to_save": None, "use_dora": False,
}  # fmt: skip


def write_adapter(
    folder: Path, kinds: tuple[str, ...] = ("q_proj", "v_proj"), blocks: int = 2, r: int = 8, **changes: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for block in range(blocks):
        for kind in kinds:
            layer = f"base_model.model.model.layers.{block}.self_attn.{kind}"
            tensors[f"{layer}.lora_A.weight"] = np.zeros((r, 4), np.float32)
            tensors[f"{layer}.lora_B.weight"] = np.zeros((6, r), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | {"r": r} | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize("server", ["vllm", "lorax"])
def test_a_plain_lora_is_served(server: Server, tmp_path: Path) -> None:
    assert list_layout_faults(write_adapter(tmp_path), server, n_blocks=2, architecture="llama") == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"target_modules": []}, "target_modules: missing"),
    ],
)
@pytest.mark.parametrize("server", ["vllm", "lorax"])
def test_what_no_server_takes_is_told(changes: dict[str, Any], told: str, server: Server, tmp_path: Path) -> None:
    (fault,) = list_layout_faults(write_adapter(tmp_path, **changes), server)
    assert told in fault


def test_ranks_have_to_fit_what_vllm_is_started_with(tmp_path: Path) -> None:
    wide = write_adapter(tmp_path, r=24)
    (fault,) = list_layout_faults(wide, "vllm")
    assert "--max-lora-rank 32" in fault
    assert list_layout_faults(wide, "vllm", max_rank=32) == [] == list_layout_faults(wide, "lorax")
    assert "takes one of" in list_layout_faults(wide, "vllm", max_rank=48)[0] and 48 not in VLLM_RANKS
    (fault,) = list_layout_faults(write_adapter(tmp_path / "eight"), "vllm", max_rank=1)
    assert "fold" in fault


def test_tensors_that_are_no_pair_of_a_layer_are_told(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    tensors = {"base_model.model.layers.0.q_proj.lora_A.weight": np.zeros((4, 4), np.float32),
               "base_model.model.score.weight": np.zeros((2, 4), np.float32)}  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    faults = list_layout_faults(folder, "vllm")
    assert [fault.partition(":")[0] for fault in faults] == [
        "tensor base_model.model.score.weight", "layer layers.0.q_proj", "ranks [4]"
    ]  # fmt: skip
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StoreError, match="export again"):
        list_layout_faults(folder, "vllm")


def test_lorax_leaves_out_kinds_that_a_block_lacks_or_that_it_does_not_list(tmp_path: Path) -> None:
    upper = write_adapter(tmp_path, blocks=2)
    faults = list_layout_faults(upper, "lorax", n_blocks=4)
    assert [fault.partition(":")[0] for fault in faults] == ["q_proj", "v_proj"] and "2 of 4 blocks" in faults[0]
    assert list_layout_faults(upper, "vllm") == []
    odd = write_adapter(tmp_path / "odd", kinds=("q_proj", "query"))
    (fault,) = list_layout_faults(odd, "lorax", architecture="llama")
    assert fault == "query: LoRAX leaves it out for llama"
    assert "not among those" in list_layout_faults(odd, "lorax", architecture="bert")[0]


def make_origin(license: str | None = None) -> Origin:
    cards = [
        {"task": "news", "dataset_path": "org/news", "dataset_name": "v2", "metadata": {"license": "cc-by-4.0"}},
        {
            "task": "mine",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"train": "/home/me/x"}},
            "metadata": {},
        },
    ]
    entries = tuple({"card": card, "n_examples": {"train": 9, "validation": 3, "test": 5}} for card in cards)
    members = (
        Member("group-0", 0, "group", 1.0),
        Member("group-0-boost-1", 0, "booster", 0.3),
        Member("group-1", 1, "group", 1.0),
    )
    ensemble = Ensemble(("news", "mine"), ((0,), (1,)), members, ((1.0, 0.0), (0.5, 0.5)), (False, False), "logits")
    per_task = {"news": {"accuracy": 0.75}, "mine": {"accuracy": None}}
    boosted = {"news": {"accuracy": 0.625}, "mine": {"accuracy": None}}
    scores = {"ensemble": per_task, "own group": per_task, "boosted group": boosted}
    return Origin(entries, ensemble, scores, "lora", license)


def read_header(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(header))


def test_a_hub_reads_the_header_of_a_card() -> None:
    header = read_header(write_header(BASE, make_origin("apache-2.0")))
    assert header["base_model"] == "org/base-1b" and header["base_model_relation"] == "adapter"
    assert header["library_name"] == "peft" and header["license"] == "apache-2.0"
    assert header["datasets"] == ["org/news"] and "lora" in header["tags"]
    merged = read_header(write_header(BASE, make_origin(), is_merged=True))
    assert merged["library_name"] == "transformers" and "license" not in merged, "what nobody said is not made up"
    local = BaseNote("/models/mine", "/models/mine", "float32", "lm", 2)
    assert "base_model" not in read_header(write_header(local, make_origin()))


def test_a_card_says_what_was_trained_on_and_names_no_folder() -> None:
    text = write_origin(BASE, make_origin(), (0, 1))
    assert "| news | group-0 | org/news v2 | 9 | cc-by-4.0 | 0.7500 |" in text
    assert "| mine | group-1 | files of the user's | 9 | not stated |  |" in text
    assert "/home" not in text and "settle that before you publish" in text
    member = describe_member(BASE, make_origin(), "group-1")
    assert "| mine |" in member and "| news |" not in member and read_header(member)
    assert "multiplied with 0.3" in describe_member(BASE, make_origin(), "group-0-boost-1")


def test_a_members_card_has_the_scores_of_what_lies_beside_it() -> None:
    alone = describe_member(BASE, make_origin(), "group-0")
    assert "| 0.7500 |" in alone and "of this group's adapter alone on 5 test rows" in alone
    booster = describe_member(BASE, make_origin(), "group-0-boost-1")
    assert "| 0.6250 |" in booster and "of this group's adapter with its boosters on 5 test rows" in booster


@pytest.mark.parametrize("format", ["peft", "folded"])
def test_exports_of_a_run_are_served_and_have_cards(format: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    made = export_run(run, format=format, tolerance=100.0, license="mit")
    folders = [made.folder / member.name for member in MEMBERS] if format == "peft" else [made.folder]
    for folder in folders:
        for server in ("vllm", "lorax"):
            assert list_layout_faults(folder, server, architecture="llama", n_blocks=2) == []  # type: ignore[arg-type]
        assert read_header((folder / "README.md").read_text(encoding="utf-8"))["license"] == "mit"
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| {task} |" in card for task in USED) and str(tmp_path) not in card.split("## Trained on")[1]


class FakeHub:
    """Answers what the hub's client asks."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fault = fault

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        self.calls.append((repo_id, options))
        return f"https://hub/{repo_id}"

    def upload_folder(self, **options: Any) -> Any:
        files = sorted(path.name for path in Path(options["folder_path"]).rglob("*") if path.is_file())
        self.calls.append((options["repo_id"], {"files": files}))
        return SimpleNamespace()


def connect(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *a, **k: hub.create_repo(*a, **k))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **k: hub.upload_folder(**k))


def test_an_export_is_pushed_whole_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, hub := FakeHub())
    folder = write_adapter(tmp_path / "one")
    assert push_export(folder, "me/adapters") == "https://hub/me/adapters"
    (_, made), (name, sent) = hub.calls
    assert made["private"] and made["exist_ok"] and name == "me/adapters"
    assert sent["files"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_keeps_a_push_back_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("adapters", "me/a/b", "me/ad apters"):
        with pytest.raises(UsageError, match="expected ORG/NAME"):
            push_export(tmp_path, name)
    connect(monkeypatch, FakeHub(LocalTokenNotFoundError("no token")))
    with pytest.raises(UsageError, match="hf auth login"):
        push_export(tmp_path, "me/adapters")
    connect(monkeypatch, FakeHub(ConnectionError("no route\nto host")))
    with pytest.raises(OutputError, match="no route to host; try again with: hf upload me/adapters"):
        push_export(tmp_path, "me/adapters")


def test_the_command_exports_and_pushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    connect(monkeypatch, hub := FakeHub())
    run = make_run(tmp_path)
    assert main(["export", str(run), "--format", "peft", "--push", "nonsense"]) == 2
    assert not (run / "export").exists(), "a name that can't be is told of first"
    capsys.readouterr()
    assert main(["export", str(run), "--format", "peft", "--license", "mit", "--push", "me/adapters"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/adapters" and len(hub.calls) == 2


class Hub(BaseHTTPRequestHandler):
    """A hub on this machine: what the client's plain protocol asks of one, each file as a commit brought it."""

    files: ClassVar[dict[str, bytes]] = {}
    large: ClassVar[dict[str, bytes]] = {}
    made: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if b"gone" in body:
            self.close_connection = True
        elif self.headers.get("authorization") != "Bearer secret":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path.endswith("/repos/create"):
            self.made.append(json.loads(body))
            self.answer(200, {"url": f"{self.url}/me/adapters"})
        elif self.path.endswith("/validate-yaml"):
            self.answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            kinds = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": kinds[p.endswith(".safetensors")], "shouldIgnore": False} for p in paths]
            self.answer(200, {"files": modes})
        elif self.path.endswith("/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            places = [one | {"actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}} for one in wanted]
            self.answer(200, {"transfer": "basic", "objects": places})
        elif self.path == "/api/models/me/adapters/commit/main":
            self.take(map(json.loads, body.splitlines()))
            self.answer(200, {"commitUrl": f"{self.url}/me/adapters/commit/main", "commitOid": "a" * 40})
        else:
            self.answer(404, {"error": self.path})

    def take(self, lines: Iterable[dict[str, Any]]) -> None:
        for value in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
            large = self.large.get(value.get("oid", ""))
            self.files[value["path"]] = base64.b64decode(value["content"]) if large is None else large

    def do_PUT(self) -> None:
        self.large[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["content-length"]))
        self.answer(200, {})

    @property
    def url(self) -> str:
        return f"http://{self.headers['host']}"

    def answer(self, status: int, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# Without a token, with one, and to a hub that hangs up.
PUSHES = """
import os, sys
from ensemblelora.cli import main
def push(out, name, *more):
    return main(["export", sys.argv[1], "--format", "peft", "--out", out, "--push", name, *more])
codes = [push(sys.argv[2] + "/refused", "me/adapters")]
os.environ["HF_TOKEN"] = "secret"
codes += [push(sys.argv[2] + "/out", "me/adapters", "--license", "mit"), push(sys.argv[2] + "/lost", "me/gone")]
print(codes)
"""


@pytest.mark.slow
def test_the_hubs_own_client_brings_every_file_there(hub_url: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-c", PUSHES, str(make_run(tmp_path / "here")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "[2, 0, 2]", done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 2 and "push me/adapters" in told[0] and told[0].endswith("sign in with: hf auth login")
    assert "push me/gone" in told[1] and "try again with: hf upload me/gone" in told[1]
    assert f"{hub_url}/me/adapters" in done.stdout.splitlines()
    out = tmp_path / "out"
    assert Hub.files == {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (made,) = Hub.made
    assert (made["organization"], made["name"]) == ("me", "adapters") and "private" in (made.get("visibility"), *made)
    for name in ("README.md", *(f"{member.name}/README.md" for member in MEMBERS)):
        card = ModelCard(Hub.files[name].decode())
        assert card.data.license == "mit" and card.data.library_name == "peft" and "## Trained on" in card.text
