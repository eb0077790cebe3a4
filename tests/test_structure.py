"""The structure that docs/design.md describes: imports go one way, and no module hides a public function."""

import ast
import inspect
from pathlib import Path

import kbne_edit

PACKAGE = Path(kbne_edit.__file__).parent

# Lowest first. A folder or a module may import what stands above it here, and its own folder; those of one line are
# neighbours, which may not import each other.
ORDER = """
errors statistics distributed
structure architectures
progress files families plots rule
yamlfile
edit recipe
disk
hub models folding used
proofs attribution
selection
evaluation
fitting
tuning
reporting
settings
locating
verifying
baking folded applying pushing asking debiasing comparing diagnosing recording results
tracking serving
commands
"""
METHODS = {("edit.py", "models")}  # Edit.hooks and Edit.apply_, which import when they are called
LEVEL = {name: level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}


def imports(path: Path) -> set[str]:
    """Folders and root modules of the package that a module imports, wherever in the module."""
    here = list(path.relative_to(PACKAGE).parts[:-1])
    result = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            parts = base + (node.module.split(".") if node.module else [])
            result |= {parts[0]} if parts else {alias.name for alias in node.names}
    return result - {"__version__"}


def test_imports_go_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        me = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if me in ("__init__", "__main__"):
            continue
        assert me in LEVEL, f"{me} has no place in ORDER"
        for other in imports(path) - {me}:
            if LEVEL[other] >= LEVEL[me] and (path.name, other) not in METHODS:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong


# A method that hands its object to the module that makes or shows it: `Recipe.from_dict`, `Report.html`, `.verdicts`.
METHODS_THAT_HAND_ON = {
    ("recipe.types", "recipe.parsing"),
    ("reporting.types", "reporting.page"),
    ("reporting.types", "reporting.wording"),
}


def arrows(path: Path, modules: set[str]) -> set[str]:
    """Modules that a module imports, wherever in the module: in functions and under TYPE_CHECKING, too."""
    here = list(path.relative_to(PACKAGE).parts[:-1])
    result = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
            named = {".".join([*base, alias.name]) for alias in node.names}
            result |= (named & modules) or ({".".join(base)} & modules)
    return result


def test_no_module_imports_itself_by_way_of_others():
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    files = {name: path for name, path in names.items() if not name.endswith("__init__")}
    to = {name: arrows(path, set(files)) for name, path in files.items()}
    for start, end in METHODS_THAT_HAND_ON:
        to[start].remove(end)
    while leaves := [name for name, others in to.items() if not others & set(to)]:
        for name in leaves:
            del to[name]
    assert not to  # what is left stands in a circle, or leads to one


def test_no_module_hides_a_public_function():
    """`import kbne_edit.bake` would put the module where the function `kbne_edit.bake` is expected."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(kbne_edit.__all__)


MODELS = {"ask", "apply", "bake", "doctor", "evaluate", "fit", "fold", "locate", "push", "tune", "verify"}


def test_one_thing_has_one_name():
    """A model to be read is `source` everywhere, what was written is `out`, what is looked at is `baked`."""
    functions = {name: getattr(kbne_edit, name) for name in kbne_edit.__all__ if name != "__version__"}
    parameters = {
        name: set(inspect.signature(value).parameters) for name, value in functions.items() if inspect.isfunction(value)
    }
    assert {name for name, names in parameters.items() if "source" in names} == MODELS
    other = {"source_dir", "base_dir", "out_dir", "baked_dir", "directory", "path_or_repo", "checkpoint"}
    assert not {name: names & other for name, names in parameters.items() if names & other}
    writers = {"apply", "bake", "fit", "fold", "locate", "revert", "tune"}
    assert {name for name, names in parameters.items() if "out" in names} == writers


def test_a_function_fits_on_a_screen_and_takes_six_parameters():
    """At most 60 lines without the docstring, and six parameters, by position and by name together."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            first = node.body[0]
            docstring = ast.get_docstring(node) is not None
            lines = node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if docstring else 0)
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in named)
            if lines > 60 or count > 6:
                wrong.append(f"{path.relative_to(PACKAGE)}, {node.name}: {lines} lines, {count} parameters")
    assert not wrong


def test_no_test_uses_a_private_name():
    """Neither imports one of the package, nor reaches into one of its modules for it."""
    wrong = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kbne_edit":
                names |= {alias.asname or alias.name for alias in node.names}
                wrong += [f"{path.name}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
        for node in ast.walk(tree):
            owner = private = None
            if isinstance(node, ast.Attribute):
                owner, private = node.value, node.attr
            elif isinstance(node, ast.Call) and len(node.args) > 1 and "setattr" in ast.unparse(node.func):
                owner, private = node.args[0], ast.literal_eval(node.args[1]) if _text(node.args[1]) else ""
                if _text(owner) and "kbne_edit" in owner.value and "._" in owner.value:
                    wrong.append(f"{path.name}: {owner.value}")
            if isinstance(owner, ast.Name) and owner.id in names and private.startswith("_") and private[1:2] != "_":
                wrong.append(f"{path.name}: {owner.id}.{private}")
    assert not wrong


def _text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
