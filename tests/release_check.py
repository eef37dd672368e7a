"""What must hold before a version is tagged: known vulnerabilities, the two packages, and an installation of each.

    python -m tests.release_check

Prints a line for every step: passed, failed, or not checked where a service could not be reached. Exit code 1 when a
step failed. Works in a temporary folder of about 1.5 GB, which it removes; needs git and a package index. Run it on a
clean checkout of the commit that will be tagged: the packages are built from the files that lie here.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SERVICES = ("pypi", "osv")  # of pip-audit; the second is asked for what the first leaves open
ARGUED: dict[str, str] = {}
"""Findings of pip-audit that do not matter here: an id -> the reason. Every other finding fails the check."""

WHEEL_FILES = ("*.py", "published_gpt2.json", "py.typed")
OF_THE_CORE = {"filelock", "jinja2", "tqdm"}  # extras name them too, but torch and huggingface-hub bring them anyway


class FailedError(Exception):
    """A step found something wrong; the message is a sentence."""


class NotCheckedError(Exception):
    """A step could not find out; the message is a sentence."""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Run a command and return what it printed. FailedError, with the last line that it wrote, when that goes wrong.

    Pins hold inside pip's and build's environments of their own too, hatchling's among them.
    """
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pins = {"PIP_CONSTRAINT": str(CONSTRAINTS), "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS)}  # before pip 25.3, and after
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**outer, **pins, **variables})
    except OSError as error:
        raise FailedError(f"`{command[0]}` cannot be run: {error}.") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise FailedError(
            f"`{' '.join(map(str, command))}` exited with {done.returncode} and said: {said.rstrip('.')}."
        )
    return done.stdout


# Known vulnerabilities


def ask(service: str, cache: Path) -> list[dict[str, Any]] | str:
    """What pip-audit knows about every pin, or a sentence when its service gave no answer."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--desc", "off"]
    command = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), *options, "-s", service]
    done = subprocess.run([*command, "--cache-dir", str(cache)], capture_output=True, text=True)
    try:
        return list(json.loads(done.stdout)["dependencies"])
    except ValueError:
        return f"{service} gave no answer ({(done.stderr.strip() or 'nothing was said').splitlines()[-1][:110]})"


def findings_of(package: dict[str, Any]) -> dict[str, str | None]:
    """Every finding about a package, in words, and the argument why it does not matter; None where there is none."""
    found = {}
    for finding in package.get("vulns", []):
        argument = next(filter(None, map(ARGUED.get, (finding["id"], *finding.get("aliases", [])))), None)
        fixed = ", ".join(finding["fix_versions"]) or "no version"
        found[f"{package['name']} {package['version']}: {finding['id']} (fixed in {fixed})"] = argument
    return found


def audit(work: Path) -> str:
    """No pin has a known vulnerability that nobody has argued.

    pip-audit exits with 0 when it finds no page of a package; so what it answers is counted, not its exit code.
    """
    pins = {canonicalize_name(line.split("==")[0]) for line in CONSTRAINTS.read_text().split()}
    open_, reasons, findings = set(pins), [], dict[str, str | None]()
    for service in SERVICES:
        answer = ask(service, work / "audit")
        if isinstance(answer, str):
            reasons.append(answer)
            continue
        known = {canonicalize_name(package["name"]): package for package in answer if "skip_reason" not in package}
        reasons.append(f"{service} answered for {len(known)} of {len(pins)} pins")
        for package in known.values():
            findings |= findings_of(package)
        open_ -= known.keys()
        if not open_:
            break
    if unargued := [finding for finding, argument in findings.items() if argument is None]:
        raise FailedError(f"{'; '.join(unargued)}. Take a fixed version, or argue the finding in ARGUED.")
    argued = "; ".join(f"{finding}: {argument}" for finding, argument in findings.items()) or "no finding"
    if open_:
        names = "every pin" if open_ == pins else ", ".join(sorted(open_))
        raise NotCheckedError(f"{names}: {'; '.join(reasons)}. In what was answered: {argued}.")
    return f"{len(pins)} pins, {argued}."


# The packages


def build_once(folder: Path) -> dict[str, str]:
    """Build the sdist, and the wheel from it, into a folder: the sha256 of each by its file's name."""
    moment = run("git", "log", "-1", "--format=%ct").strip()
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, SOURCE_DATE_EPOCH=moment)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def build(work: Path) -> str:
    """Two builds give the same bytes."""
    first, second = build_once(work / "first"), build_once(work / "second")
    if first != second:
        raise FailedError(f"Two builds differ: {first} and {second}.")
    changed = len(run("git", "status", "--porcelain").splitlines())
    commit = run("git", "rev-parse", "--short", "HEAD").strip()
    state = f" with {changed} changed files: commit them before a release" if changed else ""
    hashes = ", ".join(f"{name} has sha256 {digest}" for name, digest in first.items())
    return f"{hashes}, both times, from commit {commit}{state}."


def package(work: Path, pattern: str) -> Path:
    """The built wheel or sdist. FailedError when there is none."""
    found = sorted((work / "first").glob(pattern))
    if len(found) != 1:
        raise FailedError(f"{len(found)} files {pattern} were built; expected one.")
    return found[0]


def check_wheel(work: Path) -> str:
    """The wheel holds the library, all of it, and nothing else."""
    names = set(zipfile.ZipFile(package(work, "*.whl")).namelist())
    names = {name for name in names if not name.startswith(f"minigpt-{PROJECT['version']}.dist-info/")}
    library = {f"minigpt/{path.name}" for pattern in WHEEL_FILES for path in (ROOT / "minigpt").glob(pattern)}
    if names != library:
        raise FailedError(f"Too much: {sorted(names - library)}; missing: {sorted(library - names)}.")
    return f"{len(names)} files of minigpt, and its dist-info."


def check_sdist(work: Path) -> str:
    """The sdist holds files of this checkout alone: no leftovers, and no weights that git does not track."""
    top = f"minigpt-{PROJECT['version']}/"
    with tarfile.open(package(work, "*.tar.gz")) as archive:
        names = {member.name.removeprefix(top) for member in archive.getmembers()} - {"PKG-INFO"}
    tracked = set(run("git", "ls-files").splitlines())
    new = set(run("git", "ls-files", "--others", "--exclude-standard").splitlines())
    strange = {name for name in names - tracked if name not in new or name.startswith("weights/")}
    if strange:
        raise FailedError(f"Leftovers, or files that git does not know: {sorted(strange)}.")
    left_out = sorted(tracked - names)
    return f"{len(names)} files of the checkout; of those that git tracks, without {', '.join(left_out) or 'none'}."


# Installations


def extras() -> set[str]:
    """The packages that the extras name and a plain installation must not bring."""
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    named: set[str] = {canonicalize_name(Requirement(line).name) for line in lines}
    return named - {"minigpt"} - OF_THE_CORE


def try_out(work: Path) -> str:
    """What the installed command says of weights/tiny, run outside the checkout. FailedError when it does not run."""
    binaries, outside = work / "venv" / "bin", work / "outside"
    outside.mkdir(exist_ok=True)
    where = run(binaries / "python", "-c", "import minigpt; print(minigpt.__file__)", cwd=outside).strip()
    if not Path(where).is_relative_to(work / "venv"):
        raise FailedError(f"`import minigpt` found {where}; expected the installation.")
    return run(binaries / "minigpt", "verify", ROOT / "weights" / "tiny", cwd=outside).splitlines()[0]


def install(work: Path, *arguments: str | Path) -> None:
    """Install with the pins into the empty environment, which the first call makes."""
    if not (work / "venv").exists():
        run(sys.executable, "-m", "venv", work / "venv")
    run(work / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, *arguments)


def install_wheel(work: Path) -> str:
    """The wheel runs in an environment that holds nothing but it and what it needs."""
    install(work, package(work, "*.whl"))
    listed = json.loads(run(work / "venv" / "bin" / "python", "-m", "pip", "list", "--format", "json"))
    names = {canonicalize_name(entry["name"]) for entry in listed}
    if unwanted := names & extras():
        raise FailedError(f"A plain installation brought {sorted(unwanted)}, which belong to extras.")
    return f"{len(names)} packages, none of the {len(extras())} that only extras name; {try_out(work)}"


def install_sdist(work: Path) -> str:
    """The sdist, put in the wheel's place, runs too."""
    install(work, "--no-deps", "--force-reinstall", package(work, "*.tar.gz"))
    return f"in the wheel's place; {try_out(work)}"


STEPS: dict[str, Callable[[Path], str]] = {
    "known vulnerabilities": audit,
    "two builds": build,
    "the wheel": check_wheel,
    "the sdist": check_sdist,
    "the wheel installed": install_wheel,
    "the sdist installed": install_sdist,
}


def outcome(step: Callable[[Path], str], work: Path) -> tuple[str, str]:
    """Passed, failed or not checked, and the step's sentence."""
    try:
        return "passed", step(work)
    except FailedError as error:
        return "failed", str(error)
    except NotCheckedError as error:
        return "not checked", str(error)


def main() -> int:
    """Take every step; 1 when one failed."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="minigpt-release-") as folder:
        for name, step in STEPS.items():
            word, sentence = outcome(step, Path(folder).resolve())
            print(f"{name}: {word}: {sentence}", flush=True)
            outcomes.append(word)
    print(", ".join(f"{outcomes.count(word)} {word}" for word in ("passed", "failed", "not checked")))
    return int("failed" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
