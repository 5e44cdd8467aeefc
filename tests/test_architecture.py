# SPDX-License-Identifier: Apache-2.0
"""The shape of the library, as rules: who imports whom, what is never used, which private names are touched."""

import ast
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import deepspeed
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

import grass_ds
from grass_ds.runtime import seams

PACKAGE = Path(grass_ds.__file__).resolve().parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
MAX_LINES = 400


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
POLICY = [name for name in MODULES if name.startswith("policy/")]
RUNTIME = [name for name in MODULES if name.startswith("runtime/")]


def test_the_rules_see_the_library() -> None:
    assert len(POLICY) >= 6
    assert len(RUNTIME) >= 9
    assert {"torch", "deepspeed", "transformers", "grass_ds"} <= THIRD_PARTY


def violations(rule: Callable[[str], object], names: Iterable[str] = MODULES) -> dict[str, object]:
    """Modules of ``names`` that break a rule, with what the rule finds in them; a rule that holds finds nothing."""
    return {name: found for name in names if (found := rule(name))}


def test_policy_is_torch_and_the_standard_library() -> None:
    def found(name: str) -> set[str]:
        collectives = {i for i in imports(name) if i.startswith("torch.distributed")}
        return outside(name, "torch", "grass_ds.policy") | collectives

    assert violations(found, POLICY) == {}


def test_runtime_does_not_know_the_surface() -> None:
    def found(name: str) -> set[str]:
        own = {i for i in imports(name) if i.split(".")[0] == "grass_ds"}
        surface = {i for i in own if not re.match(r"grass_ds\.(config|policy|runtime)\b", i)}
        return surface | outside(name, "torch", "deepspeed", "packaging", "grass_ds")

    assert violations(found, RUNTIME) == {}


def test_config_is_pydantic_and_deepspeeds_base() -> None:
    assert outside("config.py", "deepspeed.runtime.config_utils", "pydantic") == set()


def test_transformers_only_in_the_callback() -> None:
    kept_out = {"transformers", "accelerate", "datasets", "peft", "wandb"}

    def found(name: str) -> set[str]:
        return {i.split(".")[0] for i in imports(name)} & kept_out

    assert violations(found).keys() <= {"hf.py"}


def test_importing_the_library_needs_no_plotting() -> None:
    def found(name: str) -> set[str]:
        top = {a.name for node in tree(name).body if isinstance(node, ast.Import) for a in node.names}
        top |= {str(node.module) for node in tree(name).body if isinstance(node, ast.ImportFrom)}
        return {i for i in top if i.startswith(("matplotlib", "wandb"))}

    assert violations(found) == {}


def test_deepspeeds_abstractions_and_logger_are_used() -> None:
    def found(name: str) -> set[str]:
        if name == "doctor/rendezvous.py":
            return set()  # the ranks meet there before there is a process group, for which DeepSpeed has nothing
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


def test_private_names_of_deepspeed_are_listed_in_seams() -> None:
    listed = {node.value for node in ast.walk(tree("runtime/seams.py")) if isinstance(node, ast.Constant)}
    unlisted = deepspeeds_private_names() - listed
    assert violations(lambda name: used_private_names(name) & unlisted, MODULES.keys() - {"runtime/seams.py"}) == {}


def test_private_names_are_imported_from_seams_alone() -> None:
    def found(name: str) -> set[str]:
        return {i for i in imports(name) if i.startswith("deepspeed") and is_private(i.rsplit(".", 1)[-1])}

    assert violations(found).keys() <= {"runtime/seams.py"}


def test_seams_demands_no_engine_name_that_is_not_used() -> None:
    """A name too many would refuse a DeepSpeed that works."""
    nodes = [node for file in ("runtime/engine.py", "runtime/checkpoint/engine.py") for node in ast.walk(tree(file))]
    engine = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    engine |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert {*seams.ENGINE_METHODS, *seams.ENGINE_READS} - engine == set()
