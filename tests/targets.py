"""What tests can compile for."""

import pytest

from train.gpus import check_gpu_compiler
from train.runtime import DeviceError


def skip_without_compiler(target: str) -> None:
    """Go on only if programs can be compiled for the target here."""
    if target != "cpu":
        try:
            check_gpu_compiler()
        except DeviceError as error:
            pytest.skip(str(error))
