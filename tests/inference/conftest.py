"""A tiny encoder in which every token counts."""

from __future__ import annotations

import pytest
import torch

from counted import Counted
from lowmem_cft.model.configs import disable_base_dropout
from tiny import tiny_config


@pytest.fixture
def encoder() -> Counted:
    from transformers import AutoModel

    torch.manual_seed(0)
    config = tiny_config("opt")
    disable_base_dropout(config)
    model = AutoModel.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return Counted(model, pooling="last", normalize=True)
