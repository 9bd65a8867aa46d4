"""The direction of imports: read from the source text, so lazy and type-only imports count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = {
    "jobs": ("jobs",),
    "verbs": (
        "train",
        "extract",
        "convert",
        "sampling",
        "evaluate",
        "inspect",
        "report",
        "visualization",
        "cost_estimate",
        "doctor",
        "pretrain",
        "quickstart",
    ),
    "artifacts": ("store", "targets", "checkpoints", "runs", "library"),
    "science": (
        "models",
        "diffusion",
        "alignment",
        "teachers",
        "autoencoders",
        "datasets",
        "text_encoders",
    ),
    "ground": (
        "storage",
        "distributed",
        "cli",
        "hashing",
        "precision",
        "randomness",
        "text",
        "assets",
    ),
    "schemas": ("schemas",),
}
"""Layers from top to bottom and their rooms: a folder or file of ``pipeline/``, or the folders
``jobs`` and ``schemas``. A room imports rooms of its own layer and of those below."""
RAY_FILES = (
    "pipeline/distributed/ray_cluster.py",
    "pipeline/distributed/actor_pool.py",
    "pipeline/distributed/log_relay.py",
    "pipeline/doctor/examination.py",
    "pipeline/extract/*.py",
    "pipeline/sampling/job.py",
    "pipeline/train/ray_trainer.py",
    "pipeline/train/ray_metrics.py",
)
"""Only these files import ray: everything else runs in one plain process."""
NOT_IN_SCHEMAS = ("torch", "ray", "pipeline")
LIGHT_ROOMS = ("checkpoints", "runs")
HEAVY = ("diffusers", "ray")
"""Packages that importing a file of ``LIGHT_ROOMS`` must not load: the report reads both rooms."""

NOT_IN_DRIVERS = {
    "pipeline/extract/job.py": ("diffusers", "ray", "timm", "torch", "zarr"),
    "pipeline/extract/encoder_pool.py": ("diffusers", "timm", "torch", "zarr"),
    "pipeline/runs/compatibility.py": ("diffusers", "timm"),
    "pipeline/train/loop.py": ("diffusers", "timm"),
    "pipeline/train/ray_trainer.py": ("diffusers", "timm"),
    "pipeline/train/run_control.py": ("ray", "torch"),
}
"""Packages that importing a file must not load, because each of them takes seconds in the driver,
or in a worker of a run that does not use it."""


class Import(NamedTuple):
    """One imported module or name."""

    file: str
    line: int
    module: str
    """Dotted name: of a file where the project has one, else as written."""
    on_import: bool
    """Executed when the file is imported: not inside a function or ``if TYPE_CHECKING``."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Project:
    """Source files by dotted module name, and their imports."""

    files: dict[str, str]
    imports: tuple[Import, ...]

    @property
    def internal(self) -> Iterator[tuple[Import, str]]:
        """Imports of a file of the project, each with that file."""
        for item in self.imports:
            if item.module in self.files:
                yield item, self.files[item.module]


def read_project(root: Path, tops: Iterable[str] = ("pipeline", "schemas", "jobs")) -> Project:
    paths = [path for top in tops for path in (root / top).rglob("*.py")]
    names = [str(path.relative_to(root)) for path in sorted(paths)]
    files = {module_of(name): name for name in names}
    imports = [item for name in names for item in _imports_of(root, name, files)]
    return Project(files, tuple(imports))


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(file: str) -> str:
    """The room of a file; "" for ``pipeline/__init__.py``."""
    top, *rest = module_of(file).split(".")
    if top != "pipeline":
        return top
    return rest[0] if rest else ""


def _imports_of(root: Path, file: str, files: dict[str, str]) -> Iterator[Import]:
    tree = ast.parse((root / file).read_text(encoding="utf-8"), file)
    deferred = {id(node) for block in _deferred_blocks(tree) for node in ast.walk(block)}
    for node in ast.walk(tree):
        for module in _modules_of(node, file, files):
            yield Import(file, node.lineno, module, id(node) not in deferred)


def _deferred_blocks(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from node.body


def _modules_of(node: ast.AST, file: str, files: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = file.split("/")[: -node.level]
            base = ".".join([*package, *([base] if base else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield full if full in files else base


def check_rooms(project: Project) -> list[str]:
    known = {room for rooms in LAYERS.values() for room in rooms}
    rooms = {room_of(file) for file in project.files.values()} - {""}
    return [
        f"room '{room}' belongs to no layer: add it to LAYERS in tests/test_architecture.py, in "
        "the lowest layer that is above all it imports"
        for room in sorted(rooms - known)
    ]


def check_direction(project: Project) -> list[str]:
    layers = list(LAYERS)
    level = {room: layers.index(layer) for layer, rooms in LAYERS.items() for room in rooms}
    problems = []
    for item, target in project.internal:
        above, below = room_of(item.file), room_of(target)
        if above in level and below in level and level[above] > level[below]:
            problems.append(
                f"{item.place} imports {target}: {above} ({layers[level[above]]}) is below "
                f"{below} ({layers[level[below]]}); move the shared code down"
            )
    return problems


def check_file_circles(project: Project) -> list[str]:
    return _circle((item.file, target) for item, target in project.internal)


def check_room_circles(project: Project) -> list[str]:
    return _circle((room_of(item.file), room_of(target)) for item, target in project.internal)


def _circle(edges: Iterator[tuple[str, str]]) -> list[str]:
    graph: dict[str, set[str]] = {}
    for start, end in edges:
        if start != end:
            graph.setdefault(start, set()).add(end)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["circle of imports: " + " <- ".join(error.args[1])]
    return []


def check_schemas(project: Project) -> list[str]:
    return [
        f"{item.place} imports {item.module}: schemas/ imports none of {NOT_IN_SCHEMAS}"
        for item in project.imports
        if room_of(item.file) == "schemas" and _package(item.module) in NOT_IN_SCHEMAS
    ]


def check_ray(project: Project) -> list[str]:
    return [
        f"{item.place} imports ray: only RAY_FILES of tests/test_architecture.py do"
        for item in project.imports
        if _package(item.module) == "ray" and not any(fnmatch(item.file, p) for p in RAY_FILES)
    ]


def check_light_rooms(project: Project) -> list[str]:
    """Includes heavy packages that a file loads through the other files it imports."""
    light = [file for file in project.files.values() if room_of(file) in LIGHT_ROOMS]
    return _loads(project, dict.fromkeys(light, HEAVY))


def check_drivers(project: Project) -> list[str]:
    return _loads(project, NOT_IN_DRIVERS)


def _loads(project: Project, forbidden: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Forbidden packages that importing a file loads, each with its place."""
    loaded: dict[str, list[Import]] = {}
    for item in project.imports:
        if item.on_import:
            loaded.setdefault(item.file, []).append(item)
    return [
        f"importing {start} loads {item.module} at {item.place}"
        for start, packages in forbidden.items()
        for item in _reached(start, loaded, project.files)
        if _package(item.module) in packages
    ]


def _reached(
    start: str, loaded: dict[str, list[Import]], files: dict[str, str]
) -> Iterator[Import]:
    """Imports executed when ``start`` is imported; parent packages are executed too."""
    waiting, seen = [start], {start}
    while waiting:
        for item in loaded.get(waiting.pop(), ()):
            yield item
            parts = item.module.split(".")
            for end in range(1, len(parts) + 1):
                file = files.get(".".join(parts[:end]))
                if file and file not in seen:
                    seen.add(file)
                    waiting.append(file)


def _package(module: str) -> str:
    return module.partition(".")[0]


Check = Callable[[Project], list[str]]
CHECKS: tuple[Check, ...] = (
    check_rooms,
    check_direction,
    check_file_circles,
    check_room_circles,
    check_schemas,
    check_ray,
    check_light_rooms,
    check_drivers,
)


@pytest.fixture(scope="module")
def project() -> Project:
    return read_project(ROOT)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_project(project: Project, check: Check) -> None:
    assert check(project) == []


def test_imports_are_found(project: Project) -> None:
    """An empty reading of the source would pass every check."""
    files = {file for _, file in project.internal}
    assert {"pipeline/store/store.py", "schemas/store.py", "pipeline/text.py"} <= files
    assert any(not item.on_import for item, _ in project.internal)
    assert {room_of(file) for file in files} >= {
        *LAYERS["artifacts"],
        *LAYERS["science"],
        "schemas",
    }


VALID = {
    "pipeline/__init__.py": "",
    "pipeline/text.py": "import re\n",
    "pipeline/store/__init__.py": "from pipeline.store.store import Store\n",
    "pipeline/store/store.py": "from schemas.store import Manifest\nfrom pipeline import text\n",
    "pipeline/models/sit.py": "import torch\n",
    "pipeline/autoencoders/decoder.py": "import diffusers\n",
    "pipeline/checkpoints/state.py": "from pipeline.store import Store\n"
    "def load():\n    from pipeline.autoencoders import decoder\n",
    "pipeline/train/loop.py": "from pipeline.checkpoints import state\n",
    "pipeline/train/ray_trainer.py": "import ray.train\nfrom . import loop\n",
    "pipeline/extract/job.py": "def extract():\n    import ray\n",
    "schemas/store.py": "import pydantic\n",
    "jobs/train.py": "from pipeline.train.ray_trainer import fit\n",
}
"""A project in miniature that passes every check."""

BAD: dict[str, tuple[Check, dict[str, str], str]] = {
    "circle of two files": (
        check_file_circles,
        {"pipeline/models/sit.py": "from pipeline.models import dit\n"}
        | {"pipeline/models/dit.py": "from pipeline.models.sit import SiT\n"},
        "circle of imports: pipeline/models/",
    ),
    "circle through a function": (
        check_file_circles,
        {"pipeline/models/sit.py": "def f():\n    import pipeline.models.dit\n"}
        | {"pipeline/models/dit.py": "from pipeline.models.sit import SiT\n"},
        "circle of imports: pipeline/models/",
    ),
    "circle through a relative import": (
        check_file_circles,
        {"pipeline/models/sit.py": "from .layers.mlp import MLP\n"}
        | {"pipeline/models/layers/mlp.py": "from ..sit import SiT\n"},
        "circle of imports: pipeline/models/",
    ),
    "circle of rooms, not of files": (
        check_room_circles,
        {"pipeline/models/sit.py": "from pipeline.diffusion import ddpm\n"}
        | {"pipeline/diffusion/ddpm.py": ""}
        | {"pipeline/diffusion/samplers.py": "import pipeline.models.dit\n"}
        | {"pipeline/models/dit.py": ""},
        "circle of imports: ",
    ),
    "verb imports a job": (
        check_direction,
        {"pipeline/train/loop.py": "import jobs.train\n"},
        "pipeline/train/loop.py:1 imports jobs/train.py: train (verbs) is below jobs (jobs)",
    ),
    "artifact imports a verb": (
        check_direction,
        {"pipeline/store/store.py": "from pipeline.extract import job\n"},
        "store (artifacts) is below extract (verbs)",
    ),
    "model imports a store": (
        check_direction,
        {"pipeline/models/sit.py": "from pipeline.store import Store\n"},
        "models (science) is below store (artifacts)",
    ),
    "ground imports an artifact inside a function": (
        check_direction,
        {"pipeline/text.py": "def f():\n    from pipeline.store.store import Store\n"},
        "pipeline/text.py:2 imports pipeline/store/store.py: text (ground) is below",
    ),
    "ground imports science for its types": (
        check_direction,
        {"pipeline/text.py": "if TYPE_CHECKING:\n    from pipeline.models.sit import SiT\n"},
        "text (ground) is below models (science)",
    ),
    "new room": (
        check_rooms,
        {"pipeline/surgeon/__init__.py": ""},
        "room 'surgeon' belongs to no layer: add it to LAYERS in tests/test_architecture.py",
    ),
    "schema imports torch": (
        check_schemas,
        {"schemas/store.py": "def f():\n    import torch.nn\n"},
        "schemas/store.py:2 imports torch.nn",
    ),
    "schema imports ray": (check_schemas, {"schemas/run.py": "from ray import train\n"}, "ray"),
    "schema imports the pipeline": (
        check_schemas,
        {"schemas/run.py": "from pipeline.text import shortened\n"},
        "schemas/run.py:1 imports pipeline.text",
    ),
    "loop imports ray": (
        check_ray,
        {"pipeline/train/loop.py": "def f():\n    from ray.train import report\n"},
        "pipeline/train/loop.py:2 imports ray",
    ),
    "job imports ray": (check_ray, {"jobs/train.py": "import ray\n"}, "jobs/train.py:1"),
    "checkpoint loads diffusers": (
        check_light_rooms,
        {"pipeline/checkpoints/state.py": "import diffusers\n"},
        "importing pipeline/checkpoints/state.py loads diffusers",
    ),
    "run loads diffusers through another room": (
        check_light_rooms,
        {"pipeline/runs/reader.py": "from pipeline.autoencoders.decoder import decode\n"},
        "importing pipeline/runs/reader.py loads diffusers at pipeline/autoencoders/decoder.py:1",
    ),
    "driver loads the networks of its workers": (
        check_drivers,
        {"pipeline/train/ray_trainer.py": "from pipeline.autoencoders import decoder\n"},
        "importing pipeline/train/ray_trainer.py loads diffusers at",
    ),
    "run loads ray in a class and through a package": (
        check_light_rooms,
        {"pipeline/runs/reader.py": "class A:\n    import pipeline.distributed.signals\n"}
        | {"pipeline/distributed/__init__.py": "import ray\n"}
        | {"pipeline/distributed/signals.py": ""},
        "importing pipeline/runs/reader.py loads ray at pipeline/distributed/__init__.py:1",
    ),
}
"""Sources that break one rule: the check, files put into ``VALID``, a part of the message."""


def write_project(root: Path, sources: dict[str, str]) -> Project:
    for name, source in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")
    return read_project(root)


def test_valid_project(tmp_path: Path) -> None:
    project = write_project(tmp_path, VALID)
    assert [problem for check in CHECKS for problem in check(project)] == []


@pytest.mark.parametrize(("check", "sources", "message"), BAD.values(), ids=BAD.keys())
def test_bad_import_is_found(
    tmp_path: Path, check: Check, sources: dict[str, str], message: str
) -> None:
    problems = check(write_project(tmp_path, VALID | sources))
    assert any(message in problem for problem in problems), problems


def test_every_check_has_a_bad_case() -> None:
    assert {check for check, _, _ in BAD.values()} == set(CHECKS)


def test_help_of_the_report_is_light() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.report", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout.lower()
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pipeline.report" in {name.rpartition(".__main__")[0] or name for name in loaded}
    assert {_package(name) for name in loaded} & {"torch", "ray", "diffusers"} == set()


OPTIONAL = ("ray", "s3fs", "botocore", "aiobotocore", "aiohttp")
"""Packages that a machine for GPU tests may lack."""
USERS_OF_OPTIONAL = (*RAY_FILES, "jobs/*.py", "*/__main__.py", "tests/s3.py", "tests/faults/*.py")


def check_tests(project: Project) -> list[str]:
    """Files of tests that load ``OPTIONAL`` packages without importing one of their users, and
    fixtures that load them at all, so that the other tests run without them."""
    loaded: dict[str, list[Import]] = {}
    for item in project.imports:
        if item.on_import:
            loaded.setdefault(item.file, []).append(item)
    problems = []
    for start in project.files.values():
        name = start.rpartition("/")[2]
        if not start.startswith("tests/") or not name.startswith(("test_", "conftest.")):
            continue
        direct = [project.files.get(item.module, item.module) for item in loaded.get(start, ())]
        uses = any(
            _package(target) in OPTIONAL or any(fnmatch(target, p) for p in USERS_OF_OPTIONAL)
            for target in direct
        )
        if name != "conftest.py" and uses:
            continue
        for item in _reached(start, loaded, project.files):
            if _package(item.module) in OPTIONAL:
                problems.append(f"importing {start} loads {item.module} at {item.place}")
    return problems


def test_tests_without_ray_and_s3_need_neither() -> None:
    assert check_tests(read_project(ROOT, ("pipeline", "schemas", "jobs", "tests"))) == []


def test_a_test_that_needs_ray_needlessly_is_found(tmp_path: Path) -> None:
    sources = {
        "pipeline/extract/encoder_pool.py": "import ray\n",
        "tests/conftest.py": "import ray\n",
        "tests/test_deep.py": "from tests import helpers\n",
        "tests/test_store.py": "from pipeline.store.store import Store\n",
        "tests/test_user.py": "from pipeline.extract import encoder_pool\n",
        "tests/helpers.py": "from pipeline.extract import encoder_pool\n",
    }
    write_project(tmp_path, VALID | sources)
    problems = check_tests(read_project(tmp_path, ("pipeline", "schemas", "jobs", "tests")))
    assert [problem.split()[1] for problem in problems] == [
        "tests/conftest.py",
        "tests/test_deep.py",
    ]
