"""How the package is built: imports point down the wings and never in a circle, modules and functions stay small."""

import ast
from pathlib import Path

import pytest

import hf_alibi

ROOT = Path(hf_alibi.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# From the top floor down; modules outside the wings are below them, but for these.
WINGS = ("commands", "benchmark", "reporting", "training", "evaluation", "export", "conversion", "model", "attention")
TOP = {"", "__main__", "cli"}
# Kernels take pointers, strides and sizes one by one: Triton has no other way.
KERNELS = "attention.sdpa.gpu.kernels."
# Public: their arguments are what users know.
MANY_PARAMETERS = {"evaluate_extrapolation"}


def name_of(path):
    """Dotted name below the package; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path):
    """Names of the modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].relative_to(ROOT).parts
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inside = f"{module}.{alias.name}".strip(".")
                yield inside if inside in MODULES else module
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "hf_alibi" for name in names), f"{path}: import it relatively"


IMPORTS = {name: set(imported(path)) for name, path in MODULES.items()}


def floor(name):
    """The higher, the further up."""
    if name in TOP:
        return len(WINGS) + 1
    wing = name.split(".")[0]
    return len(WINGS) - WINGS.index(wing) if wing in WINGS else 0


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    assert IMPORTS[name] <= MODULES.keys()
    higher = {other for other in IMPORTS[name] if floor(other) > floor(name)}
    assert not higher, f"{name} imports from a higher wing: {higher}"


def test_no_module_imports_itself_by_way_of_others():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " → ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for other in sorted(IMPORTS[name]):
                visit(other)
            done.add(open_.pop())

    for name in MODULES:
        visit(name)


def test_wings_import_nothing_by_themselves():
    """Or `import hf_alibi` would load torch."""
    inner = ("attention.flex", "attention.sdpa", "attention.sdpa.gpu", KERNELS[:-1], "export.engines", "export.vllm")
    for wing in (*WINGS, *inner):
        assert [type(node) for node in ast.parse(MODULES[wing].read_text()).body] == [ast.Expr]


@pytest.mark.parametrize("name", MODULES)
def test_modules_functions_and_calls_are_small(name):
    path = MODULES[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in functions(path):
        arguments = node.args
        count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
        count += (arguments.vararg is not None) + (arguments.kwarg is not None)
        count -= bool(arguments.args) and arguments.args[0].arg in ("self", "cls", "ctx")
        assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"
        may_have_more = node.name in MANY_PARAMETERS or name.startswith(KERNELS)
        assert count <= 8 or may_have_more, f"{node.name} takes {count} parameters"
