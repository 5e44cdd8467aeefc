# SPDX-License-Identifier: Apache-2.0
"""Choosing the checkpoint to load: intact, and fit for this run, before anything of the run is touched. Alike on every rank."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.utils import logger

from grass_ds.checkpoint import folder as folders
from grass_ds.checkpoint.part import Part
from grass_ds.core.agreement import gather_from_ranks
from grass_ds.core.durable_files import listed
from grass_ds.core.units import Unit, whole_shape


def layout(units: Sequence[Unit]) -> list[Any]:
    """Per unit its name and its parameters' [name, shape], as :class:`Part` keeps it."""
    return [
        [unit.name, [[n, list(whole_shape(p))] for n, p in zip(unit.param_names, unit.params, strict=True)]]
        for unit in units
    ]


def choose(folder: Path, tag: str | None, group: Any) -> str | None:
    """The tag to load: ``tag``, or the newest checkpoint that is intact. Called on every rank; each reads its share of the files.

    Returns:
        None if ``folder`` holds no checkpoint and no ``tag`` was asked for.

    Raises:
        ValueError: on every rank: the checkpoint that was asked for, or every one, is damaged.
    """
    tags = [tag] if tag is not None else _from_first(lambda: folders.candidates(folder), group)
    damage: dict[str, list[str]] = {}
    for name in tags:
        found = _problems(folder / name, group)
        if not found:
            if dist.get_rank(group=group) == 0:
                _report(folder, damage, name, asked=tag is not None)
            return name
        damage[name] = found
    if not damage:
        return None
    others = (
        [] if tag is None else [name for name in folders.candidates(folder) if not folders.problems(folder / name)]
    )
    remedy = f"load another: {', '.join(others)}" if others else "there is no other checkpoint in this folder"
    raise ValueError(
        f"{folder}: {'; '.join(f'{_called(folder, n)} is damaged: {listed(d)}' for n, d in damage.items())}; {remedy}"
    )


def _from_first(look: Callable[[], list[str]], group: Any) -> list[str]:
    """What rank 0 found: a folder may change while ranks look into it.

    Raises:
        ValueError: on every rank, if rank 0 could not look.
    """

    def look_if_first() -> list[str]:
        try:
            return look() if dist.get_rank(group=group) == 0 else []
        except (OSError, ValueError) as error:
            raise ValueError(f"the checkpoints cannot be looked at: {error}") from error

    return gather_from_ranks(look_if_first, group)[0]


def _problems(checkpoint: Path, group: Any) -> list[str]:
    """What is wrong with it; names and lengths first, then contents, of which every rank reads its share."""
    rank, world = dist.get_rank(group=group), dist.get_world_size(group=group)
    missing = _from_first(lambda: _structure(checkpoint), group)
    if missing:
        return missing
    share = [r for r in folders.ranks_of(checkpoint) if r % world == rank]
    found = gather_from_ranks(lambda: folders.corrupt(checkpoint, share), group)
    return [text for texts in found for text in texts]


def _structure(checkpoint: Path) -> list[str]:
    folders.restore_replaced(checkpoint)
    return folders.problems(checkpoint)


def check_fit(checkpoint: Path, units: Sequence[Unit], world: int, weights_alone: bool) -> None:
    """Refuse a checkpoint that this run cannot go on from. Of one without parts only the weights may fit.

    Args:
        world: ranks of this run.
        weights_alone: optimizer states stay behind, so only the parameters have to be alike.

    Raises:
        ValueError: it is of plain DeepSpeed, other ranks, another model or other param groups, naming the difference and the remedy.
    """
    part = Part.read(checkpoint, 0)
    if part is None:
        if not weights_alone:
            raise ValueError(
                f"the checkpoint {checkpoint.name} was not written by grass_ds (it has no {Part.name(0)}), so its optimizer state has "
                "another layout; load the weights alone with load_checkpoint(..., load_optimizer_states=False)"
            )
        return
    if part.world_size != world and not (weights_alone and part.zero_stage < 3):
        raise ValueError(_convert(checkpoint, part.world_size, world))
    check_layout(f"the checkpoint {checkpoint.name}", units, part.layout, weights_alone)


def check_layout(what: str, units: Sequence[Unit], saved: list[Any], weights_alone: bool = False) -> None:
    """Compare the :func:`layout` of this run with that of ``what``; with ``weights_alone`` the parameters only.

    Raises:
        ValueError: they differ, naming where.
    """
    here = layout(units)
    ours, theirs = _named(here, weights_alone), _named(saved, weights_alone)
    if ours != theirs if weights_alone else here != saved:
        other = "another model" if weights_alone else "other layers or param groups"
        raise ValueError(
            f"{what} has {other} than this run: {listed(_differences(ours, theirs))}; resume with the model and "
            "the optimizer that it was saved from"
        )


def _named(units: list[Any], weights_alone: bool) -> dict[str, Any]:
    """Name -> what there is to compare: units with their parameters, or the parameters' shapes."""
    if weights_alone:
        return dict(sorted((name, shape) for _, params in units for name, shape in params))
    return {name: dict(map(tuple, params)) for name, params in units}


def _differences(here: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    found = []
    for name in dict.fromkeys([*here, *saved]):
        ours, theirs = here.get(name), saved.get(name)
        if ours is None or theirs is None:
            found.append(f"{name} is only {'in the checkpoint' if ours is None else 'here'}")
        elif ours != theirs:
            found += _differences(ours, theirs) if isinstance(ours, dict) else [f"{name}: here {ours}, saved {theirs}"]
    return found or ["the same ones in another order"]


def check_stage(folder: str | Path, tag: str | None, stage: int, universal: bool = False) -> None:
    """Refuse a checkpoint of ZeRO-3 on another stage or the reverse: DeepSpeed would look for files that are not there.

    Args:
        tag: None for the one that ``latest_universal`` names.

    Raises:
        ValueError: the stages differ, or it is to be a ``universal`` one and is no checkpoint at all.
    """
    if tag is None:
        tag = folders.named_latest(Path(folder), "latest_universal")
        if tag is None:
            return  # DeepSpeed has a message for that
    partitioned = any(Path(folder, str(tag)).glob("zero_pp_rank_*_model_states.pt"))
    replicated = any(Path(folder, str(tag)).glob("mp_rank_*_model_states.pt"))
    if universal and not partitioned and not replicated:
        raise ValueError(
            f"{Path(folder, str(tag))} holds no universal checkpoint; give the folder that ds_to_universal.py wrote, or load a "
            'checkpoint as it was saved without "checkpoint": {"load_universal": true}'
        )
    if partitioned != replicated and partitioned != (stage == 3):
        raise ValueError(
            f"the checkpoint {tag} was saved with ZeRO stage {'3' if partitioned else '1 or 2'} and this run has stage {stage}, which "
            "cuts weights into other shards; set zero_optimization.stage as it was, or start from its weights: zero_to_fp32.py in "
            f"the {'folder that it was converted from' if universal else 'checkpoint folder'} writes them for any run"
        )


def _convert(checkpoint: Path, saved: int, here: int) -> str:
    universal = f"{checkpoint}_universal"
    return (
        f"the checkpoint {checkpoint.name} was saved by {saved} ranks and this run has {here}, whose shards are cut elsewhere; convert "
        f"it once with `python -m deepspeed.checkpoint.ds_to_universal --input_folder {checkpoint} "
        f'--output_folder {universal}`, then load it with "checkpoint": {{"load_universal": true}} in the DeepSpeed config'
    )


def _report(folder: Path, damage: dict[str, list[str]], used: str, asked: bool) -> None:
    """Warn of what is used instead of what."""
    instead = f"{_called(folder, used)} is used instead"
    for name, found in damage.items():
        logger.warning(f"grass_ds: {_called(folder, name)} is damaged: {listed(found)}; {instead}")
    if not asked and folders.named_latest(folder) is None:
        logger.warning(f"grass_ds: {folder} has no readable {folders.LATEST}; {instead}")


def _called(folder: Path, tag: str) -> str:
    step = folders.step_of(folder / tag)
    return f"checkpoint {tag}" + ("" if step is None else f" (step {step})")
