"""The rules of the house (design.md sections 3 and 6), read from the text of the tree.

A rule about a folder that does not exist yet passes. The symbols of the kernels: test_symbols.py; what an import may
touch: test_import.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "kvstrata"
MAX_LINES = 400

# --- Who may include whom -------------------------------------------------------------------------------------------

CPP_LAYERS = {
    "common": {"common"},
    "ops": {"common", "ops"},
    "cpu": {"common", "ops", "cpu"},
    "cuda": {"common", "ops", "cuda"},
    "pages": {"common", "pages"},
    "store": {"common", "ops", "pages", "store"},
    "bind": {"common", "ops", "pages", "store", "bind"},
}
# The dispatcher calls the backends; the binding reports the CPU's instruction sets and threads, and opens the CUDA library.
CPP_EXCEPTIONS = {
    "ops/dispatch.cpp": {"cpu", "cuda"},
    "bind/isa.cpp": {"cpu", "cuda"},
}
# Kernels compiled per instruction set share nothing that the linker could pick from another level.
KERNEL_HEADERS_REFUSED = re.compile(
    r"#include\s*<(algorithm|array|atomic|functional|map|memory|mutex|numeric|optional|sstream|string|thread|tuple"
    r"|unordered_map|utility|vector|iostream)>"
)
DEVICE_BRANCH = re.compile(
    r"(==|!=)\s*Device::|Device::\w+\s*(==|!=)|case\s+Device::|switch\s*\([^)]*device|on_host\(\)"
)
# The dispatcher chooses the backend; its checks and the binding's read what the CPU can read; a store mirrors its books.
MAY_ASK_FOR_DEVICE = {"common/types.h", "ops/border.h", "ops/dispatch.cpp", "ops/dispatch_recall.cpp", "store/mirror.h"}


def cpp_files(folder: Path = CSRC) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def code(path: Path) -> str:
    """A C++ file without comments and string contents."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.S)
    lines = (
        line if line.lstrip().startswith("#") else re.sub(r'"(\\.|[^"\\])*"', '""', line) for line in text.split("\n")
    )
    return "\n".join(re.sub(r"//.*", "", line) for line in lines)


def includes(path: Path) -> list[str]:
    return re.findall(r'#include\s*"([^"]+)"', code(path))


@pytest.mark.parametrize("path", cpp_files(), ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_includes_follow_the_layers(path: Path) -> None:
    here = path.relative_to(CSRC)
    layer = here.parts[0]
    assert layer in CPP_LAYERS, f"csrc/{layer} has no place in design.md section 3"
    allowed = CPP_LAYERS[layer] | CPP_EXCEPTIONS.get(here.as_posix(), set())
    for name in includes(path):
        assert (CSRC / name).exists(), f"{here}: include {name!r} by its path from csrc"
        assert name.split("/")[0] in allowed, f"{here} includes {name}; {layer} may see {sorted(allowed)}"


def test_pybind11_only_in_bind_and_torch_nowhere() -> None:
    for path in cpp_files():
        text = code(path)
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), f"{path} includes a torch header"
        if path.parent != CSRC / "bind":
            assert not re.search(r"pybind11|Python\.h", text), f"{path} sees Python"


def test_kernels_share_nothing() -> None:
    for path in cpp_files(CSRC / "cpu" / "kernels"):
        assert not KERNEL_HEADERS_REFUSED.search(code(path)), f"{path}: no standard containers or algorithms in kernels"


def test_pages_never_see_a_float() -> None:
    for path in cpp_files(CSRC / "pages"):
        assert not re.search(r"\b(float|double)\b", code(path)), f"{path}: pages hold integers only"


def test_only_dispatch_branches_on_device() -> None:
    for path in cpp_files():
        place = path.relative_to(CSRC).as_posix()
        if place not in MAY_ASK_FOR_DEVICE and not place.startswith("bind/"):
            lines = [line for line in code(path).splitlines() if not re.match(r"\s*check\(", line)]  # a refusal may
            assert not DEVICE_BRANCH.search("\n".join(lines)), f"{path} branches on device; only the dispatcher may"


# --- Who may import whom --------------------------------------------------------------------------------------------

# A unit may import units of a lower rank and itself. Two units of one rank do not see each other.
RANK = {
    "_C": 0, "testing": 1, "config": 2, "backend": 3, "dense": 3, "ops": 4, "policy.base": 5, "budget": 6,
    "recall": 7, "policy": 8, "report": 8, "cache": 9, "episodes": 10, "branch": 10, "hf": 11, "__init__": 12,
    "recipes": 13, "quality": 13, "cli": 14,
}  # fmt: skip
# Files that are one unit with another.
PARTS = dict.fromkeys(("choices", "formats", "pools", "scores", "summaries"), "ops")
PARTS |= dict.fromkeys(
    (
        "step",
        "slabs",
        "loans",
        "plans",
        "rows",
        "statistics",
        "limit",
        "holdings",
        "scopes",
        "charges",
        "tiers",
        "columns",
        "shares",
        "sight",
        "guard",
        "memory",
        "timetable",
        "spans",
        "views",
        "stored",
        "registry",
        "graph",
        "adopted",
        "anchors",
    ),
    "cache",
)
OWN_RULES = {"reference"}  # see below; "__init__" is the public API, which recipes and the command line may use


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, TYPE_CHECKING included, by its absolute name."""
    here = module_name(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *(node.module.split(".") if node.module else [])])
            # `from kvstrata import ops` names a module, `from kvstrata.ops import attend` does not.
            yield from (f"{full}.{alias.name}" for alias in node.names) if full == "kvstrata" else [full]


def own_modules() -> set[str]:
    return {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def unit(module: str) -> str:
    """kvstrata.policy.base -> policy.base, kvstrata.hf.patch -> hf, kvstrata -> __init__."""
    parts = module.split(".")[1:]
    if parts[:2] == ["policy", "base"]:
        return "policy.base"
    return PARTS.get(parts[0], parts[0]) if parts else "__init__"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_imports_follow_the_layers(path: Path) -> None:
    here = unit(module_name(path))
    assert here in RANK or here in OWN_RULES, f"{path.name} has no place in design.md section 3"
    if here in OWN_RULES:
        return
    for name in imported(path):
        if name.split(".")[0] != "kvstrata":
            continue
        there = unit(name)
        if there == here or (there not in RANK and there not in own_modules()):
            continue  # itself, or a public name of the package such as kvstrata.__version__
        assert there in RANK and RANK[there] < RANK[here], f"{here} imports {there} ({name})"


def test_reference_imports_torch_and_nothing_of_ours() -> None:
    for path in (PACKAGE / "reference").glob("*.py"):
        tops = {name.split(".")[0] for name in imported(path) if unit(name) != "reference"}
        assert tops <= {"torch"} | set(sys.stdlib_module_names), tops


def test_only_hf_imports_transformers() -> None:
    for path in python_files():
        if path.is_relative_to(PACKAGE / "hf"):
            continue
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"transformers", "accelerate", "huggingface_hub"}, f"{path} imports {tops}"


def test_only_compat_compares_versions() -> None:
    for path in python_files():
        if path == PACKAGE / "hf" / "compat.py":
            continue
        assert "packaging" not in {name.split(".")[0] for name in imported(path)}, f"{path} imports packaging"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "__version__" not in text and "Version(" not in text, f"{path}:{node.lineno} compares versions"


# --- The mirror rule ------------------------------------------------------------------------------------------------

NOT_ON_CUDA: set[str] = {"summarize_groups"}  # ops whose CUDA file is still to come
NOT_CUDA_OPS = {"api", "transfer", "window"}  # .cu files that are no op
CUDA_INSTANCES = re.compile(r"attend_\w+")  # and those that hold an op's instances


def op_headers() -> dict[str, list[str]]:
    """Header stem -> the ops it declares: pack -> [pack, unpack]."""
    found = {}
    for path in sorted((CSRC / "ops").glob("*.h")):
        names = re.findall(r"^void (\w+)\(const \w+Params&", code(path), flags=re.M)
        if names:
            found[path.stem] = names
    return found


def defined_functions(paths: list[Path]) -> set[str]:
    return {node.name for path in paths for node in tree(path).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("header", "names"), op_headers().items())
def test_an_op_has_the_same_name_everywhere(header: str, names: list[str]) -> None:
    places = [
        CSRC / "cpu" / f"{header}.cpp",
        ROOT / "tests/ops" / f"test_{header}.py",
        ROOT / "bench/ops" / f"{header}.py",
    ]
    for place in places:
        if place.parent.exists():
            assert place.exists(), f"op {header}: {place.relative_to(ROOT)} is missing"
    wrappers = [path for path in PACKAGE.glob("*.py") if unit(module_name(path)) == "ops"]
    for module, files in (("ops", wrappers), ("reference", list((PACKAGE / "reference").glob("*.py")))):
        lacking = set(names) - defined_functions(files)
        assert not lacking, f"{module} lacks {lacking}"


def test_cuda_files_mirror_the_headers() -> None:
    files = {path.stem for path in (CSRC / "cuda").glob("*.cu")} - NOT_CUDA_OPS
    on_cuda = {name for name in files if not CUDA_INSTANCES.fullmatch(name)}
    assert on_cuda <= set(op_headers()), "a .cu file without an op header"
    assert set(op_headers()) - on_cuda == NOT_ON_CUDA


# --- Text -----------------------------------------------------------------------------------------------------------


def all_files() -> list[Path]:
    folders = ["csrc", "python", "tests", "bench", "examples"]
    suffixes = {".h", ".cpp", ".cu", ".cuh", ".py", ".pyi", ".sh", ".txt", ".md", ".toml", ".json", ".yaml"}
    found = (p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes)
    inside = [p for p in found if not {"results", ".venv"} & set(p.parts)]  # neither is in the repository
    top = [p for p in ROOT.iterdir() if p.is_file() and (p.suffix in suffixes or p.name == "Makefile")]
    return sorted(inside + top)


def test_files_stay_short() -> None:
    written = [p for p in all_files() if p.suffix != ".json"]  # a tokenizer is data
    long = {str(p.relative_to(ROOT)): n for p in written if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, split by noun: {long}"


def test_no_print_and_no_bare_except() -> None:
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}: bare except"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert path.is_relative_to(PACKAGE / "cli"), f"{path}:{node.lineno}: print"


REFUSED_CLASS = re.compile(r"(Manager|Helper|Handler|Engine|Utils?)$")
REFUSED_MODULE = {"util", "utils", "helper", "helpers", "manager", "misc"}


def test_nothing_manages_helps_or_processes() -> None:
    for path in [*python_files(), *cpp_files()]:
        assert path.stem not in REFUSED_MODULE, f"{path}: name it by its noun"
        for name in re.findall(r"^\s*(?:class|struct)\s+(\w+)", path.read_text(), flags=re.M):
            assert not REFUSED_CLASS.search(name), f"{path}: class {name}"
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                assert not re.match(r"_?(manage|handle|process)_", node.name), f"{path}: def {node.name}"


# Written in halves, so that this file does not hold them.
REFUSED_TEXT = [
    "-march=" + "native",
    "TO" + "DO",
    "FIX" + "ME",
    "XX" + "X",
    "/ro" + "ot/",
    "/op" + "t/kv",
    "/tmp/" + "wt",
    "/wo" + "rk/",
]


def test_no_leftovers_and_no_paths_of_one_machine() -> None:
    for path in all_files():
        text = path.read_text()
        found = [word for word in REFUSED_TEXT if word in text]
        # The design and the kernels' build name the flag in order to forbid it.
        if path.name == "CMakeLists.txt":
            found = [word for word in found if not re.search(r"#.*" + re.escape(word), text)]
        assert not found, f"{path.relative_to(ROOT)} holds {found}"


# --- README ---------------------------------------------------------------------------------------------------------


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("make ", "python ", "bash ", "kvstrata "))]


def test_readme_commands_exist() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M))
    for line in readme_commands():
        verb, *rest = line.split("#")[0].split()
        if verb == "make":
            assert set(rest) <= targets, f"README: {line!r}; targets are {sorted(targets)}"
        elif verb in {"python", "bash"} and rest and rest[0].endswith((".py", ".sh")):
            assert (ROOT / rest[0]).exists(), f"README: {line!r}"
        elif verb == "kvstrata" and (PACKAGE / "cli").exists():
            verb_files = [PACKAGE / "cli" / f"{rest[0]}.py", PACKAGE / "cli" / rest[0] / "__init__.py"]
            assert any(file.exists() for file in verb_files), f"README: {line!r}"
