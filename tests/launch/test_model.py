"""The tokens that a model is given, against those that it has an embedding for."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from launch.data.tokenization import largest_token
from launch.model import check_tokens


def test_the_largest_token_of_a_data_set_is_found() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [99], [5, 7, 3]], "labels": [[1, 2], [99], [5, 7, 3]]})
    assert largest_token(rows) == 99
    assert largest_token(rows.select([0, 2])) == 7


def test_an_embedding_that_zero3_has_partitioned_has_its_whole_size(tokenizer: PreTrainedTokenizerFast) -> None:
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size([300, 8])
    model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))
    check_tokens(model, "m", tokenizer, 299)
    with pytest.raises(ValueError, match=r"--model m: .* token 300 .* has 300 rows .*resize_token_embeddings"):
        check_tokens(model, "m", tokenizer, 300)
