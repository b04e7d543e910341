"""What the documents say of the program is what the program does."""

import ast
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.terminal.table import show_evaluations
from trainers.run.folder import Evaluation

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(page for name in ("docs", "cluster", "docker", "ds_configs")
                               for page in (ROOT / name).glob("*.md"))]  # fmt: skip
FOREIGN = {"CUDA out of memory"}
"""Messages of libraries."""
SOME = "\0"
"""Stands for a value, in a message of the program and in one that a page quotes."""


@cache
def messages() -> tuple[str, ...]:
    """Every text in the program, with SOME for each value in it."""
    found = []
    for package in ("orchestrator", "trainers"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (str(part.value) if isinstance(part, ast.Constant) else SOME for part in node.values)
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def quoted() -> Iterator[str]:
    """The messages that docs/troubleshooting.md explains, as it quotes them."""
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            yield from re.findall("`([^`]+)`", line.split("|")[1])


@pytest.mark.parametrize("quote", [quote for quote in quoted() if quote not in FOREIGN])
def test_a_message_that_is_explained_is_one_that_the_program_prints(quote: str) -> None:
    wanted = re.sub(r"\b[A-Z]+\b(?!/)", SOME, quote)
    parts = [part.strip() for part in wanted.split("...") if part.strip()]
    assert any(all(part in message for part in parts) for message in messages()), parts


def test_enough_messages_are_explained() -> None:
    assert len(list(quoted())) > 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_to_a_file_or_a_heading_leads_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_table_that_readme_shows_is_what_the_program_prints() -> None:
    """The figures are the demo's; the form, names and widths are the program's, at 80 columns in a pipe."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```\n(evaluations, by .*?\n)model ", text, re.DOTALL)
    assert shown is not None
    metric, lines = _parse(shown[1])
    evaluations = [
        Evaluation(step=int(name), status="done", metrics=values, intervals=between, eval_key="e")
        for name, (values, between) in lines.items()
        if name.isdigit()
    ]
    best = max(evaluations, key=lambda one: one.metrics[metric])
    baselines = {name: values for name, (values, _) in lines.items() if not name.isdigit()}
    stream = io.StringIO()
    show_evaluations(evaluations, metric, best.step, Console(file=stream, width=80), baselines)
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == shown[1].splitlines()


Line = tuple[dict[str, float], dict[str, tuple[float, float]]]
"""Values of a line of the table, and the intervals below them, by metric."""


def _parse(table: str) -> tuple[str, dict[str, Line]]:
    """The deciding metric, and each line by its name; a name that is folded is joined."""
    title, *rows = table.splitlines()
    names = [cell.strip() for cell in rows[1].split("┃")[2:-2]]
    lines: dict[str, Line] = {}
    for row in rows[3:-1]:
        first, *cells = (cell.strip() for cell in row.split("│")[1:-2])
        if not first:
            lines[list(lines)[-1]][1].update({name: _ends(cell) for name, cell in zip(names, cells, strict=True)})
        elif any(cells):
            lines[first] = dict(zip(names, map(float, cells), strict=True)), {}
        else:
            before, values = lines.popitem()
            lines[f"{before} {first}"] = values
    return re.split("[ ;]+", title)[2], lines


def _ends(cell: str) -> tuple[float, float]:
    low, high = map(float, cell.split("–"))
    return low, high


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command of the program, by its words."""
    nested = getattr(group, "commands", {})
    if not nested:
        yield path, group
    for name, command in nested.items():
        yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def shown() -> Iterator[tuple[str, str]]:
    """Every `tuneyard ...` in a page, up to a comment."""
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            text = page.read_text(encoding="utf-8")
            lines = re.findall(r"^\s*(?:\$ )?(tuneyard [^\n]*)$", text, re.MULTILINE)
            for line in [*re.findall(r"`(tuneyard [^`]+)`", text), *lines]:
                yield page.name, line.partition("  #")[0].strip()


@pytest.mark.parametrize(("page", "line"), sorted(set(shown())))
def test_a_command_in_a_page_has_its_name_and_options(page: str, line: str) -> None:
    words = [word for word in shlex.split(line.replace("...", "").replace("|", " "))[1:] if word not in ("[", "]")]
    plain = [word.strip("[]") for word in words]
    if plain and plain[0].startswith("--"):
        return
    found = next((COMMANDS[path] for path in (tuple(plain[:2]), tuple(plain[:1])) if path in COMMANDS), None)
    assert found is not None or plain[0] in {path[0] for path in COMMANDS if len(path) > 1}, line
    if found is not None:
        known = {name for param in found.params for name in (*param.opts, *param.secondary_opts)}
        asked = {word.partition("=")[0] for word in plain if re.match(r"--?[a-z]", word)}
        assert asked <= known, line


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_helps_at_80_columns_with_a_word_for_each_option(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert [param.name for param in COMMANDS[path].params if not getattr(param, "help", None)] == []
