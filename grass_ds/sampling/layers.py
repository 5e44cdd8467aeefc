# SPDX-License-Identifier: Apache-2.0
"""Find the decoder blocks of a model and name every parameter's place, by structure alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

OUTSIDE_KINDS = ("embed", "norm", "head", "other", "tower")
ALWAYS_ACTIVE_KINDS = ("embed", "norm", "head", "other")  # what grass.always_active may name; "other" includes "tower"
DOMINANCE = 3  # a stack is taken over another without further evidence if it holds this many times its parameters


class LayerDiscoveryError(ValueError):
    """The block stack cannot be told; the message lists the candidates."""


@dataclass(frozen=True)
class ModelLayers:
    """Where every parameter of a model belongs. Names are those of ``model.named_parameters()``, each listed once.

    Attributes:
        path: of the block stack, for example ``model.layers``.
        names: of the blocks, in module order.
        block_params: parameter names of each block.
        outside: parameter names by kind; an empty kind is missing. ``embed``: embeddings. ``norm``: the final norm. ``head``: output
            layers, which are the projection to the vocabulary or, in a model without one, everything above the blocks (a
            classifier, a reward model's score). ``tower``: other model parts with blocks of their own (an encoder beside
            the decoder, a vision tower). ``other``: the rest (a value head beside the vocabulary's, a projector).
        below: kinds of ``outside`` of which something lies below the blocks, so that its gradient passes all of them.
        vocabulary_head: ``head`` projects to the vocabulary; if it is tied, too.
        tied: the head shares a parameter with the embeddings; all of both is then listed under ``embed``.
    """

    path: str
    names: tuple[str, ...]
    block_params: tuple[tuple[str, ...], ...]
    outside: dict[str, tuple[str, ...]]
    below: tuple[str, ...]
    vocabulary_head: bool
    tied: bool

    def resolve_always_active(self, kinds: Sequence[str] | None) -> tuple[str, ...]:
        """The keys of ``outside`` that ``kinds`` stand for, each once, in order.

        ``head`` stands for ``embed`` when they are tied, and ``other`` also for ``tower``. None is the default: everything but the
        embeddings, the projection to the vocabulary and towers, since what is left may be new and random.

        Raises:
            ValueError: an unknown kind, or one that this model has no parameters of.
        """
        if kinds is None:
            default = ("norm", "other") if self.vocabulary_head else ("norm", "head", "other")
            return tuple(kind for kind in default if kind in self.outside)
        resolved: dict[str, None] = {}
        for kind in kinds:
            if kind not in ALWAYS_ACTIVE_KINDS:
                raise ValueError(
                    f"grass.always_active has {kind!r}: expected any of {', '.join(map(repr, ALWAYS_ACTIVE_KINDS))}"
                )
            meant = ("embed",) if kind == "head" and self.tied else ("other", "tower") if kind == "other" else (kind,)
            found = [name for name in meant if name in self.outside]
            if not found:
                raise ValueError(
                    f"grass.always_active has {kind!r}, but this model has nothing of that kind outside its blocks. It has: "
                    f"{self.describe()}. Name some of these, or leave always_active out for the default"
                )
            resolved.update(dict.fromkeys(found))
        return tuple(resolved)

    def describe(self) -> str:
        """What is in every kind: up to three parameter names each."""

        def listed(names: Sequence[str]) -> str:
            return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

        return "; ".join(f"{kind!r} ({listed(names)})" for kind, names in self.outside.items()) or "nothing"


def discover_layers(model: nn.Module, layers_path: str | None = None) -> ModelLayers:
    """Find the decoder stack, the embeddings, the final norm, the head and their ties.

    The stack is the ``nn.ModuleList`` of same-typed, parameter-holding blocks with the most parameters, looked for
    inside ``get_decoder()`` where the model has one. ``requires_grad`` plays no part; parameters that ZeRO-3 has
    partitioned count with their full size.

    Args:
        model: any module; wrappers that add a name prefix are fine.
        layers_path: name of the stack in ``model.named_modules()``; overrides the search.

    Raises:
        LayerDiscoveryError: no stack, several alike, a wrong ``layers_path``, or blocks that share parameters.
    """
    candidates = _stack_candidates(model)
    path = _best_stack(model, candidates) if layers_path is None else _explicit_stack(model, layers_path, candidates)
    stack = model.get_submodule(path)
    names = tuple(f"{path}.{child}" for child, _ in stack.named_children())
    block_params = _block_parameters(model, names)
    sorter = _Outside(model, path, candidates, {name for block in block_params for name in block})
    outside, tied = sorter.sort()
    return ModelLayers(path, names, block_params, outside, sorter.below(outside), sorter.has_vocabulary_head, tied)


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
    """The candidate with the most parameters, inside the text decoder if the model names it."""
    decoder = _from_first(model, "get_decoder")
    inner = set(decoder.modules()) if decoder is not None else set()
    eligible = {path: blocks for path, blocks in candidates.items() if blocks in inner} or candidates
    if not eligible:
        raise LayerDiscoveryError(_explain("no list of decoder blocks was found in the model", candidates))
    ranked = sorted(eligible, key=lambda path: -_numel(eligible[path]))
    if len(ranked) > 1 and _numel(eligible[ranked[0]]) < DOMINANCE * _numel(eligible[ranked[1]]):
        raise LayerDiscoveryError(_explain("the model has several block lists of comparable size", candidates))
    if len({type(block) for block in eligible[ranked[0]]}) > 1:
        raise LayerDiscoveryError(_explain("the model's largest block list mixes several types of blocks", candidates))
    return ranked[0]


def _explicit_stack(model: nn.Module, path: str, candidates: dict[str, nn.ModuleList]) -> str:
    """``path`` itself, if it names a list of blocks; these may differ in type."""
    module = dict(model.named_modules()).get(path)
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not _holding(module):
        problem = f"grass.layers_path = {path!r} is not a list of blocks that all have parameters"
        raise LayerDiscoveryError(_explain(problem, candidates))
    return path


def _explain(problem: str, candidates: dict[str, nn.ModuleList]) -> str:
    lines = [f"  {path}: {len(blocks)} blocks, {_numel(blocks):,} parameters" for path, blocks in candidates.items()]
    listing = "\n".join(lines or ["  (none)"])
    return (
        f'{problem}. Set "grass": {{"layers_path": "..."}} to the name of the decoder\'s list. Candidates:\n{listing}'
    )


def _from_first(model: nn.Module, getter: str) -> nn.Module | None:
    """What ``getter`` gives on the outermost module that has it: a wrapper hides the methods of the model inside."""
    for module in model.modules():
        method = getattr(module, getter, None)
        if callable(method):
            try:
                result = method()
            except (NotImplementedError, AttributeError):
                return None
            return result if isinstance(result, nn.Module) else None
    return None


def _block_parameters(model: nn.Module, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Parameter names of each block; a parameter with a second home outside its block is an error."""
    canonical = {parameter: name for name, parameter in model.named_parameters()}
    homes: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        home = next((block for block in names if _inside(name, block)), "the modules outside the blocks")
        if homes.setdefault(parameter, home) != home:
            raise LayerDiscoveryError(
                f"parameter {name!r} is shared by {homes[parameter]} and {home}: GRASS trains layers independently of "
                "each other, so it cannot train a model whose blocks share parameters. Untie them first"
            )
    return tuple(tuple(canonical[p] for p in model.get_submodule(block).parameters()) for block in names)


class _Outside:
    """Sorts the parameters outside the blocks into embeddings, head, final norm and the rest."""

    def __init__(
        self, model: nn.Module, stack: str, candidates: dict[str, nn.ModuleList], in_blocks: set[str]
    ) -> None:
        self._model, self._stack = model, stack
        self._paths = {path: position for position, (path, _) in enumerate(model.named_modules())}
        self._foreign = tuple(self._towers(candidates))
        self.has_vocabulary_head = False
        self._name_of = {p: name for name, p in model.named_parameters() if name not in in_blocks}
        self._hidden = {_shape(p)[0] for p in model.get_submodule(stack).parameters() if len(_shape(p)) == 1}
        self._kind: dict[str, str] = {}

    def sort(self) -> tuple[dict[str, tuple[str, ...]], bool]:
        """Parameter names by kind, in model order, and whether the head is tied to the embeddings."""
        embeddings = self._embeddings()
        shapes = [_shape(p) for module in embeddings for p in module.parameters() if len(_shape(p)) == 2]
        self._hidden |= {shape[1] for shape in shapes}
        for module in embeddings:
            self._assign(module, "embed")
        # The tokens' embeddings come first. A table of positions or token types may be as large as a classifier.
        tied = self._assign_heads(shapes[0] if shapes else None, set(embeddings))
        for path, module in self._own_modules():
            if self._is_norm(path, module):
                self._assign(module, "embed" if self._says_embedding(path) else "norm")
            elif not self.has_vocabulary_head and self._above(path):
                self._assign(module, "head")
        for name in self._name_of.values():
            if any(_inside(name, root) for root in self._foreign):
                self._kind.setdefault(name, "tower")
            elif self._says_embedding(name) and not self._above(name.rpartition(".")[0]):
                self._kind.setdefault(
                    name, "embed"
                )  # a table of positions, a mask's vector, a projection of the embeddings
        by_kind = {
            kind: tuple(n for n in self._name_of.values() if self._kind.get(n, "other") == kind)
            for kind in OUTSIDE_KINDS
        }
        return {kind: names for kind, names in by_kind.items() if names}, tied

    def below(self, outside: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """Embeddings, and kinds with a parameter in a module that was registered before the stack: a projector, an encoder."""

        def is_below(name: str) -> bool:
            return not self._above(name.rpartition(".")[0])

        parts = {kind: names for kind, names in outside.items() if kind not in ("norm", "head")}
        return tuple(kind for kind, names in parts.items() if kind == "embed" or any(map(is_below, names)))

    def _says_embedding(self, path: str) -> bool:
        """Whether a name says so, in what follows the part that it shares with the stack's: a model may be called "ensemble"."""
        parts, stack = path.lower().split("."), self._stack.lower().split(".")
        shared = next(
            (i for i, (one, other) in enumerate(zip(parts, stack, strict=False)) if one != other), len(stack)
        )
        return any("emb" in part for part in parts[shared:])

    def _above(self, path: str) -> bool:
        """Whether a module was registered after the stack, as models do with what they compute after their blocks."""
        return self._paths[path] > self._paths[self._stack]

    def _towers(self, candidates: dict[str, nn.ModuleList]) -> Iterator[str]:
        """Subtrees with a stack of their own. A list above the blocks that is smaller than one of them holds heads, not blocks."""
        block = _numel(self._model.get_submodule(self._stack)[0])  # type: ignore[index]
        for path, blocks in candidates.items():
            if path != self._stack and _tower(blocks) and not (self._above(path) and _numel(blocks) < block):
                yield _foreign_root(self._stack, path)

    def _own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules outside the blocks and outside other towers (a vision encoder) that hold parameters themselves."""
        for path, module in self._model.named_modules():
            elsewhere = _inside(path, self._stack) or any(_inside(path, root) for root in self._foreign)
            if not elsewhere and next(module.parameters(recurse=False), None) is not None:
                yield path, module

    def _embeddings(self) -> list[nn.Module]:
        """The tokens' embedding first: the named one, else the largest."""
        named = _from_first(self._model, "get_input_embeddings")
        own: list[nn.Module] = [module for _, module in self._own_modules() if isinstance(module, nn.Embedding)]
        if named is None:
            return sorted(own, key=lambda module: -_numel(module))
        return [named, *(module for module in own if module is not named)]

    def _assign_heads(self, vocabulary: tuple[int, ...] | None, embeddings: set[nn.Module]) -> bool:
        """Assign every module that maps hidden states to the vocabulary; whether one shares the embeddings' weight."""
        named = _from_first(self._model, "get_output_embeddings")
        heads = [] if named is None else [named]
        for _, module in self._own_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and _shape(weight) == vocabulary and module not in embeddings:
                heads.append(module)
        self.has_vocabulary_head = bool(heads)
        tied = any(self._kind.get(self._name_of.get(p, "")) == "embed" for head in heads for p in head.parameters())
        for head in heads:
            self._assign(head, "embed" if tied else "head")
        return tied

    def _is_norm(self, path: str, module: nn.Module) -> bool:
        """Whether it holds vectors of the hidden size and nothing else, and lies beside the stack or an ancestor of it.

        An embedding norm may lie anywhere.
        """
        if next(module.children(), None) is not None:
            return False
        parent, _, name = path.rpartition(".")
        shapes = [_shape(p) for p in module.parameters(recurse=False)]
        vectors = all(len(shape) == 1 and shape[0] in self._hidden for shape in shapes) and len(set(shapes)) == 1
        return bool(name) and vectors and (_inside(self._stack, parent) or self._says_embedding(path))

    def _assign(self, module: nn.Module, kind: str) -> None:
        for parameter in module.parameters():
            if parameter in self._name_of:
                self._kind.setdefault(self._name_of[parameter], kind)


def _tower(blocks: nn.ModuleList) -> bool:
    """Whether the list holds compound blocks, so that what surrounds it is another model part."""
    return next(iter(blocks[0].children()), None) is not None


def _foreign_root(stack: str, other: str) -> str:
    """The largest subtree that holds ``other`` but not ``stack``."""
    parts, own = other.split("."), stack.split(".")
    shared = next(i for i, part in enumerate(parts) if i >= len(own) or part != own[i])
    return ".".join(parts[: shared + 1])
