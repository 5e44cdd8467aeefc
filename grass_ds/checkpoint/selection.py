# SPDX-License-Identifier: Apache-2.0
"""Selects the checkpoint to load, before the run changes: intact, fit for this run, and the same on every rank."""

from collections.abc import Callable, Sequence
from itertools import chain
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
    """The tag to load: ``tag``, or else the newest intact checkpoint. Collective; each rank reads its share of files.

    Returns:
        None if ``folder`` holds no checkpoint and no ``tag`` was asked for.

    Raises:
        ValueError: on every rank: the checkpoint ``tag``, or without a ``tag`` every one, is damaged.
    """
    tags = [tag] if tag is not None else _from_first_rank(lambda: folders.candidates(folder), group)
    damage: list[str] = []
    for name in tags:
        found = _problems(folder / name, group)
        if not found:
            if tag is None and dist.get_rank(group=group) == 0:
                _warn(folder, damage, name)
            return name
        damage.append(f"{_name(folder, name)} is damaged: {listed(found)}")
    if not damage:
        return None
    others = [name for name in folders.candidates(folder) if name not in tags and not folders.problems(folder / name)]
    remedy = f"load another: {', '.join(others)}" if others else "there is no other checkpoint in this folder"
    raise ValueError(f"{folder}: {'; '.join(damage)}; {remedy}")


def _from_first_rank(look: Callable[[], list[str]], group: Any) -> list[str]:
    """What ``look`` returns on rank 0: a folder may change while ranks look into it."""
    return gather_from_ranks(lambda: look() if dist.get_rank(group=group) == 0 else [], group)[0]


def _problems(checkpoint: Path, group: Any) -> list[str]:
    """Problems of a checkpoint: names and lengths first, then contents, of which every rank reads its share."""
    rank, world = dist.get_rank(group=group), dist.get_world_size(group=group)
    if rank == 0:
        folders.restore_replaced(checkpoint)
    if missing := _from_first_rank(lambda: folders.problems(checkpoint), group):
        return missing
    share = folders.ranks_of(checkpoint)[rank::world]
    return list(chain(*gather_from_ranks(lambda: folders.corrupt(checkpoint, share), group)))


def _warn(folder: Path, damage: list[str], used: str) -> None:
    """Name every damaged checkpoint, a missing ``latest``, and the checkpoint that is used instead."""
    if folders.named_latest(folder) is None:
        damage = [*damage, f"{folder} has no readable {folders.LATEST}"]
    for text in damage:
        logger.warning(f"grass_ds: {text}; {_name(folder, used)} is used instead")


def _name(folder: Path, tag: str) -> str:
    step = folders.step_of(folder / tag)
    return f"checkpoint {tag}" + ("" if step is None else f" (step {step})")


def check_fit(checkpoint: Path, units: Sequence[Unit], world: int, weights_alone: bool) -> None:
    """Raise ValueError for a checkpoint of plain DeepSpeed, of other than ``world`` ranks, or of another model.

    With ``weights_alone`` only the parameters have to agree, and plain DeepSpeed may have saved it.
    """
    if not folders.has_parts(checkpoint):
        if weights_alone:
            return
        raise ValueError(
            f"the checkpoint {checkpoint.name} was not written by grass_ds (it has no {Part.name(0)}), so its optimizer "
            "state has another layout; load the weights alone with load_checkpoint(..., load_optimizer_states=False)"
        )
    part = Part.read(checkpoint, 0)
    if part.world_size != world and not (weights_alone and part.zero_stage < 3):
        source, expand = checkpoint, ""
        if part.state_format != "fp32":
            source = checkpoint.with_name(f"{checkpoint.name}_fp32")
            expand = (
                f'by `python -m grass_ds expand {checkpoint} {source}`, as its states are "{part.state_format}", and '
            )
        raise ValueError(
            f"the checkpoint {checkpoint.name} was saved by {part.world_size} ranks and this run has {world}, whose shards "
            f"are cut elsewhere; convert it once {expand}with `python -m deepspeed.checkpoint.ds_to_universal "
            f"--input_folder {source} --output_folder {checkpoint}_universal`, then load it with "
            '"checkpoint": {"load_universal": true} in the DeepSpeed config'
        )
    check_layout(f"the checkpoint {checkpoint.name}", units, part.layout, weights_alone)


def check_layout(what: str, units: Sequence[Unit], saved: list[Any], weights_alone: bool = False) -> None:
    """Raise ValueError if the :func:`layout` of this run differs from the one ``saved`` in ``what``.

    With ``weights_alone`` only names and shapes of the parameters are compared.
    """
    here = layout(units)
    ours, theirs = _named(here, weights_alone), _named(saved, weights_alone)
    if ours != theirs if weights_alone else here != saved:
        other = "another model" if weights_alone else "other layers or param groups"
        raise ValueError(
            f"{what} has {other} than this run: {listed(_differences(ours, theirs))}; resume with the model, the "
            'optimizer and the sampler that it was saved from ("module" and "ist" have units of their own)'
        )


def _named(units: list[Any], weights_alone: bool) -> dict[str, Any]:
    """Unit name -> parameter name -> shape, or with ``weights_alone`` parameter name -> shape."""
    if weights_alone:
        return dict(map(tuple, chain(*(params for _, params in units))))
    return {name: dict(map(tuple, params)) for name, params in units}


def _differences(here: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    found = [f"{name} is only here" for name in here if name not in saved]
    found += [f"{name} is only in the checkpoint" for name in saved if name not in here]
    for name, ours in here.items():
        theirs = saved.get(name, ours)
        if ours != theirs:
            found += _differences(ours, theirs) if isinstance(ours, dict) else [f"{name}: here {ours}, saved {theirs}"]
    return found or ["the same ones in another order"]


def check_stage(folder: str | Path, tag: str | None, stage: int, universal: bool = False) -> None:
    """Raise ValueError for a checkpoint of ZeRO-3 on another stage, or the reverse: DeepSpeed would miss its files.

    Also if a ``universal`` checkpoint is expected and there is none. ``tag`` None: that in ``latest_universal``.
    """
    if tag is None:
        tag = folders.named_latest(Path(folder), "latest_universal")
    if tag is None:
        return  # DeepSpeed has a message for that
    checkpoint = Path(folder, str(tag))
    partitioned = any(checkpoint.glob("zero_pp_rank_*_model_states.pt"))
    replicated = any(checkpoint.glob("mp_rank_*_model_states.pt"))
    if universal and not partitioned and not replicated:
        raise ValueError(
            f"{checkpoint} holds no universal checkpoint; give the folder that ds_to_universal.py wrote, or load "
            'a checkpoint as it was saved, without "checkpoint": {"load_universal": true}'
        )
    if partitioned != replicated and partitioned != (stage == 3):
        raise ValueError(
            f"the checkpoint {tag} was saved with ZeRO stage {'3' if partitioned else '1 or 2'} and this run has stage {stage}, "
            "which cuts weights into other shards; set zero_optimization.stage as it was, or start from its weights: "
            f"zero_to_fp32.py in the {'folder that it was converted from' if universal else 'checkpoint folder'} writes them "
            "for any run"
        )
