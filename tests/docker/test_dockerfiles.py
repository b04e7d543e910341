"""The Dockerfiles, read: no engine runs here, so what can be known without building is checked."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
Instructions = list[tuple[str, str]]

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def parse(text: str) -> Instructions:
    """Instructions with their arguments, comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def of(path: Path, instruction: str) -> list[str]:
    return [arguments for name, arguments in parse(path.read_text()) if name == instruction]


def bases(path: Path) -> list[str]:
    defaults = dict(argument.split("=", 1) for argument in of(path, "ARG") if "=" in argument)
    return [
        re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], arguments.split()[0]) for arguments in of(path, "FROM")
    ]


def sources(path: Path) -> list[str]:
    copies = [arguments.split() for arguments in of(path, "COPY") if not arguments.startswith("--from=")]
    return [source for words in copies for source in words[:-1]]


def test_cpu_and_cuda_images_are_there() -> None:
    assert [path.stem for path in FILES] == ["cpu", "cuda"]


@every_file
def test_only_known_instructions_are_used(path: Path) -> None:
    assert {name for name, _ in parse(path.read_text())} <= INSTRUCTIONS


@every_file
def test_bases_are_pinned_by_a_full_tag(path: Path) -> None:
    for base in bases(path):
        assert re.fullmatch(r"(python|nvidia/cuda):\d+\.\d+\S+", base), base


@every_file
def test_last_user_is_not_root_and_owns_the_working_folder(path: Path) -> None:
    instructions = parse(path.read_text())
    users = [index for index, (name, _) in enumerate(instructions) if name == "USER"]
    assert instructions[users[-1]][1] == "1000:1000"
    assert {name for name, _ in instructions[users[-1] + 1 :]} == {"WORKDIR", "ENTRYPOINT", "CMD"}
    assert of(path, "WORKDIR")[-1] == "/home/tuneyard"


@every_file
def test_copied_paths_exist_and_reach_the_builder(path: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in sources(path):
        assert (ROOT / source).exists(), source
        assert source in allowed, f"{source} is kept out by .dockerignore"


@every_file
def test_everything_that_the_build_of_the_package_reads_is_copied(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert set(sources(path)) == needed


@every_file
def test_sources_come_after_the_dependencies(path: Path) -> None:
    order = [f"{name} {arguments}" for name, arguments in parse(path.read_text())]
    position = {
        key: next(i for i, line in enumerate(order) if key in line)
        for key in ("torch==", "--requirement", "COPY trainers", "--no-deps .")
    }
    assert list(position.values()) == sorted(position.values())


@every_file
def test_dependency_line_prints_what_the_project_declares(path: Path) -> None:
    line = next(arguments for arguments in of(path, "RUN") if "tomllib" in arguments)
    command = line.split(">")[0].replace("python ", f"{sys.executable} ", 1)
    printed = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert printed.splitlines() == declared


@every_file
def test_torch_is_the_projects_and_its_index_is_left_to_the_builder(path: Path) -> None:
    arguments = dict(argument.split("=", 1) for argument in of(path, "ARG"))
    assert arguments["TORCH_INDEX_URL"] == ""
    assert f"TORCH ?= torch=={arguments['TORCH_VERSION']}" in (ROOT / "Makefile").read_text()
    assert not re.search(r"https?://", path.read_text())


@every_file
def test_no_secret_is_baked_in(path: Path) -> None:
    words = re.compile(r"(token|secret|password|passwd|credential|api_?key)", re.IGNORECASE)
    assert not words.search(path.read_text())


@every_file
def test_any_command_can_be_given(path: Path) -> None:
    assert of(path, "ENTRYPOINT") == ['["tini", "--"]']
    assert of(path, "CMD") == ['["tuneyard", "--help"]']
    installed = " ".join(of(path, "RUN"))
    assert {"tini", "procps", "wget"} <= set(installed.split())
