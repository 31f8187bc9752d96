"""Facts about `train.settings`."""

import pytest
from pydantic import Field

from train.settings import Settings


class Rates(Settings, frozen=True, extra="forbid"):
    peak: float = Field(1.0, gt=0)
    beta_1: float = Field(0.9, ge=0, lt=1)


def test_mistakes_are_a_line_each_with_what_came() -> None:
    with pytest.raises(ValueError, match="greater than 0") as caught:
        Rates(peak=-2, beta_1=float("nan"), warmup=3)
    assert str(caught.value).splitlines() == [
        "peak: Input should be greater than 0 (got -2)",
        "beta_1: Input should be less than 1 (got nan)",
        "warmup: Extra inputs are not permitted (got 3)",
    ]


def test_what_is_missing_is_named_alone() -> None:
    class Source(Settings, frozen=True, extra="forbid"):
        place: str
        seed: int = 0

    with pytest.raises(ValueError, match=r"^place: Field required$"):
        Source(seed=3)


def test_settings_within_settings_survive_json_and_name_their_place() -> None:
    class Whole(Settings, frozen=True, extra="forbid"):
        rates: Rates = Rates()

    whole = Whole(rates=Rates(peak=2.0))
    assert Whole.model_validate_json(whole.model_dump_json()) == whole
    with pytest.raises(ValueError, match=r"rates: peak: Input should be greater than 0 \(got -2\)"):
        Whole(rates={"peak": -2})
