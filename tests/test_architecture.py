# SPDX-License-Identifier: Apache-2.0
"""The shape of the library, as rules: who imports whom, what is never used, which private names are touched."""

import ast
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import deepspeed
from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

import grass_ds
from grass_ds.core import deepspeed_compat

PACKAGE = Path(grass_ds.__file__).resolve().parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
MAX_LINES, MAX_COLUMNS = 350, 119
COMPAT = "core/deepspeed_compat.py"


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


def imports(name: str) -> set[str]:
    """Dotted names of everything that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def outside(name: str, *allowed: str) -> set[str]:
    """Third-party and own imports of a module that start with none of ``allowed``."""
    third_party = {i for i in imports(name) if i.split(".")[0] in THIRD_PARTY}
    return {i for i in third_party if not any(i == a or i.startswith(f"{a}.") for a in allowed)}


THIRD_PARTY = {i.split(".")[0] for name in MODULES for i in imports(name)} - set(__import__("sys").stdlib_module_names)

# Every room imports from itself and from those before it.
ROOMS = (
    "sampling",
    "versions",
    "precision",
    "cluster",
    "core",
    "config",
    "offload",
    "checkpoint",
    "zero",
    "validation",
    "plan",
    "entry",
    "program",
    "trainer",
    "integrations",
    "compare",
    "doctor",
    "__main__",
    "__init__",
)
ROOM = {name: name.split("/")[0].removesuffix(".py") for name in MODULES}
# Third-party packages that a room may import; all others need torch and DeepSpeed at most.
PACKAGES = {
    "sampling": {"torch"},
    "config": {"pydantic"},
    "trainer": {"torch", "deepspeed", "accelerate", "transformers", "matplotlib", "numpy", "safetensors", "wandb"}
    | {"huggingface_hub"},
    "integrations": {"axolotl", "swift", "llamafactory"},
    "compare": {"matplotlib"},
    "plan": {"torch", "transformers"},
    "core": {"torch", "deepspeed", "packaging"},
    "cluster": {"torch", "deepspeed", "mpi4py"},
    "doctor": {"torch", "deepspeed", "packaging", "psutil"},
    "versions": {"packaging"},
    "precision": {"torch", "deepspeed"},
    "program": set(),
    "__init__": set(),
    "__main__": {"torch"},
}


def test_the_rules_see_the_library() -> None:
    assert set(ROOM.values()) == set(ROOMS)
    assert all(len([n for n in MODULES if ROOM[n] == room]) > 3 for room in ("sampling", "core", "offload", "zero"))
    assert {"torch", "deepspeed", "transformers", "grass_ds"} <= THIRD_PARTY


def violations(rule: Callable[[str], object], names: Iterable[str] = MODULES) -> dict[str, object]:
    """Modules of ``names`` that break a rule, with what the rule finds in them; a rule that holds finds nothing."""
    return {name: found for name in names if (found := rule(name))}


def test_rooms_import_one_way() -> None:
    def found(name: str) -> set[str]:
        own = {i for i in imports(name) if i.startswith("grass_ds.")}
        allowed = {f"grass_ds.{room}" for room in ROOMS[: ROOMS.index(ROOM[name]) + 1]}
        return {i for i in own if ".".join(i.split(".")[:2]) not in allowed}

    assert violations(found) == {}


def test_no_files_import_each_other() -> None:
    by_module = {"grass_ds." + name.removesuffix(".py").replace("/", "."): name for name in MODULES}
    edges = {
        name: {by_module[m] for i in imports(name) for m in (i, i.rpartition(".")[0]) if m in by_module} - {name}
        for name in MODULES
    }
    while leaves := {name for name, targets in edges.items() if not targets}:
        edges = {name: targets - leaves for name, targets in edges.items() if name not in leaves}
    assert edges == {}


def test_no_two_files_have_one_name() -> None:
    names = [path.name for path in MODULES.values() if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_rooms_need_the_packages_they_are_for() -> None:
    def found(name: str) -> set[str]:
        used = {i.split(".")[0] for i in imports(name)} & THIRD_PARTY - {"grass_ds"}
        return used - PACKAGES.get(ROOM[name], {"torch", "deepspeed"})

    def collectives(name: str) -> set[str]:
        return {i for i in imports(name) if i.startswith("torch.distributed")}

    assert violations(found) == {}
    assert violations(collectives, [name for name in MODULES if ROOM[name] == "sampling"]) == {}


def test_importing_the_library_needs_no_plotting() -> None:
    def found(name: str) -> set[str]:
        top = {a.name for node in tree(name).body if isinstance(node, ast.Import) for a in node.names}
        top |= {str(node.module) for node in tree(name).body if isinstance(node, ast.ImportFrom)}
        return {i for i in top if i.startswith(("matplotlib", "wandb"))}

    assert violations(found) == {}


def test_deepspeeds_abstractions_and_logger_are_used() -> None:
    def found(name: str) -> set[str]:
        if name == COMPAT:
            return set()  # it stands in for methods that the accelerators of older releases lack
        names = {ast.unparse(node) for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)}
        direct = {n for n in names | imports(name) if n.startswith(("torch.cuda", "torch.distributed"))}
        if name.startswith("doctor/") or name == "__main__.py":
            return direct  # a program for the terminal, which prints
        calls = {ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}
        return direct | calls & {"print"}

    assert violations(found) == {}


def test_modules_are_short_licensed_and_explained() -> None:
    def found(name: str) -> list[str]:
        lines = MODULES[name].read_text().splitlines()
        faults = [f"{len(lines)} lines"] if len(lines) > MAX_LINES else []
        if lines and lines[0] != "# SPDX-License-Identifier: Apache-2.0":
            faults.append("no licence")
        if lines and not ast.get_docstring(tree(name)):
            faults.append("no docstring")
        return faults

    assert violations(found) == {}


DEFINITIONS = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def test_docstrings_fit_the_line() -> None:
    """The formatter wraps code; docstrings are wrapped by hand."""

    def found(name: str) -> set[int]:
        documented = [
            node for node in ast.walk(tree(name)) if isinstance(node, DEFINITIONS) and ast.get_docstring(node)
        ]
        lines = MODULES[name].read_text().splitlines()
        texts = [node.body[0] for node in documented]
        numbers = {number for text in texts for number in range(text.lineno, (text.end_lineno or 0) + 1)}
        return {number for number in numbers if len(lines[number - 1]) > MAX_COLUMNS}

    assert violations(found) == {}


HIDDEN_WAYS = {
    "currentframe",
    "_getframe",
    "getouterframes",
    "inspect.stack",
    "f_back",
    "f_locals",
    "__closure__",
    "cell_contents",
}


def test_no_module_looks_into_its_callers_or_into_closures() -> None:
    def found(name: str) -> set[str]:
        nodes = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute | ast.Name)]
        names = {ast.unparse(node) for node in nodes} | {
            node.attr for node in nodes if isinstance(node, ast.Attribute)
        }
        return (names | {i.rpartition(".")[2] for i in imports(name)}) & HIDDEN_WAYS

    assert violations(found) == {}


def test_the_users_training_arguments_are_not_altered() -> None:
    def found(name: str) -> set[str]:
        nodes = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)]
        stored = [node for node in nodes if isinstance(node.ctx, ast.Store | ast.Del)]
        return {ast.unparse(node) for node in stored if re.search(r"(^|\.)_?args$", ast.unparse(node.value))}

    assert violations(found) == {}


def test_what_looks_into_deepspeeds_closure_is_in_compat() -> None:
    def found(name: str) -> bool:
        return any(node.attr == "getclosurevars" for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute))

    assert violations(found).keys() == {COMPAT}


# Words of an earlier vocabulary, each with several meanings or none in the field.
VAGUE_WORDS = {"settle", "settled", "standings", "contest", "lineup", "keeper", "meters", "aims", "worth", "floor"}


def test_names_are_the_fields_words() -> None:
    def found(name: str) -> set[str]:
        defined = {node.name for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assigned = {node.id for node in ast.walk(tree(name)) if isinstance(node, ast.Name)}
        attributes = {
            node.attr
            for node in ast.walk(tree(name))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        names = defined | assigned | attributes
        return {each for each in names if VAGUE_WORDS & {*re.findall(r"[A-Z]?[a-z]+", each), each.lower()}}

    assert violations(found) == {}


# ---- private names of DeepSpeed ------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def used_private_names(name: str) -> set[str]:
    """Attributes ``something._name``, imported names and defined methods that begin with one underscore."""
    found = {i.rsplit(".", 1)[-1] for i in imports(name) if i.startswith("deepspeed")}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) != "os._exit":
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {n for n in found if is_private(n)}


SEARCHED = ("runtime/engine.py", "runtime/base_optimizer.py", "utils/tensor_fragment.py", "utils/groups.py")
SEARCHED_OF_ZERO3 = tuple(
    f"runtime/zero/{name}.py"
    for name in ("stage3", "parameter_offload", "partitioned_param_coordinator", "partition_parameters")
)


def deepspeeds_private_names() -> set[str]:
    """Of the engine and of the ZeRO base class, those that the engine and the utilities ask of any ZeRO optimizer or
    parameter (where a plain text search has to do), and all of the classes that make up ZeRO-3, mangled ones included."""
    names = {n for cls in (DeepSpeedEngine, ZeROOptimizer) for n in vars(cls)}
    root = Path(deepspeed.__file__).parent
    for file in (*SEARCHED, *SEARCHED_OF_ZERO3):
        source = (root / file).read_text()
        names |= set(re.findall(r"(?:optimizer|param|lp|p)\.(_[a-z]\w*)", source)) | set(
            re.findall(r"def (_[a-z]\w*)", source)
        )
        names |= set(re.findall(r"(?:hasattr|getattr)\([^,()]+(?:\(\))?, ['\"](_[a-z]\w*)['\"]", source))
    for file in SEARCHED_OF_ZERO3:
        source = (root / file).read_text()
        names |= set(re.findall(r"\bself\.(_[a-z]\w*)", source))
        hidden = {n for n in re.findall(r"\b(?:self\.|def )(__[a-z]\w*)", source) if not n.endswith("__")}
        names |= {f"_{cls}{n}" for cls in re.findall(r"^class (\w+)", source, re.MULTILINE) for n in hidden}
    return {n for n in names if is_private(n)}


def test_the_search_finds_what_makes_up_zero3() -> None:
    found = deepspeeds_private_names()
    assert {"_invalidate_trace", "_partition_param", "_register_deepspeed_module", "_create_fp16_sub_groups"} <= found
    assert {"_prefetch_bucket_sz", "_z3_optimizer", "_PartitionedParameterCoordinator__params_to_release"} <= found


# What DeepSpeed's documentation shows to everybody.
PUBLIC = {
    "deepspeed",
    "deepspeed.DeepSpeedEngine",
    "deepspeed.__version__",
    "deepspeed.accelerator.get_accelerator",
    "deepspeed.comm",
    "deepspeed.initialize",
    "deepspeed.utils.log_dist",
    "deepspeed.utils.logger",
}
PUBLIC_OF_ENGINES = {
    "compile",
    "destroy",
    "gradient_accumulation_steps",
    "is_gradient_accumulation_boundary",
    "load_checkpoint",
    "module",
    "save_checkpoint",
    "zero_grad",
}


def listed_in_compat() -> set[str]:
    """The names in its lists, which ``deepspeed_compat.missing_names`` looks for."""
    lists = [value for name, value in vars(deepspeed_compat).items() if name.isupper() and isinstance(value, tuple)]
    return {name for names in (*lists, *deepspeed_compat.MODULE_NAMES.values()) for name in names}


def from_deepspeed(nodes: ast.AST) -> set[str]:
    """Dotted names that are imported from DeepSpeed, or read from the module ``deepspeed``."""
    found = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(nodes)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "deepspeed"
        for alias in node.names
    }
    plain = [a for node in ast.walk(nodes) if isinstance(node, ast.Import) for a in node.names]
    # Under another name the reads below would not be seen.
    imported = {f"{a.name} as {a.asname}" if a.asname and "." not in a.name else a.name for a in plain}
    read = {ast.unparse(node) for node in ast.walk(nodes) if isinstance(node, ast.Attribute)}
    return found | {name for name in imported | read if re.match(r"deepspeed\b", name)}


def test_deepspeed_is_imported_in_compat_alone() -> None:
    """Of all code that is not a test."""
    files = {name: path for name, path in MODULES.items() if name != COMPAT}
    files |= {str(path): path for room in ("launch", "benchmarks") for path in (PACKAGE.parent / room).rglob("*.py")}
    allowed = PUBLIC | {f"deepspeed.{name}" for name in ("comm", "accelerator")}
    found = {name: from_deepspeed(ast.parse(path.read_text())) - allowed for name, path in files.items()}
    assert {name: names for name, names in found.items() if names} == {}
    assert len(from_deepspeed(tree(COMPAT)) - allowed) > 20


def defined_in(name: str) -> set[str]:
    """Attributes that a module of ours defines: functions, class variables, and what it sets on ``self``."""
    found = {node.name for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


ENGINES = ("zero/engine.py", "zero/checkpointing.py")


def test_what_is_used_of_deepspeeds_engine_is_listed_in_compat() -> None:
    """Public names, too, unless they are documented: of ``self`` in the engine's modules, of ``engine`` in all."""
    theirs = {*dir(DeepSpeedEngine), *deepspeed_compat.assigned_by(DeepSpeedEngine)} - {*dir(object)}
    known = listed_in_compat() | PUBLIC_OF_ENGINES
    ours = {n for file in ENGINES for n in defined_in(file)} - theirs | {"grass"}

    def found(name: str) -> set[str]:
        receivers = {"engine", "self.engine", "self._engine"} | ({"self", "super()"} if name in ENGINES else set())
        nodes = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)]
        return {node.attr for node in nodes if ast.unparse(node.value) in receivers} & theirs - known - ours

    assert violations(found, MODULES.keys() - {COMPAT}) == {}


def test_what_is_used_of_partitioned_weights_is_listed_in_compat() -> None:
    def found(name: str) -> set[str]:
        nodes = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)]
        hooks = {node.attr for node in nodes if ast.unparse(node.value).endswith(("parameter_offload", "offload"))}
        used = {node.attr for node in nodes if node.attr.startswith("ds_")} | hooks & set(
            dir(deepspeed_compat.DeepSpeedZeRoOffload)
        )
        return used - listed_in_compat()

    assert violations(found, MODULES.keys() - {COMPAT}) == {}
    assert "ds_tensor" in {node.attr for node in ast.walk(tree("zero/stage3.py")) if isinstance(node, ast.Attribute)}


def test_accelerators_have_what_is_asked_of_them() -> None:
    def found(name: str) -> set[str]:
        nodes = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)]
        return {node.attr for node in nodes if ast.unparse(node.value) == "get_accelerator()"} - set(
            dir(DeepSpeedAccelerator)
        )

    assert violations(found) == {}


def test_private_names_of_deepspeed_are_listed_in_compat() -> None:
    unlisted = deepspeeds_private_names() - listed_in_compat()
    assert violations(lambda name: used_private_names(name) & unlisted, MODULES.keys() - {COMPAT}) == {}


def test_compat_demands_no_engine_name_that_is_not_used() -> None:
    """A name too many would refuse a DeepSpeed that works."""
    readers = ("entry.py", "zero/gradients.py", "zero/optimizer.py", "zero/wrapper.py")
    nodes = [node for file in (*ENGINES, *readers) for node in ast.walk(tree(file))]
    engine = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    engine |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    wanted = {*deepspeed_compat.ENGINE_METHODS, *deepspeed_compat.ENGINE_READS, *deepspeed_compat.ENGINE_ATTRIBUTES}
    set_in_compat = {"_compile_kwargs", "_is_compiled"}
    by_name = {node.value for node in nodes if isinstance(node, ast.Constant)}
    assert wanted - engine - set_in_compat - by_name == set()
