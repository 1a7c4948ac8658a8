"""pyproject.toml, requirements/lock.txt, environment.yml and the running environment name the same packages.

Every check is a function from parsed files to a list of sentences (empty when all is well), and is tried on a wrong
input as well, so that it is known to be able to fail.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]

# Upstream packages that no registry holds: used when somebody has installed them.
UNREGISTERED = {"fmoe", "fmoe_cuda", "megatron", "tutel", "tutel_custom_kernel"}


def requirements_of(lines: Iterable[str]) -> dict[str, Requirement]:
    """Requirements by normalised name, from lines of a requirements file; without comments and options."""
    texts = [line.split(" #")[0].strip() for line in lines]
    found = [Requirement(text) for text in texts if text and not text.startswith(("#", "-"))]
    by_name: dict[str, Requirement] = {canonicalize_name(requirement.name): requirement for requirement in found}
    assert len(by_name) == len(found), "a package is named twice"
    return by_name


def pinned_version(requirement: Requirement) -> Version | None:
    """The version of `name==version`; None for anything that is not exactly one version."""
    operators = list(requirement.specifier)
    if len(operators) != 1 or operators[0].operator != "==" or operators[0].version.endswith(".*"):
        return None
    return Version(operators[0].version)


def direct_dependencies(pyproject: Mapping) -> list[Requirement]:
    """What pyproject.toml asks for: the dependencies and those of every extra."""
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for group in (project["dependencies"], *extras) for text in group]


def unlocked(direct: Iterable[Requirement], lock: Mapping[str, Requirement]) -> list[str]:
    """Direct dependencies that the lock lacks, doesn't pin, or pins outside of the asked range."""
    problems = []
    for requirement in direct:
        entry = lock.get(canonicalize_name(requirement.name))
        version = pinned_version(entry) if entry else None
        if version is None:
            problems.append(f"{requirement.name}: not pinned in the lock; run `make lock`")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name}: the lock has {version}, pyproject asks {requirement.specifier}")
    return problems


def loose_lines(lock_text: str) -> list[str]:
    """Lines of the lock that are not a pin: options (an index, a file) and unpinned or local-build requirements."""
    lines = [line for line in lock_text.splitlines() if line.strip() and not line.startswith("#")]
    loose = []
    for line in lines:
        version = None if line.startswith("-") else pinned_version(Requirement(line.split(" #")[0]))
        if version is None or version.local or "://" in line:
            loose.append(line)
    return loose


def cuda_only(lock: Iterable[str]) -> list[str]:
    """Packages of the lock that only a CUDA build of torch needs."""
    return [name for name in lock if name.startswith(("nvidia-", "cuda-"))]


def environment_differs(
    environment: Mapping[str, Requirement], direct: Iterable[Requirement], lock: Mapping[str, Requirement]
) -> list[str]:
    """Where the pip section of environment.yml isn't the direct dependencies at the versions of the lock."""
    problems = []
    for name, requirement in environment.items():
        version = pinned_version(lock[name]) if name in lock else None
        if version is None or pinned_version(requirement) != version:
            problems.append(f"{requirement}: the lock has {version}")
    wanted = {canonicalize_name(requirement.name) for requirement in direct}
    return problems + [f"{name}: missing in environment.yml" for name in sorted(wanted - set(environment))]


def not_as_locked(installed: Mapping[str, str], lock: Mapping[str, Requirement]) -> list[str]:
    """Packages of the lock that are absent or installed at another version; a local build (`+cpu`) counts as equal."""
    problems = []
    for name, requirement in lock.items():
        if requirement.marker and not requirement.marker.evaluate():
            continue
        version = installed.get(name)
        if version is None or Version(Version(version).public) != pinned_version(requirement):
            problems.append(f"{requirement}: installed is {version}; run `make venv`")
    return problems


def imported_names(source: str) -> set[str]:
    """Top-level names of the absolute imports of a Python source, those inside of functions included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def undeclared(
    imported: Iterable[str], direct: Iterable[Requirement], distributions: Mapping[str, list[str]]
) -> list[str]:
    """Third-party imports that pyproject.toml doesn't ask for, so that they are here only by another package's grace.

    Args:
        imported: top-level names.
        direct: what pyproject.toml asks for.
        distributions: names of the packages that provide a top-level name, as `packages_distributions` gives them.
    """
    declared = {canonicalize_name(requirement.name) for requirement in direct}
    providers = {name: {canonicalize_name(item) for item in distributions.get(name, [])} for name in imported}
    return [
        f"{name}: imported, but not in pyproject.toml" for name in sorted(providers) if not providers[name] & declared
    ]


def pip_section(environment: Mapping) -> list[str]:
    """Lines of the pip section of a conda environment."""
    return next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


@pytest.fixture(scope="module")
def lock_text() -> str:
    return (ROOT / "requirements" / "lock.txt").read_text()


@pytest.fixture(scope="module")
def lock(lock_text: str) -> dict[str, Requirement]:
    return requirements_of(lock_text.splitlines())


def test_lock_pins_every_direct_dependency(pyproject: dict, lock: dict[str, Requirement]) -> None:
    direct = direct_dependencies(pyproject)
    assert len(direct) > 20
    assert unlocked(direct, lock) == []


def test_lock_is_nothing_but_pins(lock_text: str, lock: dict[str, Requirement]) -> None:
    assert loose_lines(lock_text) == []
    assert cuda_only(lock) == []
    assert "torch" in lock


def test_environment_is_the_lock(pyproject: dict, environment: dict, lock: dict[str, Requirement]) -> None:
    lines = pip_section(environment)
    assert environment_differs(requirements_of(lines), direct_dependencies(pyproject), lock) == []
    # The rest of the lock holds as a constraint, so that transitive versions are the same too.
    assert [line for line in lines if line.startswith("-")] == ["-c requirements/lock.txt"]


def test_environment_has_an_allowed_python(pyproject: dict, environment: dict) -> None:
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert Requirement(f"python{pyproject['project']['requires-python']}").specifier.contains(python.split("=")[1])


def test_installed_versions_are_the_locked_ones(lock: dict[str, Requirement]) -> None:
    installed = {str(canonicalize_name(item.name)): item.version for item in metadata.distributions()}
    assert not_as_locked(installed, lock) == []


def test_every_import_is_declared(pyproject: dict) -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    imported = set().union(*(imported_names(path.read_text()) for path in files))
    third_party = imported - rooms - UNREGISTERED - sys.stdlib_module_names
    assert "torch" in third_party
    assert undeclared(third_party, direct_dependencies(pyproject), metadata.packages_distributions()) == []


def test_compromised_lightning_releases_are_excluded(pyproject: dict) -> None:
    lightning = next(item for item in direct_dependencies(pyproject) if item.name == "lightning")
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3"))


def test_the_base_install_is_the_analysis_side_without_torch(pyproject: dict) -> None:
    room = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("analysis/**/__init__.py")}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == room
    files = (path for path in (ROOT / "analysis").rglob("*.py") if path.parent.name != "notebooks")
    third_party = set().union(*(imported_names(path.read_text()) for path in files)) - {"analysis"}
    base = [Requirement(text) for text in pyproject["project"]["dependencies"]]
    assert "torch" not in {requirement.name for requirement in base}
    assert undeclared(third_party - sys.stdlib_module_names, base, metadata.packages_distributions()) == []


def test_the_base_install_has_what_analysis_reads_beside_its_modules(pyproject: dict) -> None:
    declared = {
        (ROOT / package.replace(".", "/") / pattern).relative_to(ROOT).as_posix()
        for package, patterns in pyproject["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
    }
    there = {path for path in (ROOT / "analysis").rglob("*") if path.suffix in {".yaml", ".css", ".js", ".html"}}
    assert declared == {path.relative_to(ROOT).as_posix() for path in there}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "numpy: not pinned in the lock; run `make lock`"),
        (["numpy>=2.1"], "numpy: not pinned in the lock; run `make lock`"),
        (["numpy==2.*"], "numpy: not pinned in the lock; run `make lock`"),
        (["numpy==1.26.4"], "numpy: the lock has 1.26.4, pyproject asks >=2.0"),
    ],
)
def test_unlocked_can_fail(lines: list[str], sentence: str) -> None:
    assert unlocked([Requirement("numpy>=2.0")], requirements_of(lines)) == [sentence]


@pytest.mark.parametrize(
    "line", ["--index-url simple", "-e .", "numpy>=2.0", "torch==2.13.0+cpu", "numpy @ file:///numpy.whl"]
)
def test_loose_lines_can_fail(line: str) -> None:
    assert loose_lines(f"# a header\nscipy==1.17.1  # via x\n{line}\n") == [line]


def test_cuda_only_can_fail() -> None:
    assert cuda_only(["numpy", "nvidia-cudnn-cu13", "cuda-toolkit", "triton"]) == ["nvidia-cudnn-cu13", "cuda-toolkit"]


def test_environment_differs_can_fail() -> None:
    lock = requirements_of(["numpy==2.4.6", "scipy==1.17.1"])
    environment = requirements_of(["numpy==2.4.5", "tutel==0.4", "scipy"])
    direct = [Requirement("numpy"), Requirement("torch>=2.11")]
    assert environment_differs(environment, direct, lock) == [
        "numpy==2.4.5: the lock has 2.4.6",
        "tutel==0.4: the lock has None",
        "scipy: the lock has 1.17.1",
        "torch: missing in environment.yml",
    ]


def test_not_as_locked_can_fail() -> None:
    lock = requirements_of(["torch==2.13.0", "numpy==2.4.6", "scipy==1.17.1", 'colorama==0.4; python_version < "3"'])
    assert not_as_locked({"torch": "2.13.0+cpu", "numpy": "2.4.5"}, lock) == [
        "numpy==2.4.6: installed is 2.4.5; run `make venv`",
        "scipy==1.17.1: installed is None; run `make venv`",
    ]


def test_undeclared_can_fail() -> None:
    source = "import os.path\ndef later():\n    from yaml.nodes import Node\n    import filelock\nfrom . import x"
    assert imported_names(source) == {"os", "yaml", "filelock"}
    distributions = {"yaml": ["PyYAML"], "filelock": ["filelock"]}
    assert undeclared(["yaml", "filelock", "tutel"], [Requirement("pyyaml>=6.0")], distributions) == [
        "filelock: imported, but not in pyproject.toml",
        "tutel: imported, but not in pyproject.toml",
    ]


def test_a_package_named_twice_is_noticed() -> None:
    with pytest.raises(AssertionError, match="named twice"):
        requirements_of(["ruamel.yaml==1.0", "ruamel-yaml==1.1"])
