"""Look the pinned dependencies up among known vulnerabilities, where that can be done.

    python scripts/audit_dependencies.py

pip-audit's own dependencies clash with those of the development tools, so it is installed, pinned, in an environment of
its own, ``.audit/``, on the first call. Without a network, or where it takes too long, this says so and succeeds, so
that a machine without one can check everything else. A vulnerability that does not touch this package is named with the
reason in ``scripts/accepted_vulnerabilities.yaml``.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "requirements-demo.txt")
ACCEPTED = Path(__file__).with_name("accepted_vulnerabilities.yaml")
ENVIRONMENT = ROOT / ".audit"
PIN = "pip-audit==2.10.1"
SECONDS = 300


class UnavailableError(Exception):
    """The audit can't be made here; the message says why."""


def main() -> int:
    """Audit, and say what was found.

    Returns:
        1 if a dependency has a known vulnerability that is not accepted, or one that is accepted is gone; otherwise 0.
    """
    accepted = read_accepted(ACCEPTED)
    try:
        python = find_auditor(ENVIRONMENT)
        probe(python)
        report = ask(python, REQUIREMENTS)
    except UnavailableError as reason:
        print(f"dependencies not audited: {reason}", file=sys.stderr)
        return 0
    found = dict(list_faults(report))
    faults = [line for name, line in found.items() if name not in accepted]
    skipped = [package["name"] for package in report["dependencies"] if "skip_reason" in package]
    gone = [] if skipped else [name for name in accepted if name not in found]
    faults += [f"{ACCEPTED.name}: {name} is known no more; take it out" for name in gone]
    for line in faults:
        print(line, file=sys.stderr)
    told = f", {len(skipped)} of them unknown there ({', '.join(skipped[:5])})" if skipped else ""
    print(f"audited {len(report['dependencies'])} pinned packages{told}; {len(found)} known vulnerabilities")
    return 1 if faults else 0


def read_accepted(path: Path) -> dict[str, str]:
    """Read which vulnerabilities are accepted, by identifier, and why.

    Raises:
        ValueError: If one has no reason.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    for name, reason in entries.items():
        if not isinstance(reason, str) or len(reason.split()) < 5:
            raise ValueError(f"{path.name}: {name} has no reason; say in a sentence why it does not touch this package")
    return dict(entries)


def find_auditor(folder: Path) -> Path:
    """Return the Python that has pip-audit: this one, or that of an environment of its own, made if need be.

    Args:
        folder: Of that environment.

    Raises:
        UnavailableError: If it can't be installed.
    """
    if importlib.util.find_spec("pip_audit") is not None:
        return Path(sys.executable)
    python, mark = folder / "bin" / "python", folder / "pin.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") == PIN:
        return python
    venv.create(folder, clear=True)
    options = ["--python", str(python), "--disable-pip-version-check", "--retries", "0", "--timeout", "10"]
    try:
        _run([sys.executable, "-m", "pip", *options, "install", "--quiet", PIN])
    except UnavailableError:
        shutil.rmtree(folder)
        raise
    mark.write_text(PIN, encoding="utf-8")
    return python


def probe(python: Path) -> None:
    """Ask about one package, which is quick: some mirrors give packages, and tell nothing about them.

    Raises:
        UnavailableError: If there is no answer.
    """
    lines = REQUIREMENTS[0].read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "requirements.txt"
        first.write_text(next(line for line in lines if "==" in line), encoding="utf-8")
        ask(python, [first])


def ask(python: Path, requirements: Sequence[Path]) -> dict[str, Any]:
    """Return what pip-audit finds.

    Args:
        python: Has it.
        requirements: Files of pinned packages.

    Raises:
        UnavailableError: If it gives no answer, such as without a network.
    """
    files = [word for file in requirements for word in ("--requirement", str(file))]
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    # It ends with 1 where it found something; then there is an answer, too.
    answer = _run([str(python), "-m", "pip_audit", *files, *options], may_fail=True)
    try:
        report: dict[str, Any] = json.loads(answer)
        if all("skip_reason" in package for package in report["dependencies"]):
            raise UnavailableError("pypi.org, or what stands for it here, tells nothing about vulnerabilities")
    except (ValueError, KeyError, TypeError):
        raise UnavailableError((answer.strip().splitlines() or ["no answer"])[-1]) from None
    return report


def list_faults(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each vulnerability's identifier, and a line about it."""
    for package in report["dependencies"]:
        for fault in package.get("vulns", []):
            fixed = ", ".join(fault["fix_versions"]) or "no version yet"
            yield fault["id"], f"{package['name']} {package['version']}: {fault['id']}, mended in {fixed}"


def _run(command: list[str], *, may_fail: bool = False) -> str:
    """Return what a command says: its output, or where there is none its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"no answer within {SECONDS} seconds") from None
    if done.returncode and not may_fail:
        raise UnavailableError((done.stderr.strip().splitlines() or ["no answer"])[-1])
    return done.stdout or done.stderr


if __name__ == "__main__":
    sys.exit(main())
