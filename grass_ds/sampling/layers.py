# SPDX-License-Identifier: Apache-2.0
"""Find the decoder blocks of a model and the kinds of all other parameters, by structure alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

OUTSIDE_KINDS = ("embed", "norm", "head", "other", "tower")
VECTOR = "vector"  # kind of what is left in the blocks when their weights are drawn one by one
DOMINANCE = 3  # the largest stack is taken if it holds at least this many times the parameters of the second


class LayerDiscoveryError(ValueError):
    """The block stack cannot be found; the message lists the candidates."""


@dataclass(frozen=True)
class ModelLayers:
    """What is sampled in a model, and the kinds of its other parameters, by the names of ``model.named_parameters()``.

    Attributes:
        path: of the block stack, for example ``model.layers``.
        blocks: names of the decoder blocks, in module order.
        names: of what is sampled: the blocks, or after :meth:`by_weight` their weight matrices. A "layer" of the
            sampler and of a unit is an index of this tuple.
        depths: index of the block of each; ``sizes``: elements of each; ``block_params``: parameter names of each.
        outside: parameter names by kind, without empty kinds: ``embed``, ``norm``, ``head``, ``other`` as in
            ``grass.always_active``, ``tower`` for model parts with blocks of their own (an encoder), and after
            :meth:`by_weight` ``vector`` for what is no matrix inside the blocks (norms, biases).
        below: kinds of ``outside`` with something below the blocks, whose gradient passes all of them.
        vocabulary_head: ``head`` projects to the vocabulary; if it is tied, too.
        tied: the head shares a parameter with the embeddings; all of both is then listed under ``embed``.
    """

    path: str
    blocks: tuple[str, ...]
    names: tuple[str, ...]
    depths: tuple[int, ...]
    sizes: tuple[int, ...]
    block_params: tuple[tuple[str, ...], ...]
    outside: dict[str, tuple[str, ...]]
    below: tuple[str, ...]
    vocabulary_head: bool
    tied: bool

    def by_weight(self, model: nn.Module) -> "ModelLayers":
        """The same with every parameter of two or more dimensions inside the blocks as a layer of its own.

        Raises:
            LayerDiscoveryError: there is none.
        """
        shapes = {name: _shape(param) for name, param in model.named_parameters()}
        inside = [(depth, name) for depth, names in enumerate(self.block_params) for name in names]
        drawn = [(depth, name) for depth, name in inside if len(shapes[name]) > 1]
        vectors = tuple(name for _, name in inside if len(shapes[name]) < 2)
        if not drawn:
            raise LayerDiscoveryError(
                f"the blocks at {self.path} have no parameter of two dimensions or more to sample"
            )
        depths, names = zip(*drawn, strict=True)
        return replace(
            self,
            names=names,
            depths=depths,
            sizes=tuple(prod(shapes[name]) for name in names),
            block_params=tuple((name,) for name in names),
            outside={**self.outside, **({VECTOR: vectors} if vectors else {})},
        )

    def resolve_always_active(self, kinds: Sequence[str] | None) -> tuple[str, ...]:
        """The keys of ``outside`` that ``kinds`` stand for, each once, in order.

        ``head`` stands for ``embed`` when they are tied, and ``other`` also for ``tower``. None is the default: all
        but the embeddings, the projection to the vocabulary and towers.

        Raises:
            ValueError: this model has no parameters of a kind.
        """
        if kinds is None:
            default = ("norm", "other") if self.vocabulary_head else ("norm", "head", "other")
            return tuple(kind for kind in default if kind in self.outside)
        resolved: dict[str, None] = {}
        for kind in kinds:
            meant = ("embed",) if kind == "head" and self.tied else ("other", "tower") if kind == "other" else (kind,)
            found = [name for name in meant if name in self.outside]
            if not found:
                shown = {key: ", ".join(names[:3]) + ", ..." * (len(names) > 3) for key, names in self.outside.items()}
                raise ValueError(
                    f"grass.always_active has {kind!r}, but this model has nothing of that kind outside its blocks. "
                    f"It has: {'; '.join(f'{key!r} ({names})' for key, names in shown.items()) or 'nothing'}. "
                    "Name some of these, or leave always_active out for the default"
                )
            resolved.update(dict.fromkeys(found))
        return tuple(resolved)


def discover_layers(model: nn.Module, layers_path: str | None = None) -> ModelLayers:
    """Find the decoder blocks, and the kinds of all other parameters.

    The stack of blocks is the ``nn.ModuleList`` with the most parameters whose entries have one type and all hold
    parameters. It is searched inside ``get_decoder()`` where the model has that method.

    Args:
        model: any module, also in wrappers that add a name prefix.
        layers_path: name of the stack in ``model.named_modules()``; overrides the search.

    Raises:
        LayerDiscoveryError: no stack, several alike, a wrong ``layers_path``, or blocks that share parameters.
    """
    candidates = _stack_candidates(model)
    path = _best_stack(model, candidates) if layers_path is None else _explicit_stack(model, layers_path, candidates)
    names = tuple(f"{path}.{child}" for child, _ in model.get_submodule(path).named_children())
    block_params = _block_parameters(model, names)
    rest = _Outside(model, path, candidates)
    outside = rest.names_by_kind()
    sizes = tuple(_numel(model.get_submodule(name)) for name in names)
    below, heads = rest.below(outside), bool(rest.vocabulary_heads)
    depths = tuple(range(len(names)))
    return ModelLayers(path, names, names, depths, sizes, block_params, outside, below, heads, rest.tied)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The full shape, also of a parameter that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(module: nn.Module) -> int:
    return sum(prod(_shape(p)) for p in module.parameters())


def _inside(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(parent + ".")


def _stack_candidates(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Outermost module lists whose entries all hold parameters, by path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _holding(module) and not any(_inside(path, outer) for outer in found):
            found[path] = module
    return found


def _holding(blocks: nn.ModuleList | nn.Sequential) -> bool:
    return len(blocks) > 0 and all(next(block.parameters(), None) is not None for block in blocks)


def _best_stack(model: nn.Module, candidates: dict[str, nn.ModuleList]) -> str:
    decoder = _from_first(model, "get_decoder")
    inner = set() if decoder is None else set(decoder.modules())
    eligible = {path: blocks for path, blocks in candidates.items() if blocks in inner} or candidates
    if not eligible:
        raise LayerDiscoveryError(_explain("no list of decoder blocks was found in the model", candidates))
    ranked = sorted(eligible, key=lambda path: _numel(eligible[path]), reverse=True)
    if len(ranked) > 1 and _numel(eligible[ranked[0]]) < DOMINANCE * _numel(eligible[ranked[1]]):
        raise LayerDiscoveryError(_explain("the model has several block lists of comparable size", candidates))
    if len({type(block) for block in eligible[ranked[0]]}) > 1:
        raise LayerDiscoveryError(_explain("the model's largest block list mixes several types of blocks", candidates))
    return ranked[0]


def _explicit_stack(model: nn.Module, path: str, candidates: dict[str, nn.ModuleList]) -> str:
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not _holding(module):
        problem = f"grass.layers_path = {path!r} is not a list of blocks that all have parameters"
        raise LayerDiscoveryError(_explain(problem, candidates))
    return path


def _explain(problem: str, candidates: dict[str, nn.ModuleList]) -> str:
    lines = [f"  {path}: {len(blocks)} blocks, {_numel(blocks):,} parameters" for path, blocks in candidates.items()]
    remedy = 'Set "grass": {"layers_path": "..."} to the name of the decoder\'s list'
    return "\n".join([f"{problem}. {remedy}. Candidates:", *(lines or ["  (none)"])])


def _from_first(model: nn.Module, getter: str) -> nn.Module | None:
    """The result of ``getter`` on the outermost module that has it: a wrapper has no methods of the model inside."""
    owner = next((module for module in model.modules() if callable(getattr(module, getter, None))), None)
    try:
        result = getattr(owner, getter)()
    except (NotImplementedError, AttributeError):  # also without an owner
        return None
    return result if isinstance(result, nn.Module) else None


def _block_parameters(model: nn.Module, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Parameter names of each block; a parameter that is shared beyond its block is an error."""
    canonical = {parameter: name for name, parameter in model.named_parameters()}
    owners: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next((block for block in names if _inside(name, block)), "the modules outside the blocks")
        if owners.setdefault(parameter, owner) != owner:
            raise LayerDiscoveryError(
                f"parameter {name!r} is shared by {owners[parameter]} and {owner}: GRASS trains layers independently "
                "of each other, so it cannot train a model whose blocks share parameters. Untie them first"
            )
    return tuple(tuple(canonical[p] for p in model.get_submodule(block).parameters()) for block in names)


class _Outside:
    """The parameters outside the blocks, and the modules that tell their kinds."""

    def __init__(self, model: nn.Module, stack: str, candidates: dict[str, nn.ModuleList]) -> None:
        self._model, self._stack = model, stack
        self._names = {p: name for name, p in model.named_parameters() if not _inside(name, stack)}
        self._positions = {path: position for position, (path, _) in enumerate(model.named_modules())}
        self._towers = tuple(self._find_towers(candidates))
        self._modules = {
            path: module
            for path, module in model.named_modules()
            if not any(_inside(path, root) for root in (stack, *self._towers))
            and next(module.parameters(recurse=False), None) is not None
        }
        found = [module for module in self._modules.values() if isinstance(module, nn.Embedding)]
        # The tokens' embedding comes first: the named one, else the largest.
        self._embeddings = _named_first(model, "get_input_embeddings", sorted(found, key=_numel, reverse=True))
        tables = [_shape(p) for module in self._embeddings for p in module.parameters() if len(_shape(p)) == 2]
        vectors = [_shape(p) for p in model.get_submodule(stack).parameters() if len(_shape(p)) == 1]
        self._widths = {shape[-1] for shape in (*tables, *vectors)}
        # Only the tokens' table tells: one of positions or token types may be as large as a classifier.
        heads = [
            module
            for module in self._modules.values()
            if module not in self._embeddings
            and any(name == "weight" and _shape(p) in tables[:1] for name, p in module.named_parameters(recurse=False))
        ]
        self.vocabulary_heads = _named_first(model, "get_output_embeddings", heads)
        embedded = {p for module in self._embeddings for p in module.parameters()}
        self.tied = any(p in embedded for head in self.vocabulary_heads for p in head.parameters())

    def names_by_kind(self) -> dict[str, tuple[str, ...]]:
        """Parameter names by kind, in model order; without empty kinds."""
        kinds: dict[nn.Parameter, str] = {}
        for kind, parameters in self._kinds():
            for parameter in parameters:
                kinds.setdefault(parameter, kind)
        found = {kind: [n for p, n in self._names.items() if kinds.get(p, "other") == kind] for kind in OUTSIDE_KINDS}
        return {kind: tuple(names) for kind, names in found.items() if names}

    def _kinds(self) -> Iterator[tuple[str, Iterable[nn.Parameter]]]:
        """Kinds with parameters of theirs. The first kind of a parameter counts; without one it is ``other``."""
        for module in self._embeddings:
            yield "embed", module.parameters()
        for module in self.vocabulary_heads:
            yield "embed" if self.tied else "head", module.parameters()
        for path, module in self._modules.items():
            if self._is_norm(path, module):
                yield "embed" if self._says_embedding(path) else "norm", module.parameters()
            elif not self.vocabulary_heads and self._above(path):
                yield "head", module.parameters()
        for parameter, name in self._names.items():
            if any(_inside(name, root) for root in self._towers):
                yield "tower", [parameter]
            elif self._says_embedding(name) and not self._above(_parent(name)):
                yield "embed", [parameter]  # a table of positions, a mask's vector, a projection of the embeddings

    def below(self, outside: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
        """``embed``, and kinds with a parameter in a module that was registered before the stack (an encoder)."""
        lower = {kind for kind, names in outside.items() if not all(self._above(_parent(name)) for name in names)}
        return tuple(kind for kind in outside if kind in {"embed", *lower} - {"norm", "head"})

    def _says_embedding(self, path: str) -> bool:
        """Whether the name says so, below what it has in common with the stack's: a model may be called "ensemble"."""
        parts, stack = path.lower().split("."), self._stack.lower().split(".")
        return any("emb" in part for part in parts[_shared(parts, stack) :])

    def _above(self, path: str) -> bool:
        """Whether a module was registered after the stack: models apply their modules in the order of registration."""
        return self._positions[path] > self._positions[self._stack]

    def _find_towers(self, candidates: dict[str, nn.ModuleList]) -> Iterator[str]:
        """Subtrees with a stack of their own. A list above the blocks and smaller than one of them holds heads."""
        block = _numel(self._model.get_submodule(self._stack)[0])  # type: ignore[index]
        for path, blocks in candidates.items():
            compound = next(iter(blocks[0].children()), None) is not None
            heads = self._above(path) and _numel(blocks) < block
            if compound and not heads and not _inside(self._stack, path):
                parts = path.split(".")
                yield ".".join(parts[: _shared(parts, self._stack.split(".")) + 1])

    def _is_norm(self, path: str, module: nn.Module) -> bool:
        """Whether it holds vectors of the hidden size only, and lies beside the stack or an ancestor of it.

        An embedding norm may lie anywhere.
        """
        if not path or next(module.children(), None) is not None:
            return False
        shapes = {_shape(p) for p in module.parameters(recurse=False)}
        vectors = len(shapes) == 1 and all(len(shape) == 1 and shape[0] in self._widths for shape in shapes)
        return vectors and (_inside(self._stack, _parent(path)) or self._says_embedding(path))


def _named_first(model: nn.Module, getter: str, found: Sequence[nn.Module]) -> list[nn.Module]:
    """``found``, with the module first that the model names itself."""
    named = _from_first(model, getter)
    return [*([] if named is None else [named]), *(module for module in found if module is not named)]


def _parent(name: str) -> str:
    """The path of the module that holds a parameter or a module."""
    return name.rpartition(".")[0]


def _shared(parts: Sequence[str], stack: Sequence[str]) -> int:
    """The number of leading parts that a path has in common with the stack's."""
    return next((i for i, (one, other) in enumerate(zip(parts, stack, strict=False)) if one != other), len(stack))
