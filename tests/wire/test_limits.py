"""Limits can't be set to something that would refuse everything or nothing."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from blindtune.wire import Limits


@pytest.mark.parametrize("name", Limits.model_fields)
@pytest.mark.parametrize("value", [0, -1, 1.5, None, "many"])
def test_every_limit_is_a_positive_whole_number(name: str, value: object):
    with pytest.raises(ValidationError):
        Limits.model_validate({name: value})


def test_a_misspelt_limit_is_refused():
    with pytest.raises(ValidationError, match="max_lenght"):
        Limits.model_validate({"max_lenght": 3})


def test_limits_do_not_change_once_they_are_published():
    with pytest.raises(ValidationError):
        Limits().max_length = 3  # pyright: ignore[reportAttributeAccessIssue]
