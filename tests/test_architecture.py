"""Who may import whom, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wmjax"
# Direction of imports: a part may import those named here, and itself.
BASE = {"types", "checks", "ops"}
ALLOWED = {
    "types": set(),
    "ops": {"types"},
    "nets": BASE,
    "optim": BASE | {"nets"},
    "dreaming": BASE | {"nets", "raw_env"},
    "evolution": BASE | {"dreaming"},
    "planning": BASE | {"nets", "dreaming", "fields"},
    "checks": {"types"},
    "raw_env": {"types", "checks"},
    "files": set(),
    "run_folder": {"types", "checks", "files"},
    "cache": set(),
    "determinism": {"types"},
    "distributed": {"types", "checks", "files"},
    "arithmetic": set(),
    "processes": set(),
    "buffers": {"arithmetic"},
    "cards": {"types", "arithmetic", "checks"},
    "scores": {"envs", "files", "run_folder"},
    "recipes": {"types"},
    "names": {"types", "checks"},
    "agents": BASE | {"nets", "optim", "dreaming", "evolution", "recipes"},
    "suites": set(),
    "envs": {"types", "checks", "raw_env", "suites", "processes"},
    "replay": BASE | {"files"},
    "loops": BASE | {"files", "run_folder", "replay", "dreaming", "evolution", "distributed"},
    "episodes": {"types", "checks", "files", "run_folder", "replay", "loops", "envs", "suites"},
    "fields": {"checks", "names"},
    "presets": {"types", "agents", "names", "fields"},
    "authors": {"types", "checks", "files", "agents"},
    "weights": {"types", "checks", "files", "names", "run_folder", "loops"},
}
# May import everything.
TOP = {"__init__", "__main__", "comparison", "settings", "estimate", "sizing", "run", "training", "figures", "cli"}
TOP |= {"dream_step", "exporting", "importing", "offline", "play", "recording"}
CORE = {"jax", "jaxlib", "numpy", "flax", "optax", "chex", "distrax", "orbax", "tyro", "rich", "tensorboardX"}
CORE |= {"matplotlib", "PIL", "evosax", "filelock", "safetensors", "yaml"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str:
    """`wmjax.loops.device` is of the part `loops`."""
    return name.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own not in ALLOWED:
        assert own in TOP, f"say in ALLOWED what {own} may import"
        return
    used = {part(name) for name in imports(path) if name.startswith("wmjax.")}
    assert used <= ALLOWED[own] | {own}


def test_agents_do_not_import_each_other():
    agents = PACKAGE / "agents"
    paper = lambda path: path.relative_to(agents).parts[0].removesuffix(".py")  # a file, or a folder of several
    paths = [path for path in agents.rglob("*.py") if path != agents / "__init__.py"]
    names = {paper(path) for path in paths}
    assert names
    for path in paths:
        others = {f"wmjax.agents.{other}" for other in names if other != paper(path)} | {"wmjax.agents.AGENTS"}
        assert not {".".join(name.split(".")[:3]) for name in imports(path)} & others


def file_of(name: str) -> Path | None:
    """The file of a module of ours, or of that which has the name."""
    for parts in (name.split("."), name.split(".")[:-1]):
        place = PACKAGE.parent.joinpath(*parts)
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path


def run_imports(path: Path) -> set[Path]:
    """Files of ours that a file imports where it runs: not those for annotations, nor those inside functions."""
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        f"{node.module}.{alias.name}" for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return {file_of(name) for name in names if name.split(".")[0] == "wmjax"} - {path}


def test_files_do_not_import_each_other_in_circles():
    left = {path: run_imports(path) for path in FILES}
    while free := {path for path, used in left.items() if not used & left.keys()}:
        left = {path: used for path, used in left.items() if path not in free}
    assert not left, {str(path.relative_to(PACKAGE)) for path in left}


def test_the_device_loop_does_not_know_the_host_loop():
    for path in (PACKAGE / "loops").glob("*.py"):
        if path.stem != "driver":  # which runs both
            assert not {name for name in imports(path) if name.startswith("wmjax.loops.host")}, path


def test_operations_and_workers_need_no_more_than_they_say():
    outside = lambda path: {name.split(".")[0] for name in imports(path)}
    for path in (PACKAGE / "ops").glob("*.py"):
        assert not outside(path) & {"flax", "optax"}, path
    for path in (PACKAGE / "suites").glob("*.py"):
        assert not outside(path) & {"jax", "flax", "optax", "chex", "distrax"}, path


def test_no_file_has_more_than_600_lines():
    assert [path for path in FILES if len(path.read_text().splitlines()) > 600] == []


def test_no_function_has_more_than_80_lines_but_an_agents_losses_and_factory():
    agents = {path.stem for path in (PACKAGE / "agents").iterdir()}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
                of_an_agent = "agents" in path.parts and ("loss" in node.name or node.name in agents)
                assert of_an_agent, f"{path}: {node.name}"


def test_each_outside_environment_library_is_imported_in_one_file_inside_functions():
    import sys

    where: dict[str, list[Path]] = {}
    for path in FILES:
        outside = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - CORE - {"wmjax"}
        for name in outside:
            where.setdefault(name, []).append(path)
            top = {
                alias.name
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Import)
                for alias in node.names
            }
            top |= {node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)}
            assert not any(module.split(".")[0] == name for module in top), f"{path} imports {name} at its top"
    assert where.pop("wandb", [Path("wandb_log.py")])[0].name == "wandb_log.py"
    assert [path.name for path in where.pop("IPython")] == ["charts.py"]
    assert {path.name for path in where.pop("starlette") + where.pop("uvicorn")} == {"server.py"}
    assert [path.name for path in where.pop("minari")] == ["minari_data.py"]
    assert {path.name for path in where.pop("jax2onnx") + where.pop("onnxruntime")} == {"onnx_program.py"}
    assert all(len(paths) == 1 and paths[0].parent.name in ("envs", "suites") for paths in where.values()), where


def test_nothing_is_pickled():
    for path in FILES:
        assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & {
            name.split(".")[0] for name in imports(path)
        }


def test_modules_are_subclassed_in_nets_only():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "Module" in {ast.unparse(base).split(".")[-1] for base in node.bases}:
                assert path.parent.name == "nets", f"{path}: {node.name}"
