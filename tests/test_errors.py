"""The exception tree: complete, told apart by slug, and the same on both sides of the network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from blindtune import errors
from blindtune.errors import PROBLEM_PREFIX, BlindtuneError, RequestError, ServerFault


def descendants(cls: type[BlindtuneError]) -> Iterator[type[BlindtuneError]]:
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from descendants(child)


REFUSALS = [cls for cls in descendants(RequestError) if issubclass(cls, RequestError)]


def drawn_tree() -> list[tuple[str, str | None, str]]:
    """(class, its parent, the rest of the line) as drawn in the module's docstring."""
    tree: list[tuple[str, str | None, str]] = []
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+)\s*(.*)$", line)
        if match and (match[1] or match[2] == "BlindtuneError"):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            tree.append((match[2], path[depth - 1] if depth else None, match[3]))
    return tree


def test_the_docstring_draws_every_class_under_its_parent():
    actual = {(cls.__name__, cls.__mro__[1].__name__) for cls in descendants(BlindtuneError)}
    assert {(name, parent) for name, parent, _ in drawn_tree() if parent} == actual


def test_the_docstring_states_every_status():
    stated = {name: int(rest[:3]) for name, _, rest in drawn_tree() if rest[:3].isdigit()}
    assert stated == {cls.__name__: cls.status for cls in REFUSALS}


def test_problem_types_are_unique_and_look_like_names():
    slugs = [cls.slug for cls in REFUSALS] + [RequestError.slug]
    assert len(set(slugs)) == len(slugs)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", slug) for slug in slugs)


@pytest.mark.parametrize("cls", [*REFUSALS, RequestError])
def test_a_refusal_arrives_as_its_own_class_with_message_and_remedy(cls: type[RequestError]):
    sent = cls("The batch has 7 examples.", remedy="Send 6.")
    received = RequestError.from_problem(json.loads(json.dumps(sent.to_problem())), sent.status)
    assert type(received) is cls
    assert (received.message, received.remedy) == ("The batch has 7 examples.", "Send 6.")
    assert str(received) == "The batch has 7 examples. Send 6."


def test_a_problem_document_has_the_members_of_rfc_9457():
    problem = errors.EmptyBatch("No rows.", remedy="Send one.").to_problem()
    assert problem["type"] == PROBLEM_PREFIX + "empty-batch"
    assert (problem["title"], problem["status"], problem["detail"]) == ("Empty batch", 422, "No rows.")


@pytest.mark.parametrize(("status", "expected"), [(418, RequestError), (500, ServerFault), (599, ServerFault)])
def test_an_unknown_problem_still_becomes_an_error_that_tells_the_status(status: int, expected: type[RequestError]):
    received = RequestError.from_problem({"type": "about:blank"}, status)
    assert type(received) is expected
    assert str(status) in received.message


@pytest.mark.parametrize("problem", [{}, {"type": 7, "detail": ["x"], "remedy": None}, {"type": PROBLEM_PREFIX}])
def test_a_problem_document_of_any_shape_can_be_read(problem: dict[str, object]):
    assert isinstance(RequestError.from_problem(problem, 400), RequestError)
