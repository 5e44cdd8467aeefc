# SPDX-License-Identifier: Apache-2.0
"""Discovery on real architectures (random, tiny), on odd ones, and its refusals."""

import pytest
import torch
from torch import nn

from grass_ds.sampling.layers import LayerDiscoveryError, discover_layers

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# architecture -> (stack, embeddings, norm module); what a person reads off the model's printout
DECODERS = {
    "Llama": ("model.layers", ["model.embed_tokens"], "model.norm"),
    "Mistral": ("model.layers", ["model.embed_tokens"], "model.norm"),
    "Mixtral": ("model.layers", ["model.embed_tokens"], "model.norm"),
    "Qwen2": ("model.layers", ["model.embed_tokens"], "model.norm"),
    "Qwen3": ("model.layers", ["model.embed_tokens"], "model.norm"),
    "Gemma": ("model.layers", ["model.embed_tokens"], "model.norm"),
    "Gemma2": ("model.layers", ["model.embed_tokens"], "model.norm"),
    "Phi": ("model.layers", ["model.embed_tokens"], "model.final_layernorm"),
    "Phi3": ("model.layers", ["model.embed_tokens"], "model.norm"),
    "GPTNeoX": ("gpt_neox.layers", ["gpt_neox.embed_in"], "gpt_neox.final_layer_norm"),
    "GPT2": ("transformer.h", ["transformer.wte", "transformer.wpe"], "transformer.ln_f"),
    "OPT": (
        "model.decoder.layers",
        ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
        "model.decoder.final_layer_norm",
    ),
    "Falcon": ("transformer.h", ["transformer.word_embeddings"], "transformer.ln_f"),
    "Bloom": (
        "transformer.h",
        ["transformer.word_embeddings", "transformer.word_embeddings_layernorm"],
        "transformer.ln_f",
    ),
}


def build(name, tied):
    import transformers

    overrides = {
        "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "Gemma": {"head_dim": 8},
        "Gemma2": {"head_dim": 8},
    }
    config = getattr(transformers, f"{name}Config")(**TINY, **overrides.get(name, {}), tie_word_embeddings=tied)
    return transformers.AutoModelForCausalLM.from_config(config)


def everything(layers):
    return sorted(
        [n for block in layers.block_params for n in block] + [n for v in layers.outside.values() for n in v]
    )


def under(model, modules):
    return tuple(n for n, _ in model.named_parameters() if any(n.startswith(module + ".") for module in modules))


@pytest.mark.parametrize("name", DECODERS)
def test_matrices_are_all_of_two_dimensions_inside_the_blocks_and_the_rest_does_not_train(name):
    model = build(name, tied=False)
    blocks = discover_layers(model)
    layers = blocks.by_weight(model)
    assert layers.blocks == blocks.names == blocks.blocks and blocks.depths == (0, 1, 2)
    inside = {n: p for n, p in model.named_parameters() if n.startswith(blocks.path + ".")}
    matrices = [n for n, p in inside.items() if p.dim() > 1]
    assert list(layers.names) == matrices and layers.block_params == tuple((n,) for n in matrices)
    assert layers.sizes == tuple(inside[n].numel() for n in matrices)
    assert [blocks.names[depth] for depth in layers.depths] == [
        next(block for block in blocks.names if n.startswith(block + ".")) for n in matrices
    ]
    assert sum(blocks.sizes) == sum(p.numel() for p in inside.values())
    assert {*layers.outside.get("vector", ()), *matrices} == set(inside)
    assert {kind: names for kind, names in layers.outside.items() if kind != "vector"} == blocks.outside
    assert "vector" not in layers.resolve_always_active(None)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, tied):
    model = build(name, tied)
    path, embeddings, norm = DECODERS[name]
    layers = discover_layers(model)
    assert layers.path == path
    assert layers.names == tuple(f"{path}.{i}" for i in range(3))
    assert layers.block_params == tuple(under(model, [block]) for block in layers.names)
    head = under(model, ["lm_head", "embed_out"])  # of GPTNeoX before transformers 5
    expected = {"embed": under(model, embeddings), "norm": under(model, [norm]), "head": head}
    if tied:
        expected = {"embed": under(model, [*embeddings, "lm_head"]), "norm": expected["norm"]}
    assert layers.outside == expected
    assert layers.tied == tied
    assert everything(layers) == sorted(n for n, _ in model.named_parameters())
    assert layers.resolve_always_active(["norm", "head", "embed"]) == (
        ("norm", "embed") if tied else ("norm", "head", "embed")
    )


class Block(nn.Module):
    def __init__(self, size=8, experts=2):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(experts))


class Stack(nn.Module):
    def __init__(self, depth, size=8):
        super().__init__()
        self.position = nn.Embedding(4, size)
        self.blocks = nn.ModuleList(Block(size) for _ in range(depth))
        self.last_norm = nn.LayerNorm(size)


class Plain(nn.Module):
    """No transformers methods, no norm, bare parameters and a projection that fit no kind."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.tokens = nn.Embedding(32, 8)
        self.project = nn.Linear(8, 8)
        self.body = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(8, 32)


class TwoTowers(nn.Module):
    """A vision tower beside a text stack; ``get_decoder`` is added by the tests that have one."""

    def __init__(self, vision=3, text=3):
        super().__init__()
        self.vision = nn.ModuleDict({"encoder": Stack(vision)})
        self.text = Stack(text)
        self.connector = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.tokens = nn.Embedding(32, 8)
        self.head = nn.Linear(8, 32, bias=False)


class Named(TwoTowers):
    def get_decoder(self):
        return self.text


def test_a_plain_module_is_understood_by_its_structure():
    layers = discover_layers(Plain())
    assert layers.path == "body" and len(layers.block_params[0]) == 6  # the experts' list is no stack of its own
    assert layers.outside == {
        "embed": ("tokens.weight",),
        "head": ("out.weight", "out.bias"),
        "other": ("scale", "project.weight", "project.bias"),
    }
    assert not layers.tied
    assert layers.resolve_always_active([]) == ()
    assert layers.resolve_always_active(None) == ("other",)  # it has no final norm, and its head is the vocabulary's
    missing = r"'norm', but this model has nothing of that kind.*'head' \(out.weight, out.bias\); 'other' \(scale"
    with pytest.raises(ValueError, match=missing):
        layers.resolve_always_active(["norm", "head"])


@pytest.mark.parametrize("model", [Named(vision=9, text=3), TwoTowers(vision=1, text=3)], ids=["named", "dominant"])
def test_the_text_stack_is_taken_and_the_vision_tower_is_other(model):
    layers = discover_layers(model)
    assert layers.path == "text.blocks"
    assert layers.outside["embed"] == ("text.position.weight", "tokens.weight")
    assert layers.outside["norm"] == ("text.last_norm.weight", "text.last_norm.bias")
    assert layers.outside["head"] == ("head.weight",)
    assert layers.outside["other"] == under(model, ["connector"])  # whose norm is not the final one
    assert layers.outside["tower"] == under(model, ["vision"])
    assert layers.below == ("embed", "tower")
    assert layers.resolve_always_active(None) == ("norm", "other")
    assert layers.resolve_always_active(["other"]) == ("other", "tower")


def test_comparable_stacks_are_refused_with_every_candidate_and_a_path_decides():
    model = TwoTowers(vision=4, text=3)
    with pytest.raises(LayerDiscoveryError) as refusal:
        discover_layers(model)
    per_block = sum(p.numel() for p in Block().parameters())
    assert f"vision.encoder.blocks: 4 blocks, {4 * per_block} parameters" in str(refusal.value)
    assert f"text.blocks: 3 blocks, {3 * per_block} parameters" in str(refusal.value)
    assert '"grass": {"layers_path": ' in str(refusal.value)
    assert discover_layers(model, "text.blocks").path == "text.blocks"
    chosen = discover_layers(model, "vision.encoder.blocks")
    assert chosen.outside["norm"] == ("vision.encoder.last_norm.weight", "vision.encoder.last_norm.bias")
    for path in ("text.layers", "text", "tokens", "text.blocks.0", ""):
        with pytest.raises(LayerDiscoveryError, match=r"text\.blocks: 3 blocks") as refusal:
            discover_layers(model, path)
        assert f"layers_path = {path!r}" in str(refusal.value)


def test_a_path_may_name_one_of_several_stages():
    model = nn.ModuleDict({"stages": nn.ModuleList(Stack(2) for _ in range(2)), "tokens": nn.Embedding(32, 8)})
    layers = discover_layers(model, "stages.1.blocks")
    assert layers.names == ("stages.1.blocks.0", "stages.1.blocks.1")
    assert layers.outside["norm"] == ("stages.1.last_norm.weight", "stages.1.last_norm.bias")
    assert everything(layers) == sorted(n for n, _ in model.named_parameters())


def test_a_path_may_name_blocks_of_several_types_but_the_search_does_not_guess_them():
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), nn.Linear(8, 8)]), "tokens": nn.Embedding(4, 8)})
    with pytest.raises(LayerDiscoveryError, match=r"several types of blocks(.|\n)*layers: 2 blocks"):
        discover_layers(model)
    assert discover_layers(model, "layers").names == ("layers.0", "layers.1")


def test_a_model_without_blocks_says_so():
    with pytest.raises(LayerDiscoveryError, match=r"no list of decoder blocks(.|\n)*\(none\)"):
        discover_layers(nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.GELU(), nn.GELU()])))


def test_a_wrapper_prefix_is_kept_in_the_names():
    inner = build("Llama", tied=True)
    wrapped = nn.Module()
    wrapped.module = inner
    plain, layers = discover_layers(inner), discover_layers(wrapped)
    assert layers.path == "module.model.layers" and layers.tied
    assert layers.outside == {kind: tuple(f"module.{n}" for n in names) for kind, names in plain.outside.items()}
    assert everything(layers) == sorted(n for n, _ in wrapped.named_parameters())


def test_tied_heads_of_plain_modules_bring_their_bias_along():
    model = Plain()
    model.out.weight = model.tokens.weight
    layers = discover_layers(model)
    assert layers.tied and layers.outside["embed"] == ("tokens.weight", "out.bias")
    assert "head" not in layers.outside and layers.resolve_always_active(["head"]) == ("embed",)


def test_parameters_shared_between_blocks_or_with_the_rest_are_refused():
    model = Plain()
    model.body[1].norm.weight = model.body[0].norm.weight
    with pytest.raises(LayerDiscoveryError, match=r"'body\.1\.norm\.weight' is shared by body\.0 and body\.1"):
        discover_layers(model)
    model = Plain()
    model.body[1].norm.weight = model.scale
    with pytest.raises(LayerDiscoveryError, match=r"shared by the modules outside the blocks and body\.1"):
        discover_layers(model)
    model = Plain()  # within a block they are listed once
    model.body[0].experts[1].weight = model.body[0].experts[0].weight
    assert everything(discover_layers(model)) == sorted(n for n, _ in model.named_parameters())


def test_frozen_and_partitioned_parameters_are_found_all_the_same():
    """ZeRO-3 leaves no elements of a parameter, and the truth in ``ds_shape`` and ``ds_numel``."""
    model = TwoTowers(vision=1, text=5)
    expected = discover_layers(model)
    model.requires_grad_(False)
    assert discover_layers(model) == expected
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = torch.empty(0)
    assert discover_layers(model) == expected


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GPT2_SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
LINEAR = {"score.weight"}
POOLED = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("family", "task", "labels", "own"),
    [
        ("Llama", "SequenceClassification", 2, LINEAR),
        ("Llama", "SequenceClassification", 1, LINEAR),  # a reward model
        ("Llama", "TokenClassification", 5, {"score.weight", "score.bias"}),
        ("Llama", "QuestionAnswering", 2, {"qa_outputs.weight", "qa_outputs.bias"}),
        ("GPT2", "SequenceClassification", 2, LINEAR),
        ("Bert", "SequenceClassification", 2, POOLED),
        ("Bert", "SequenceClassification", 3, POOLED),
    ],
)
def test_the_output_layers_of_a_task_model_are_its_head_and_train_by_default(family, task, labels, own):
    """Whatever the number of labels: two make a classifier as large as BERT's table of token types."""
    import transformers

    sizes = GPT2_SIZES if family == "GPT2" else SIZES
    config = getattr(transformers, f"{family}Config")(**sizes, num_labels=labels)
    model = getattr(transformers, f"{family}For{task}")(config)
    layers = discover_layers(model)
    assert set(layers.outside["head"]) == own
    assert not layers.tied and "other" not in layers.outside and "tower" not in layers.outside
    assert "head" in layers.resolve_always_active(None)
    if "norm" in layers.outside:
        assert layers.resolve_always_active(["norm", "head"]) == ("norm", "head")
    assert everything(layers) == sorted(n for n, _ in model.named_parameters())


class Valued(Plain):
    """A value head beside the vocabulary's, and a list of task heads, each smaller than a block."""

    def __init__(self):
        super().__init__()
        self.value = nn.Linear(8, 1)
        self.tasks = nn.ModuleList(nn.Sequential(nn.Linear(8, 2)) for _ in range(2))


def test_what_lies_above_the_blocks_beside_the_head_trains_by_default():
    layers = discover_layers(Valued())
    assert layers.outside["head"] == ("out.weight", "out.bias")
    assert {"value.weight", "tasks.0.0.weight", "tasks.1.0.bias"} < set(layers.outside["other"])
    assert layers.resolve_always_active(None) == ("other",)


def test_the_encoder_beside_a_decoder_is_a_tower():
    import transformers as hf

    config = hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4)
    layers = discover_layers(hf.T5ForConditionalGeneration(config))
    assert layers.path == "decoder.block"
    assert all(name.startswith("encoder.") for name in layers.outside["tower"])
    assert "encoder.final_layer_norm.weight" in layers.outside["tower"]
    assert layers.outside["norm"] == ("decoder.final_layer_norm.weight",)
    assert layers.resolve_always_active(None) == ("norm",)


class Ensemble(nn.Module):
    """Misleading names: a parent called "ensemble", a mask's vector beside the stack, a position vector."""

    def __init__(self):
        super().__init__()
        self.ensemble = nn.Module()
        self.ensemble.mask_emb = nn.Parameter(torch.zeros(8))
        self.ensemble.null_token = nn.Parameter(torch.zeros(8))
        self.ensemble.tokens = nn.Embedding(32, 8)
        self.ensemble.front = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.ensemble.blocks = nn.ModuleList(Block() for _ in range(2))
        self.ensemble.norm = nn.LayerNorm(8)
        self.sentence_embedding = nn.Linear(8, 3)


def test_names_and_vectors_beside_the_stack_do_not_mislead():
    layers = discover_layers(Ensemble())
    assert layers.outside["norm"] == ("ensemble.norm.weight", "ensemble.norm.bias")
    assert layers.outside["embed"] == ("ensemble.mask_emb", "ensemble.tokens.weight")
    assert layers.outside["other"] == ("ensemble.null_token", *under(layers_model := Ensemble(), ["ensemble.front"]))
    assert layers.outside["head"] == under(layers_model, ["sentence_embedding"])  # new, whatever its name
    assert layers.below == ("embed", "other")
