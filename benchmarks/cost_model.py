# SPDX-License-Identifier: Apache-2.0
"""The least that a training step costs, in closed form: arithmetic, bytes between ranks, memory, time.

The forms describe Hugging Face's Llama in the row's precision with fp32 optimizer state. What its modeling code
computes and saves for backward counts as needed; what an engine adds does not, but for weights ZeRO-3 keeps gathered.

[Note: What backward needs] A norm saves its input in fp32 and its output in the row's precision, a matrix product its
input if its weight trains, attention its three inputs, its output and a number per row. A layer below which nothing
trains has no input gradient; a frozen one saves only what leads to its input.
"""

from collections.abc import Iterator

from benchmarks.case import Case, Row
from benchmarks.methods import EVERYTHING, METHODS, grass_config
from benchmarks.precision import BYTES, STATE
from grass_ds.config import GrassConfig
from grass_ds.core.signs import PER_BYTE

FP32 = BYTES["fp32"]
SIGN = 1 / PER_BYTE  # bytes of a sign that waits for its step
# DeepSpeed's stage3_max_reuse_distance and stage3_max_live_parameters: weights needed again so soon stay gathered.
REUSE_DISTANCE = 1_000_000_000


class TrainedStep:
    """What trains in an optimizer step, and the sizes that follow.

    Args:
        row: the conditions.
        active: the decoder layers that the step trains; None for methods that always train the same.
    """

    def __init__(self, row: Row, active: list[int] | None) -> None:
        self.row, self.active, self.shape = row, active, row["shape"]
        self.method = METHODS[row["method"]]
        # Rows may hold options that were tried and removed.
        settings = {name: value for name, value in row["grass"].items() if name in GrassConfig.model_fields}
        case = Case(kind="cost", method=row["method"], grass=settings, offload=row["offload"], disk=".")
        self.grass = grass_config(case)
        self.lora, self.half_lora = self.method.lora_rank is not None, self.method.frozen == "lora_A"
        self.outside = self._outside()
        blocks = self.shape["layers"]
        # Layers whose weights have a gradient; those of them that take a sign step; the lowest that backward reaches.
        stepped = list(range(blocks)) if self.lora or active is None else sorted(active)
        self.expanded = self._expanded(stepped)
        self.layers = sorted([*stepped, *self.expanded])
        self.lowest = 0 if "embed" in self.outside else min(self.layers, default=blocks)
        self.width = BYTES[row["dtype"]]
        self.tokens = row["micro_batch"] * row["sequence"]
        # Whether every micro-batch is reduced: into shards, or for scores, which are means over micro-batches.
        self.reduces_always = row["stage"] > 1 or (self.grass is not None and self.grass.sampler == "grass")

    def _expanded(self, stepped: list[int]) -> list[int]:
        if self.grass is None or self.grass.expansion == 0:
            return []
        depth = min(stepped if self.grass.expansion_depth is None else [self.grass.expansion_depth, *stepped])
        return [layer for layer in range(depth, self.shape["layers"]) if layer not in stepped]

    def _outside(self) -> set[str]:
        """Modules outside the blocks that train; tied embeddings are embeddings and head."""
        if self.lora or self.method.package is not None:
            return set()
        if self.grass is None or self.grass.sampler == "full":
            names = set(EVERYTHING)
        else:  # null: in a language model the final norm
            names = {"norm"} if self.grass.always_active is None else set(self.grass.always_active)
        return names | {"embed", "head"} if self.shape["tied"] and names & {"embed", "head"} else names

    def has_input_gradient(self, layer: int) -> bool:
        return layer > self.lowest or "embed" in self.outside or (self.lora and self.row["checkpointing"])

    @property
    def units(self) -> list[int]:
        """Elements of each unit that has a gradient: those outside the blocks first."""
        s = self.shape
        if self.lora:
            return [s["layers"] * self.adapter_numel]
        outside = {name: s[f"{name}_numel"] for name in ("head", "norm", "embed")}
        trained = [numel for name, numel in outside.items() if name in self.outside and numel]
        return trained + [s["layer_numel"]] * len(self.layers)

    @property
    def stepped(self) -> list[int]:
        """The same of each unit that the optimizer steps."""
        return self.units[: len(self.units) - len(self.expanded)]

    @property
    def numel(self) -> int:
        """Elements of the model, adapters included."""
        s = self.shape
        outside = s["embed_numel"] + s["head_numel"] + s["norm_numel"]
        return outside + s["layers"] * s["layer_numel"] + s["lora_numel"]

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        s = self.shape
        hidden, inter = s["hidden"], s["intermediate"]
        query, key = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
        mlp = {"gate": (hidden, inter), "up": (hidden, inter), "down": (inter, hidden)}
        return {"q": (hidden, query), "k": (hidden, key), "v": (hidden, key), "o": (query, hidden), **mlp}

    def products(self, *names: str) -> int:
        """FLOPs of one pass (forward, input or weight gradient) through these matrices of a layer; default: all."""
        return 2 * self.tokens * sum(i * o for name, (i, o) in self.linears.items() if not names or name in names)

    @property
    def adapter_numel(self) -> int:
        """Elements of a layer's adapters that train."""
        inputs = 0 if self.half_lora else sum(i for i, _ in self.linears.values())
        return (self.method.lora_rank or 0) * (inputs + sum(o for _, o in self.linears.values()))

    def adapter_products(self, *, inputs: bool = True) -> int:
        """FLOPs of one pass through the second factors of a layer's adapters, and through the first."""
        widths = sum(inputs * i + o for i, o in self.linears.values())
        return 2 * self.tokens * (self.method.lora_rank or 0) * widths

    @property
    def attention(self) -> int:
        """FLOPs of one product of attention: scores, or their use."""
        s = self.shape
        return 2 * self.tokens * self.row["sequence"] * s["heads"] * s["head_dim"]

    @property
    def head_products(self) -> int:
        return 2 * self.tokens * self.shape["vocab"] * self.shape["hidden"]


def flops(row: Row, active: list[int] | None) -> int:
    """FLOPs of one optimizer step on one rank, recomputation included; a multiply-add counts twice."""
    step = TrainedStep(row, active)
    blocks = step.shape["layers"]
    passed = blocks - step.lowest
    layer = step.products() + step.adapter_products()
    forward = blocks * (layer + 2 * step.attention) + step.head_products
    backward = step.head_products * (1 + ("head" in step.outside)) + passed * (layer + 5 * step.attention)
    if step.lora:
        backward += blocks * step.adapter_products(inputs=not step.half_lora) - _unneeded(step)
    else:
        backward += len(step.layers) * step.products()
    if row["checkpointing"]:  # a block's last product is not needed again: torch stops before it
        last = 2 * step.tokens * step.shape["lora_rank"] * step.shape["hidden"] if step.lora else step.products("down")
        backward += passed * (layer + 2 * step.attention - last)
    return row["accumulation"] * (forward + backward)


def _unneeded(step: TrainedStep) -> int:
    """LoRA: FLOPs of the gradient of the first layer's input, which nothing needs unless Hugging Face checkpoints."""
    if step.row["checkpointing"]:
        return 0
    s = step.shape
    outputs = step.half_lora * (s["heads"] + 2 * s["kv_heads"]) * s["head_dim"]
    return step.products("q", "k", "v") + 2 * step.tokens * s["lora_rank"] * (3 * s["hidden"] + outputs)


def traffic(row: Row, active: list[int] | None) -> dict[str, int]:
    """Collective -> bytes of its largest argument, summed over one optimizer step, without padding."""
    step = TrainedStep(row, active)
    if row["ranks"] == 1:
        return {}
    trained, micro, stage = step.width * sum(step.units), row["accumulation"], row["stage"]
    moved = {
        "reduce_scatter": trained * (micro if step.reduces_always else 1),
        "all_gather": trained if stage < 3 else step.width * micro * (step.numel + _gathered_again(step)),
        "all_reduce": FP32 * (1 if step.grass is None else len(step.units) * (2 if micro > 1 else 1)),
    }
    if step.grass is not None and step.grass.offload.device == "nvme":
        moved["all_reduce"] += 8
    return moved


def wire_bytes(moved: dict[str, int]) -> int:
    """Bytes that a ring of many ranks sends; an all-reduce goes around twice."""
    return sum(nbytes * (2 if name == "all_reduce" else 1) for name, nbytes in moved.items())


def _gathered_again(step: TrainedStep) -> int:
    """ZeRO-3: elements that backward needs and that forward has released."""
    s, above, again = step.shape, 0, 0
    outside = (s["embed_numel"] if s["tied"] else s["head_numel"]) + s["norm_numel"]
    adapters = s["lora_numel"] // s["layers"]
    for numel in (outside, *[s["layer_numel"] + adapters] * (s["layers"] - step.lowest)):
        again += numel if 2 * above > REUSE_DISTANCE else 0
        above += numel
    return again


def memory(row: Row, active: list[int] | None) -> dict[str, int]:
    """Bytes on the device of a rank at the peak of a step, by category, and their ``total``."""
    step = TrainedStep(row, active)
    ranks, stage = row["ranks"], row["stage"]
    weights = step.width * step.numel
    if stage == 3 and ranks > 1:
        # What backward does not run through is released at once.
        reused = step.numel - step.lowest * step.shape["layer_numel"]
        kept = reused if reused <= REUSE_DISTANCE else REUSE_DISTANCE // 2
        largest = max(step.shape["layer_numel"], step.shape["embed_numel"])
        weights = weights // ranks + step.width * min(step.numel, max(kept, largest))
    peak = max(_candidates(step), key=lambda parts: sum(parts.values()))
    parts = {"weights": weights, "optimizer_state": _state(step), **peak}
    return {**parts, "total": sum(parts.values())}


def _state(step: TrainedStep) -> int:
    """Optimizer state on the device."""
    shards = [-(-numel // step.row["ranks"]) for numel in step.stepped]
    grass = step.grass
    if "offload_optimizer" in step.method.zero:
        return 0
    if grass is None and not step.method.toggles:
        return STATE * sum(shards)
    if grass is not None and grass.offload.device != "none":
        if grass.offload.residency == "period":
            return STATE * sum(shards)
        return STATE * grass.offload.device_buffers * min(grass.offload.chunk_numel, max(shards))
    ever = {layer for layers in (*step.row["active"], step.active) for layer in layers or ()}
    met = step.shape["layers"] if step.row["prepare_state"] else len(ever)
    outside = sum(shards[: len(step.units) - len(step.layers)])
    return STATE * (outside + met * -(-step.shape["layer_numel"] // step.row["ranks"]))


def _candidates(step: TrainedStep) -> Iterator[dict[str, int]]:
    """Activations, logits and gradients where memory may peak: at the loss, in each layer's backward, in the step."""
    s, row = step.shape, step.row
    rows, kept = step.tokens * s["vocab"], _kept(step)
    # All micro-steps but the first begin with gradients: their shards, or in ZeRO-1 whole ones.
    whole = step.width * sum(step.units)
    held = 0 if row["accumulation"] == 1 else whole // (row["ranks"] if step.reduces_always else 1)
    total = saved_bytes(step)
    # log-probabilities, their gradient and that of the fp32 logits
    yield {"activations": total, "logits": 3 * FP32 * rows, "gradients": held}
    head = step.width * s["vocab"] * s["hidden"] if "head" in step.outside else 0
    yield {"activations": total, "logits": step.width * rows, "gradients": held + head}
    tied = head if s["tied"] else 0  # waits for the embedding's part
    done: float = step.width * sum(step.units[: len(step.units) - len(step.layers)]) if not step.lora else 0
    for layer in range(s["layers"] - 1, step.lowest - 1, -1):
        own = _recomputed_bytes(step, layer) if row["checkpointing"] else 0
        work = step.tokens * step.width * (2 * s["intermediate"] + s["hidden"])
        trained = (step.adapter_numel if step.lora else s["layer_numel"]) if layer in step.layers else 0
        gradients = max(held, int(done // row["ranks"])) + tied + step.width * trained
        below = sum(nbytes for index, nbytes in kept.items() if index <= layer)
        yield {"activations": below + own + work, "logits": 0, "gradients": gradients}
        done += trained * (SIGN if layer in step.expanded else step.width)
    embed = step.width * s["embed_numel"] if "embed" in step.outside else 0
    yield {"activations": 0, "logits": 0, "gradients": max(held, int(done // row["ranks"])) + embed + tied}


def layer_bytes(step: TrainedStep, layer: int) -> int:
    """What a layer saves for backward, not below the lowest. See [Note: What backward needs]."""
    s = step.shape
    hidden, inter = s["hidden"], s["intermediate"]
    query, key = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    inner = step.width * (2 * query + 2 * key) + FP32 * s["heads"]  # attention
    inner += step.width * 3 * inter  # gate, its activation, up
    norms = 2 if step.has_input_gradient(layer) else 1
    inner += norms * FP32 * (hidden + 1)  # a norm's input, and one number per token
    if layer in step.layers and not step.lora:
        inner += step.width * (2 * hidden + 2 * hidden + inter)  # norms before and after their weight; what goes down
    if step.lora:
        inputs = 0 if step.half_lora else 2 * hidden + inter
        inner += step.width * (inputs + len(step.linears) * s["lora_rank"])
    return step.tokens * inner


def _recomputed_bytes(step: TrainedStep, layer: int) -> int:
    """What a layer saves beside its input. A norm's fp32 copy of it is another tensor, unless all is fp32."""
    again = step.row["dtype"] == "fp32" and step.has_input_gradient(layer)
    return layer_bytes(step, layer) - again * step.tokens * FP32 * step.shape["hidden"]


def saved_bytes(step: TrainedStep) -> int:
    """What forward leaves for backward, the loss apart."""
    s = step.shape
    # Outside the layers: final norm, head, labels; positions, their sines and cosines.
    per_token = 8 + step.width * s["hidden"] * (("norm" in step.outside) + ("head" in step.outside))
    if step.lowest == s["layers"]:
        return step.tokens * per_token
    per_place = 2 * step.width * s["head_dim"] + 8 * step.row["checkpointing"]
    outside = step.tokens * (per_token + FP32 * (s["hidden"] + 1)) + per_place * step.row["sequence"]
    return outside + sum(_kept(step).values())


def _kept(step: TrainedStep) -> dict[int, int]:
    """Layer -> bytes that it saves; with recomputation its input alone."""
    nbytes = step.width * step.tokens * step.shape["hidden"]
    layers = range(step.lowest, step.shape["layers"])
    return {layer: nbytes if step.row["checkpointing"] else layer_bytes(step, layer) for layer in layers}


def seconds(row: Row) -> list[dict[str, float]]:
    """Least seconds of every measured step: forward and backward of plain PyTorch, Adam on a shard, traffic.

    Args:
        row: with ``plain``, see :func:`benchmarks.measure.plain.plain`.
    """
    plain, found = row["plain"], []
    for active in row["active"]:
        passes = next(done for done in plain["passes"] if done["active"] == active)
        shard = sum(TrainedStep(row, active).stepped) / row["ranks"]
        moved = traffic(row, active)
        found.append(
            {
                "forward": row["accumulation"] * passes["forward"],
                "backward": row["accumulation"] * passes["backward"],
                "adam": plain["adam"]["seconds"] * shard / plain["adam"]["numel"],
                "traffic": sum(nbytes / plain["bandwidth"][name] for name, nbytes in moved.items()),
            }
        )
    return found
