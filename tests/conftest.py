"""What all tests share."""

import os

# Before JAX starts: no accelerator, so that tests mean the same everywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def start_jax(flag: str) -> None:
    """Start JAX with one more XLA flag (the user's own word on it wins) and put the environment back: XLA reads it once, and the processes
    that tests start are to run as they would for a user."""
    users = os.environ.get("XLA_FLAGS")
    if flag.split("=")[0] not in (users or ""):
        os.environ["XLA_FLAGS"] = f"{users or ''} {flag}".strip()
    try:
        import jax

        jax.devices()
    finally:
        if users is None:
            os.environ.pop("XLA_FLAGS", None)
        else:
            os.environ["XLA_FLAGS"] = users


# Tests compile a hundred programs and run each once on tiny arrays: LLVM's optimizer would take longer than everything else together.
start_jax("--xla_backend_optimization_level=0")

import pytest  # noqa: E402
from tiny import tiny  # noqa: E402


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def model(request):
    return tiny(request.param)
