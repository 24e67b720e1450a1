"""How anystore is tested: ``nox`` runs all that a machine without a GPU can, ``nox -l`` lists the sessions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.reuse_venv = "yes"

TEST = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ml_dtypes"]
# A class to each process, so that what a library compiles for one test serves the others of its class.
SIDE_BY_SIDE = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadscope"]
FOREIGN_SPECS = ["attrs", "dm-env", "gymnasium>=1.0"]
STRICT = ["array-api-strict>=2.4"]
CUPY = "cupy-cuda13x" if os.environ.get("ANYSTORE_CUDA") == "13" else "cupy-cuda12x"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

TF_AGENTS = ["tf-agents==0.19.0", "tensorflow==2.15.1", "numpy==1.26.4"]
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}

BACKENDS = {
    "numpy": ("", FOREIGN_SPECS),
    "numpy-min": ("", ["-c", "constraints-min.txt", *FOREIGN_SPECS]),
    "strict": ("", STRICT),
    "torch": ("[torch]", []),
    "jax": ("[jax]", []),
    "cupy": (f"[{CUPY}]", []),
    "all": ("[torch,jax]", [*STRICT, *FOREIGN_SPECS, "rich>=13"]),
}
"""The extra of anystore that the tests of each backend need, and what else; "all" has every library, so that values
of each meet stores of each."""
REQUIRED = {"strict": "array_api_strict", "torch": "torch", "jax": "jax", "all": "array_api_strict,torch,jax"}


def install(session: nox.Session, *packages: str, extra: str = "") -> None:
    session.install("-c", "constraints.txt", "-e", f".{extra}", *packages)


def run_tests(session: nox.Session, *arguments: str, **env: str) -> None:
    session.run("python", "-m", "pytest", *SIDE_BY_SIDE, *(session.posargs or arguments), env=env)


WITHOUT_TENSORFLOW = "--ignore-glob=tests/test_tf*.py"
"""These tests have sessions of their own."""
WITHOUT_FAULTS = [
    f"--ignore=tests/test_{name}.py" for name in ("snapshot_faults", "snapshot_damage", "replay_interrupts")
]
"""These take long, and know of no library but NumPy: they run in one session."""
OF_ONE_LIBRARY = [f"--ignore=tests/test_{name}.py" for name in ("replay_samplers", "replay_model", "sum_tree")]
"""In these no library meets another: they run where each is alone."""


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
    left_out = [] if backend == "numpy" else WITHOUT_FAULTS
    if backend == "all":
        left_out = [*WITHOUT_FAULTS, *OF_ONE_LIBRARY]
    run_tests(session, WITHOUT_TENSORFLOW, *left_out, **env)


@nox.session
def tensorflow(session: nox.Session) -> None:
    """NumpyStorage and NumpyState with the newest TensorFlow and without TF-Agents, on every backend."""
    install(session, *TEST, *STRICT, extra="[tensorflow,torch,jax]")
    run_tests(
        session,
        "tests/test_tf.py",
        "tests/test_tf_to_library.py",
        "tests/test_tf_replay.py",
        "--doctest-modules",
        "anystore/tf.py",
        ANYSTORE_REQUIRE="array_api_strict,torch,jax",
        **QUIET,
    )


@nox.session(python="3.11")
def tf_agents(session: nox.Session) -> None:
    """The same beside TF-Agents: its own classes compared with ours, its replay buffers and agents on top of ours."""
    install(session, *TEST, *TF_AGENTS)
    run_tests(session, "tests/test_tf.py", "tests/test_tf_agents.py", **QUIET)
    session.run("python", "-W", "ignore", "examples/tf_agents_dqn.py", env=QUIET)


@nox.session(python=PYTHONS, default=False)
def pythons(session: nox.Session) -> None:
    """The tests with NumPy and array_api_strict, on every version of Python that is there."""
    install(session, *TEST, *FOREIGN_SPECS, *STRICT)
    run_tests(session, WITHOUT_TENSORFLOW, ANYSTORE_REQUIRE="array_api_strict")


@nox.session
def kernels(session: nox.Session) -> None:
    """The CUDA source compiled for three generations of GPUs, no warning allowed, and run on the CPU."""
    install(session, *TEST, "nvidia-cuda-nvrtc-cu12")
    for chosen in ("TestCompiles", "TestKernelsOnACpu or TestLeafTable"):  # each fails if it finds no test to run
        run_tests(session, "tests/test_kernels.py", "-k", chosen)


@nox.session
def lint(session: nox.Session) -> None:
    """The rules of pyproject.toml, by ruff."""
    session.install("ruff==0.17.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """The types, by mypy."""
    install(session, "mypy==2.4.1", "ml_dtypes", "rich>=13", extra="[torch,jax]")
    session.run("mypy")


@nox.session
def demo(session: nox.Session) -> None:
    """A Q-learner that learns CartPole from a Storage."""
    install(session, extra="[examples]")
    Path("out").mkdir(exist_ok=True)
    session.run("python", "examples/cartpole.py", "--output", "out/cartpole.png", *session.posargs)


@nox.session
def demo_replay(session: nox.Session) -> None:
    """DQN that solves CartPole from a replay buffer, learner and buffer in several libraries; Pong frame by frame."""
    install(session, extra="[examples,torch,jax]")
    Path("out").mkdir(exist_ok=True)
    session.run("python", "examples/dqn.py", "--learner", "torch", *session.posargs)
    session.run("python", "examples/dqn.py", "--learner", "jax", "--backend", "torch", *session.posargs)
    session.run("python", "examples/pong_frames.py", "--steps", "5000", "--output", "out/pong.png")


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
        session.run(
            python, "-m", "pytest", *SIDE_BY_SIDE, WITHOUT_TENSORFLOW, env={"ANYSTORE_REQUIRE": required}, external=True
        )


PEERS = {
    "numpy": [],
    "torch": ["torch"],
    "jax": ["jax"],
    "tf_agents": TF_AGENTS,
    "torchrl": ["torch", "torchrl"],
    "cpprb": ["cpprb"],
    "flashbax": ["flashbax"],
    "stable_baselines3": ["torch", "stable-baselines3"],
    "tianshou": ["torch", "tianshou"],
    "rlox": ["torch", "rlox"],
    "pyribs": ["ribs"],
}
"""What each environment of the benchmarks holds besides anystore."""


@nox.session(default=False, python="3.11")
@nox.parametrize("peer", [nox.param(name, id=name) for name in PEERS])
def bench_beside(session: nox.Session, peer: str) -> None:
    """Measure anystore and NumPy by hand beside a peer, in the peer's own environment."""
    install(session, *PEERS[peer])
    output = f"benchmarks/results/raw/{peer}.json"
    session.run("python", "-W", "ignore", "-m", "benchmarks.measure", peer, "--output", output, *session.posargs)


REPLAY = ["anystore", "cpprb", "torchrl", "flashbax", "stable_baselines3", "tianshou", "tf_agents"]
SNAPSHOTS = {"numpy": [], "torchrl": PEERS["torchrl"], "tensorflow": TF_AGENTS}


@nox.session(default=False, python="3.11")
@nox.parametrize("peer", [nox.param(name, id=name) for name in REPLAY])
def bench_replay(session: nox.Session, peer: str) -> None:
    """Measure anystore.replay beside a peer, in the peer's own environment; alone: what it costs by size."""
    install(session, *PEERS.get(peer, []))
    if peer == "torchrl":
        session.run("python", "-W", "ignore", "-m", "benchmarks.torchrl_extension")
    session.run("python", "-W", "ignore", "-m", "benchmarks.replay", peer, *session.posargs, env=QUIET)


@nox.session(default=False, python="3.11")
@nox.parametrize("peer", [nox.param(name, id=name) for name in SNAPSHOTS])
def bench_snapshots(session: nox.Session, peer: str) -> None:
    """Measure snapshots beside plain writing and reading, and what a peer has of the kind."""
    install(session, *SNAPSHOTS[peer])
    session.run("python", "-W", "ignore", "-m", "benchmarks.snapshots", peer, *session.posargs, env=QUIET)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """All benchmarks, one peer after the other, and then the tables and pictures in benchmarks/results."""
    for peer in PEERS:
        session.notify(f"bench_beside({peer})", posargs=session.posargs)
    for peer in REPLAY:
        session.notify(f"bench_replay({peer})", posargs=[])
    for peer in SNAPSHOTS:
        session.notify(f"bench_snapshots({peer})", posargs=[])
    session.notify("bench_report", posargs=[])


@nox.session(default=False)
def bench_report(session: nox.Session) -> None:
    """What the cost of a call grows with, and the tables and pictures of all that was measured."""
    install(session, "matplotlib")
    session.run("python", "benchmarks/small_leaves.py")
    session.run("python", "-m", "benchmarks.costs", "--output", "benchmarks/results/raw/costs.json")
    session.run("python", "-m", "benchmarks.report")
