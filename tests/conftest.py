"""Rules of the whole suite: no network, no cache of the user's, and no green that means skipped."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Read once, when a hub library is imported: no test reads or fills what this machine's user has.
_CACHES = Path(tempfile.mkdtemp(prefix="ensemblelora-caches-"))
atexit.register(shutil.rmtree, _CACHES, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = str(_CACHES)
os.environ["HF_HOME"] = str(_CACHES / "huggingface")
for _name in ("hub", "datasets", "modules"):
    os.environ[f"HF_{_name.upper()}_CACHE"] = str(_CACHES / "huggingface" / _name)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples every time, no time limit on a busy machine, and no folder left behind.
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if any test was skipped")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    n_skipped = len(terminalreporter.stats.get("skipped", []))
    verdict = ", and --no-skips forbids it" if n_skipped and config.getoption("--no-skips") else ""
    terminalreporter.write_line(f"tests skipped: {n_skipped}{verdict}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    is_worker = hasattr(session.config, "workerinput")
    if not is_worker and session.config.getoption("--no-skips") and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _isolated(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Keep a test from the user's caches and from every other machine."""
    if request.node.get_closest_marker("network") is None:
        connect = socket.socket.connect

        def refuse(self: socket.socket, address: object) -> None:
            if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
                pytest.fail(f"a test without the network marker connects to {address[0]}")
            connect(self, address)  # type: ignore[arg-type]

        monkeypatch.setattr(socket.socket, "connect", refuse)
    yield


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own, so that a conversion is tried afresh."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
