"""How anystore is tested: ``nox`` runs all that a machine without a GPU can, ``nox -l`` lists the sessions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.reuse_venv = "yes"

TEST = ["pytest>=8", "hypothesis>=6.100", "ml_dtypes"]
FOREIGN_SPECS = ["attrs", "dm-env", "gymnasium>=1.0"]
STRICT = ["array-api-strict>=2.4"]
CUPY = "cupy-cuda13x" if os.environ.get("ANYSTORE_CUDA") == "13" else "cupy-cuda12x"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

BACKENDS = {
    "numpy": ("", FOREIGN_SPECS),
    "numpy-min": ("", ["-c", "constraints-min.txt", *FOREIGN_SPECS]),
    "strict": ("", STRICT),
    "torch": ("[torch]", []),
    "jax": ("[jax]", []),
    "cupy": (f"[{CUPY}]", []),
    "all": ("[torch,jax]", [*STRICT, *FOREIGN_SPECS]),
}
"""The extra of anystore that the tests of each backend need, and what else; "all" has every library, so that values
of each meet stores of each."""
REQUIRED = {"strict": "array_api_strict", "torch": "torch", "jax": "jax", "all": "array_api_strict,torch,jax"}


def install(session: nox.Session, *packages: str, extra: str = "") -> None:
    session.install("-c", "constraints.txt", "-e", f".{extra}", *packages)


def run_tests(session: nox.Session, *arguments: str, **env: str) -> None:
    session.run("python", "-m", "pytest", *(session.posargs or arguments), env=env)


WITHOUT_TENSORFLOW = "--ignore-glob=tests/test_tf*.py"
"""These tests have sessions of their own."""


@nox.session
@nox.parametrize("backend", [nox.param(name, id=name) for name in BACKENDS])
def tests(session: nox.Session, backend: str) -> None:
    """The tests, with the library of one backend installed, which then must run."""
    extra, packages = BACKENDS[backend]
    install(session, *TEST, *packages, extra=extra)
    env = {"ANYSTORE_REQUIRE": os.environ.get("ANYSTORE_REQUIRE", REQUIRED.get(backend, ""))}
    if backend == "all":
        env["ANYSTORE_NO_SKIPS"] = "1"
    if backend == "cupy" and "cupy" not in env["ANYSTORE_REQUIRE"]:
        session.warn("without ANYSTORE_REQUIRE=cupy this session passes where there is no CUDA device to test on")
    run_tests(session, WITHOUT_TENSORFLOW, **env)


@nox.session(python=PYTHONS, default=False)
def pythons(session: nox.Session) -> None:
    """The tests with NumPy and array_api_strict, on every version of Python that is there."""
    install(session, *TEST, *FOREIGN_SPECS, *STRICT)
    run_tests(session, WITHOUT_TENSORFLOW, ANYSTORE_REQUIRE="array_api_strict")


@nox.session
def lint(session: nox.Session) -> None:
    """The rules of pyproject.toml, by ruff."""
    session.install("ruff==0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """The types, by mypy."""
    install(session, "mypy==2.4.1", "ml_dtypes", extra="[torch,jax]")
    session.run("mypy")


@nox.session
def demo(session: nox.Session) -> None:
    """A Q-learner that learns CartPole from a Storage."""
    install(session, extra="[examples]")
    Path("out").mkdir(exist_ok=True)
    session.run("python", "examples/cartpole.py", "--output", "out/cartpole.png", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """The tests against the wheel, in an environment that holds nothing else of this folder."""
    session.install("build")
    place = Path(session.create_tmp()).resolve()
    shutil.rmtree(place / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(place / "dist"), ".")
    (built,) = (place / "dist").glob("*.whl")
    session.run("python", "-m", "venv", "--clear", str(place / "venv"))
    python = str(place / "venv" / "bin" / "python")
    session.run(python, "-m", "pip", "install", "-q", str(built), *TEST, *FOREIGN_SPECS, *STRICT, external=True)
    for name in ("tests", "conftest.py", "pyproject.toml", "README.md"):
        copy = shutil.copytree if Path(name).is_dir() else shutil.copy
        target = place / "run" / name
        target.parent.mkdir(exist_ok=True)
        if target.is_dir():
            shutil.rmtree(target)
        copy(name, target)
    with session.chdir(place / "run"):
        required = "array_api_strict,compiled" if shutil.which("cc") else "array_api_strict"
        session.run(python, "-m", "pytest", WITHOUT_TENSORFLOW, env={"ANYSTORE_REQUIRE": required}, external=True)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The figures of the benchmarks, as ratios measured in one run."""
    install(session)
    session.run("python", "benchmarks/small_leaves.py", *session.posargs)
