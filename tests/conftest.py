"""What all tests share."""

import os

# Before JAX starts: no accelerator, so that tests mean the same everywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest
from tiny import tiny


@pytest.fixture(params=["llama", "qwen3"])
def model(request):
    return tiny(request.param)
