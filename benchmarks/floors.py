# SPDX-License-Identifier: Apache-2.0
"""The least that a training step of a row can cost: arithmetic, bytes between ranks, memory, time. Closed forms of the row's conditions.

Hugging Face's Llama as it is, in the row's precision with fp32 optimizer state. What its modeling code computes and saves for backward is no waste
here; what an engine adds is, but for the weights that DeepSpeed's ZeRO-3 keeps gathered (:data:`REUSE_DISTANCE`). ``active``: the decoder layers that the step trains, None where the method trains its set all the time.

[Note: What backward needs] A norm saves its input in fp32 and its output in the row's precision, a matrix product its input if its weight trains,
attention its three inputs, its output and a number per row. A layer below which nothing trains has no input gradient; one that is frozen
saves only what leads to its input.
"""

from collections.abc import Iterator

from benchmarks.case import Case, Row
from benchmarks.precision import BYTES, STATE

FP32 = BYTES["fp32"]
# DeepSpeed's stage3_max_reuse_distance and stage3_max_live_parameters: weights that backward needs again so soon stay gathered.
REUSE_DISTANCE = 1_000_000_000


def flops(row: Row, active: list[int] | None) -> int:
    """Of one optimizer step on one rank, a multiply-add counting twice; equal to what is observed, recomputation included."""
    case = Case(row, active)
    blocks = case.shape["layers"]
    passed = blocks - case.lowest
    layer = case.products() + case.adapter_products()
    forward = blocks * (layer + 2 * case.attention) + case.head_products
    backward = case.head_products * (1 + ("head" in case.always)) + passed * (layer + 5 * case.attention)
    if case.lora:
        backward += blocks * case.adapter_products(inputs=not case.half_lora) - _unasked(case)
    else:
        backward += len(case.layers) * case.products()
    if row["checkpointing"]:  # a block's last product is not needed again: torch stops before it
        last = 2 * case.tokens * case.shape["lora_rank"] * case.shape["hidden"] if case.lora else case.products("down")
        backward += passed * (layer + 2 * case.attention - last)
    return row["accumulation"] * (forward + backward)


def _unasked(case: Case) -> int:
    """LoRA: nothing asks for the gradient of the first layer's input, nor for that of what only leads there.

    But Hugging Face does where it checkpoints.
    """
    if case.row["checkpointing"]:
        return 0
    s = case.shape
    outputs = case.half_lora * (s["heads"] + 2 * s["kv_heads"]) * s["head_dim"]
    return case.products("q", "k", "v") + 2 * case.tokens * s["lora_rank"] * (3 * s["hidden"] + outputs)


def traffic(row: Row, active: list[int] | None) -> dict[str, int]:
    """Collective -> bytes of its largest argument, summed over one optimizer step; padding left out."""
    case = Case(row, active)
    if row["ranks"] == 1:
        return {}
    trained, micro, stage = case.width * sum(case.units), row["accumulation"], row["stage"]
    moved = {
        "reduce_scatter": trained * (micro if case.reduces_always else 1),
        "all_gather": trained if stage < 3 else case.width * micro * (case.numel + _gathered_again(case)),
        "all_reduce": FP32 * (1 if case.grass is None else len(case.units) * (2 if micro > 1 else 1)),
    }
    if case.grass is not None and case.grass.offload.device == "nvme":
        moved["all_reduce"] += 8
    return moved


def wire_bytes(moved: dict[str, int]) -> int:
    """One figure for collectives: what a ring would send but for the factor (ranks - 1) / ranks; an all-reduce goes around twice."""
    return sum(nbytes * (2 if name == "all_reduce" else 1) for name, nbytes in moved.items())


def _gathered_again(case: Case) -> int:
    """ZeRO-3: elements that backward needs and that forward has released."""
    s, above, again = case.shape, 0, 0
    outside = (s["embed_numel"] if s["tied"] else s["head_numel"]) + s["norm_numel"]
    adapters = s["lora_numel"] // s["layers"]
    for numel in (outside, *[s["layer_numel"] + adapters] * (s["layers"] - case.lowest)):
        again += numel if 2 * above > REUSE_DISTANCE else 0
        above += numel
    return again


# ---- memory ------------------------------------------------------------------------------------------------------------------


def memory(row: Row, active: list[int] | None) -> dict[str, int]:
    """Bytes on the device at the peak of a step, by category, and their ``total``."""
    case = Case(row, active)
    ranks, stage = row["ranks"], row["stage"]
    weights = case.width * case.numel
    if stage == 3 and ranks > 1:
        reused = (
            case.numel - case.lowest * case.shape["layer_numel"]
        )  # what backward does not run through is released at once
        kept = reused if reused <= REUSE_DISTANCE else REUSE_DISTANCE // 2
        largest = max(case.shape["layer_numel"], case.shape["embed_numel"])
        weights = weights // ranks + case.width * min(case.numel, max(kept, largest))
    moment = max(_moments(case), key=lambda parts: sum(parts.values()))
    parts = {"weights": weights, "optimizer_state": _state(case), **moment}
    return {**parts, "total": sum(parts.values())}


def _state(case: Case) -> int:
    """Optimizer state on the device."""
    shards = [-(-numel // case.row["ranks"]) for numel in case.units]
    grass = case.grass
    if "offload_optimizer" in case.method.zero:
        return 0
    if grass is None and not case.method.toggles:
        return STATE * sum(shards)
    if grass is not None and grass.offload.device != "none":
        if grass.offload.residency == "period":
            return STATE * sum(shards)
        return STATE * grass.offload.device_buffers * min(grass.offload.chunk_numel, max(shards))
    ever = {layer for layers in (*case.row["active"], case.active) for layer in layers or ()}
    met = case.shape["layers"] if case.row["prepare_state"] else len(ever)
    outside = sum(shards[: len(shards) - len(case.layers)])
    return STATE * (outside + met * -(-case.shape["layer_numel"] // case.row["ranks"]))


def _moments(case: Case) -> Iterator[dict[str, int]]:
    """Activations, logits and gradients when each may be at its largest: at the loss, in backward of every layer, in the step."""
    s, row = case.shape, case.row
    rows, kept = case.tokens * s["vocab"], _kept(case)
    # All micro-steps but the first begin with gradients: their shards, or in ZeRO-1 whole ones.
    whole = case.width * sum(case.units)
    held = 0 if row["accumulation"] == 1 else whole // (row["ranks"] if case.reduces_always else 1)
    total = saved_bytes(case)
    # log-probabilities, their gradient and that of the fp32 logits
    yield {"activations": total, "logits": 3 * FP32 * rows, "gradients": held}
    head = case.width * s["vocab"] * s["hidden"] if "head" in case.always else 0
    yield {"activations": total, "logits": case.width * rows, "gradients": held + head}
    tied = head if s["tied"] else 0  # waits for the embedding's part
    done = sum(case.units[: len(case.units) - len(case.layers)]) if not case.lora else 0
    for layer in range(s["layers"] - 1, case.lowest - 1, -1):
        own = _recomputed_bytes(case, layer) if row["checkpointing"] else 0
        work = case.tokens * case.width * (2 * s["intermediate"] + s["hidden"])
        trained = (case.adapter_numel if case.lora else s["layer_numel"]) if layer in case.layers else 0
        gradients = max(held, case.width * done // row["ranks"]) + tied + case.width * trained
        below = sum(nbytes for index, nbytes in kept.items() if index <= layer)
        yield {"activations": below + own + work, "logits": 0, "gradients": gradients}
        done += trained
    embed = case.width * s["embed_numel"] if "embed" in case.always else 0
    yield {"activations": 0, "logits": 0, "gradients": max(held, whole // row["ranks"]) + embed + tied}


def layer_bytes(case: Case, layer: int) -> int:
    """What a decoder layer saves for backward. See [Note: What backward needs]."""
    if layer < case.lowest:
        return 0
    s, inner = case.shape, 0
    trains, tokens = layer in case.layers and not case.lora, case.tokens
    hidden, inter = s["hidden"], s["intermediate"]
    query, key = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    inner += case.width * (2 * query + 2 * key) + FP32 * s["heads"]  # attention
    inner += case.width * 3 * inter  # gate, its activation, up
    norms = 2 if case.has_input_gradient(layer) else 1
    inner += norms * FP32 * (hidden + 1)  # a norm's input, and one number per token
    if trains:
        inner += case.width * (2 * hidden + 2 * hidden + inter)  # norms before and after their weight; what goes down
    if case.lora:
        inputs = 0 if case.half_lora else 2 * hidden + inter
        inner += case.width * (inputs + len(case.linears) * s["lora_rank"])
    return tokens * inner


def _recomputed_bytes(case: Case, layer: int) -> int:
    """What a layer saves beside its input, which :func:`_kept` has. A norm's fp32 copy of it is another tensor, unless all is fp32."""
    again = case.row["dtype"] == "fp32" and case.has_input_gradient(layer)
    return layer_bytes(case, layer) - again * case.tokens * FP32 * case.shape["hidden"]


def saved_bytes(case: Case) -> int:
    """What forward leaves for backward, the loss apart."""
    return _outside_bytes(case) + sum(_kept(case).values())


def _kept(case: Case) -> dict[int, int]:
    """Layer -> bytes that it saves; with recomputation its input alone."""
    nbytes = case.width * case.tokens * case.shape["hidden"]
    layers = range(case.lowest, case.shape["layers"])
    return {layer: nbytes if case.row["checkpointing"] else layer_bytes(case, layer) for layer in layers}


def _outside_bytes(case: Case) -> int:
    """What is saved outside the layers: final norm, head, labels; positions, their sines and cosines."""
    s = case.shape
    per_token = 8 + case.width * s["hidden"] * (("norm" in case.always) + ("head" in case.always))
    if case.lowest == s["layers"]:
        return case.tokens * per_token
    per_place = 2 * case.width * s["head_dim"] + 8 * case.row["checkpointing"]
    return case.tokens * (per_token + FP32 * (s["hidden"] + 1)) + per_place * case.row["sequence"]


# ---- time --------------------------------------------------------------------------------------------------------------------


def seconds(row: Row) -> list[dict[str, float]]:
    """Of every measured step: ``forward`` and ``backward`` of plain PyTorch, ``adam`` on this rank's shard, ``traffic`` at full bandwidth.

    Args:
        row: with ``plain``, see ``plain.plain``.
    """
    return [_seconds(row, active) for active in row["active"]]


def _seconds(row: Row, active: list[int] | None) -> dict[str, float]:
    plain, trained = row["plain"], sum(Case(row, active).units)
    passes = next(done for done in plain["passes"] if done["active"] == active)
    return {
        "forward": row["accumulation"] * passes["forward"],
        "backward": row["accumulation"] * passes["backward"],
        "adam": plain["adam"]["seconds"] * trained / row["ranks"] / plain["adam"]["numel"],
        "traffic": sum(nbytes / plain["bandwidth"][name] for name, nbytes in traffic(row, active).items()),
    }
