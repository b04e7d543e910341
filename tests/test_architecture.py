"""The borders of the house: who may import whom, how large a part may grow, and what must never appear in it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "trainers")
LONGEST_FILE, LONGEST_FUNCTION, MOST_FILES = 300, 60, 18

# In trainers a folder imports only folders below it; storage.py, records.py and errors.py lie below all of them.
LAYERS = (
    *(
        "worker",
        "verification",
        "training",
        "quantization",
        "checkpoint",
        "evaluation",
        "run",
        "model",
        "batching",
        "shards",
    ),
    *("tasks", "sources", "job", "tokenizer", "architecture"),
)
MAIN, BESIDE = "__main__", "modules beside the folders"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(*packages: str) -> list[Path]:
    found = sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))
    assert found, f"no module in {packages}"
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(), filename=str(path))))


def imported(node: ast.AST) -> list[str]:
    """Absolute names that one node imports, at whatever depth it stands, importlib's included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""] if node.level == 0 else []
    if isinstance(node, ast.Call) and call_name(node).endswith(("import_module", "__import__")):
        return [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def call_name(node: ast.Call) -> str:
    return ast.unparse(node.func)


def keyword(node: ast.Call, name: str) -> ast.expr | None:
    return next((each.value for each in node.keywords if each.arg == name), None)


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def forbidden_imports(path: Path) -> list[str]:
    roots = [(node, name.split(".")[0]) for node in nodes(path) for name in imported(node)]
    return [f"{name_of(path)}:{node.lineno} imports {root}" for node, root in roots if root in {"ray", "orchestrator"}]


def folder_imports(package: str) -> dict[tuple[str, str], list[str]]:
    """Where one folder of a package imports another: (importing, imported) -> file and line of each import.

    Folders below a folder count as part of it; modules beside the folders count as BESIDE, __main__.py as MAIN.
    """
    folders = {path.name for path in (ROOT / package).iterdir() if path.is_dir()}
    edges: dict[tuple[str, str], list[str]] = {}
    for path in modules(package):
        inside = path.relative_to(ROOT / package).parts
        importing = inside[0] if len(inside) > 1 else MAIN if inside == ("__main__.py",) else BESIDE
        for node in nodes(path):
            names = imported(node)
            if isinstance(node, ast.ImportFrom):
                names = [f"{name}.{alias.name}" for name in names for alias in node.names]
            for root, folder in (each.split(".")[:2] for each in names if "." in each):
                if root == package and folder in folders - {importing}:
                    edges.setdefault((importing, folder), []).append(f"{name_of(path)}:{node.lineno}")
    return edges


def upward_imports(layers: tuple[str, ...]) -> dict[tuple[str, str], list[str]]:
    """Imports in trainers that do not run down the list of layers."""
    height = {layer: index for index, layer in enumerate((MAIN, *layers, BESIDE))}
    edges = folder_imports("trainers").items()
    return {edge: lines for edge, lines in edges if height[edge[0]] > height[edge[1]]}


def circle(package: str) -> list[str]:
    """Folders that import each other in a circle, and what lies between two circles; empty if there is none."""
    left = set(folder_imports(package))
    while ends := {folder for _, folder in left} - {importing for importing, _ in left}:
        left = {edge for edge in left if edge[1] not in ends}
    while heads := {importing for importing, _ in left} - {folder for _, folder in left}:
        left = {edge for edge in left if edge[0] not in heads}
    return sorted({folder for edge in left for folder in edge})


def full_folders() -> dict[str, int]:
    folders = {path.parent for path in modules(*PACKAGES)}
    counts = {name_of(folder): len(list(folder.glob("*.py"))) for folder in folders}
    return {name: count for name, count in counts.items() if count > MOST_FILES}


def safe_loaders(path: Path) -> list[str]:
    """Names of this module's classes that derive from one of yaml's safe loaders, and "Safe" for those themselves."""
    classes = [node for node in nodes(path) if isinstance(node, ast.ClassDef)]
    return ["Safe", *(each.name for each in classes if any("Safe" in ast.unparse(base) for base in each.bases))]


def unsafe_calls(path: Path) -> list[str]:
    """Calls that would run code out of a file, or code that a model repository ships.

    `pickle.loads` stays possible in the orchestrator, for what comes back from its own Ray tasks.
    """
    loads = "|loads" if name_of(path).startswith("trainers/") else ""
    found = []
    for node in nodes(path):
        if not isinstance(node, ast.Call):
            continue
        name = call_name(node)
        unsafe = (
            re.fullmatch(rf"(pickle|cloudpickle|dill|joblib|shelve)\.(load|open|Unpickler{loads})", name)
            or (name == "torch.load" and not is_true(keyword(node, "weights_only")))
            or (name == "yaml.load" and not any(loader in ast.unparse(node) for loader in safe_loaders(path)))
            or (name in {"eval", "exec"})
            or is_true(keyword(node, "allow_pickle"))
            or is_true(keyword(node, "trust_remote_code"))
        )
        if unsafe:
            found.append(f"{name_of(path)}:{node.lineno} {name}")
    return found


def test_trainers_never_import_ray_or_the_orchestrator() -> None:
    assert [line for path in modules("trainers") for line in forbidden_imports(path)] == []


@pytest.mark.parametrize(
    "source",
    ["import ray", "def f():\n    from ray import train", "import importlib as i\ni.import_module('orchestrator.cli')"],
)
def test_forbidden_imports_would_be_found(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "wrong.py").write_text(source)
    assert len(forbidden_imports(tmp_path / "wrong.py")) == 1


def test_a_folder_of_trainers_imports_only_folders_below_it() -> None:
    assert {path.name for path in (ROOT / "trainers").iterdir() if (path / "__init__.py").exists()} == set(LAYERS)
    assert upward_imports(LAYERS) == {}


def test_no_folders_import_each_other_in_a_circle() -> None:
    assert circle("trainers") == []
    assert circle("orchestrator") == []


def test_no_folder_holds_too_many_files() -> None:
    assert full_folders() == {}


def write_modules(root: Path, sources: dict[str, str]) -> None:
    for name, source in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("trainers/job/load.py", "from trainers.run.folder import RunFolder", {("job", "run")}),
        ("trainers/job/load.py", "def f():\n    from trainers import run", {("job", "run")}),
        ("trainers/storage.py", "import trainers.job.load", {(BESIDE, "job")}),
        ("trainers/job/deep/x.py", "from trainers.run import folder", {("job", "run")}),
        ("trainers/run/log.py", "from trainers.job.load import load_job\nfrom trainers.run import folder", set()),
        ("trainers/__main__.py", "from trainers.run import folder", set()),
        ("trainers/job/load.py", "from trainers.storage import Folder", set()),
    ],
)
def test_imports_that_run_up_would_be_found(
    name: str, source: str, found: set[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    write_modules(tmp_path, {"trainers/run/folder.py": "", "trainers/job/load.py": "", name: source})
    assert set(upward_imports(("run", "job"))) == found


def test_a_circle_of_folders_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    ring = {f"trainers/{here}/x.py": f"from trainers.{there}.x import y" for here, there in ("ab", "bc", "ca", "da")}
    write_modules(
        tmp_path,
        {
            **ring,
            "trainers/e/x.py": "",
            "trainers/c/z.py": "import trainers.e.x",
            "trainers/main.py": "import trainers.a.x",
        },
    )
    assert circle("trainers") == ["a", "b", "c"]


def test_a_full_folder_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    write_modules(
        tmp_path, {f"trainers/{room}/{n}.py": "" for room, count in (("a", 19), ("b", 18)) for n in range(count)}
    )
    write_modules(tmp_path, {"orchestrator/cli.py": ""})
    assert full_folders() == {"trainers/a": 19}


def ruff(source: str, pretended: str) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
    command += ["--select=TID251", f"--stdin-filename={pretended}", "-"]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(
    "source", ["import ray\n", "def f():\n    import ray.train\n", "from orchestrator import cli\n"]
)
def test_ruff_refuses_the_same_imports_in_trainers_alone(source: str) -> None:
    assert "TID251" in ruff(source, "trainers/somewhere/new.py")
    assert "TID251" not in ruff(source, "orchestrator/new.py")


def test_every_package_folder_can_be_imported_and_data_folders_cannot() -> None:
    for package in PACKAGES:
        folders = {path.parent for path in modules(package)}
        assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    for data in ("docker", "cluster"):  # a package named docker would hide the one of the same name that others import
        assert list((ROOT / data).rglob("*.py")) == []


def test_every_module_says_what_it_is_for() -> None:
    assert [name_of(path) for path in modules(*PACKAGES) if not ast.get_docstring(nodes(path)[0])] == []


def test_no_file_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in modules(*PACKAGES)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{name_of(path)}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in modules(*PACKAGES)
        for node in nodes(path)
        if isinstance(node, Function)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_nothing_runs_code_out_of_a_file() -> None:
    assert [line for path in modules(*PACKAGES) for line in unsafe_calls(path)] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle\npickle.load(file)", 1),
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=True)", 0),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", 1),
        ("AutoModel.from_pretrained(path, trust_remote_code=job.model.trust_remote_code)", 0),
        ("yaml.load(text, Loader=yaml.SafeLoader)", 0),
        ("class Mine(yaml.SafeLoader): ...\nyaml.load(text, Mine)", 0),
        ("class Mine(yaml.Loader): ...\nyaml.load(text, Mine)", 1),
    ],
)
def test_unsafe_calls_would_be_found(source: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "wrong.py").write_text(source)
    assert len(unsafe_calls(tmp_path / "wrong.py")) == found


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Every text file of the checkout that git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            yield name, content.decode(errors="replace")


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    machine = re.compile(r"(?<![\w.}~-])/(?:work|root|Users)/\w+")
    found = [f"{name}: {match.group()}" for name, text in tracked_texts() for match in machine.finditer(text)]
    assert found == []


ROOM = "trainers/architecture/"
"""Where families are asked for what differs between them."""
ASKED = re.compile(
    r"(get_)?text_config|type_vocab_size|tie_word_embeddings|(encoder_|decoder_)?layerdrop|\w*vocab_size|hidden_size"
    r"|num_(hidden_)?layers|n_(layer|embd|positions)|d_model|max_position_embeddings|position_embedding_type|rope_(parameters|theta)"
    r"|layer_types|layers_block_type|attention_chunk_size|\w*intermediate_size|_attn_implementation|summary_type"
    r"|output_router_logits|router_aux_loss_coef|num_(local_)?experts\w*|create_weight|Conv1[dD]|\w*_pdrop"
)
"""What configurations and modules call it."""
OF_CLASSES = r"(Config|Model|PreTrained|For[A-Z]|LMHead|Attention|DecoderLayer|Layer|Mixer|MLP|RMSNorm)"


@cache
def family_names() -> tuple[frozenset[str], re.Pattern[str]]:
    """The `model_type` of each family of transformers, and what its classes are called."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    stems = sorted({name.removesuffix("Config") for name in CONFIG_MAPPING_NAMES.values()}, key=len, reverse=True)
    return frozenset(CONFIG_MAPPING_NAMES) - {"git"}, re.compile(rf"({'|'.join(map(re.escape, stems))}){OF_CLASSES}")


def said(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Texts, names and attributes of a module's code, without its docstrings."""
    docs = {node.value for node in nodes(path) if isinstance(node, ast.Expr)}
    for node in nodes(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            yield node, node.value
        elif isinstance(node, ast.Attribute | ast.Name):
            yield node, node.attr if isinstance(node, ast.Attribute) else node.id


def names_of_families(path: Path) -> list[str]:
    """A family's name or a class's of its code, a comparison with such a name, an import of a family's code, and what a
    configuration calls things that differ between families."""
    families, classes = family_names()
    found = []
    for node, text in said(path):
        if (isinstance(node, ast.Constant) and text.lower() in families) or classes.match(text):
            found.append(f"{name_of(path)}:{node.lineno} names the family {text}")
        if ASKED.fullmatch(text) and not isinstance(node, ast.Name):
            found.append(f"{name_of(path)}:{node.lineno} asks a model for {text}")
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers.models."):
            found.append(f"{name_of(path)}:{node.lineno} imports from a family")
        if isinstance(node, ast.Compare) and re.search(r"(model|config)\)\.__name__|\.model_type", ast.unparse(node)):
            found.append(f"{name_of(path)}:{node.lineno} compares with a family's name")
    return found


def test_what_a_model_can_is_asked_of_it_in_one_room_and_not_of_its_name() -> None:
    """A tokenizer's file names its parts by their types, which are no models."""
    found = [line for path in modules(*PACKAGES) if ROOM not in name_of(path) for line in names_of_families(path)]
    assert [line for line in found if "/tokenizer/" not in line] == []


def test_the_room_itself_names_no_family() -> None:
    found = [line for path in modules(ROOM) for line in names_of_families(path) if "asks a model" not in line]
    assert found == []


def test_a_family_s_name_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for index, (source, count) in enumerate((
        ("if 'LlamaForCausalLM' in names: pass", 1), ("if config.model_type == 'gpt2': pass", 2),
        ("if type(model).__name__ == kind: pass", 1), ("pick = {'qwen2_moe': 1}", 1),
        ("from transformers.models.qwen2 import x", 1), ("transformers.MistralModel", 1),
        ("getattr(config, 'num_hidden_layers', 1)", 1), ("size = config.hidden_size", 1),
        ("if kind == 'text': pass", 0), ("f'a {config.model_type}'", 0), ("def f():\n    'As LlamaModel has it.'", 0),
    )):  # fmt: skip
        path = tmp_path / f"{index}.py"
        path.write_text(source)
        assert len(names_of_families(path)) == count, source


PAGES = [*ROOT.glob("*.md"), *(page for name in ("docs", "cluster", "docker", "ds_configs")
                               for page in (ROOT / name).glob("*.md"))]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_fit_an_editor(page: Path) -> None:
    """Tables cannot be broken, nor can drawings."""
    prose = re.sub(r"```mermaid.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []
