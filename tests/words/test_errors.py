from __future__ import annotations

import inspect

import pytest

from kvswap import errors
from kvswap.errors import DiskError, KVSwapError, MemoryBudgetError, UserError, on_error

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES)
def test_users_errors_end_with_2_and_faults_with_1(kind: type[KVSwapError]) -> None:
    assert issubclass(kind, KVSwapError)
    assert kind.exit_code == (2 if issubclass(kind, UserError) else 1)
    assert kind.retryable is issubclass(kind, DiskError)


def test_every_error_but_the_base_is_either_the_users_or_a_fault() -> None:
    for kind in set(CLASSES) - {KVSwapError}:
        assert issubclass(kind, UserError) is not issubclass(kind, DiskError)


def test_hint_follows_the_message() -> None:
    error = UserError("document x: not there", hint="check the path")
    assert str(error) == "document x: not there; check the path"
    assert (error.message, error.hint) == ("document x: not there", "check the path")
    assert str(DiskError("read failed")) == "read failed"


def test_memory_error_tells_what_would_work() -> None:
    error = MemoryBudgetError("too small", minimum_bytes=5, longest_tokens=7, hint="set kv_memory to 5")
    assert (error.minimum_bytes, error.longest_tokens) == (5, 7)
    assert str(error).endswith("set kv_memory to 5")


def test_what_fails_while_cleaning_up_is_added_to_the_first_error() -> None:
    def undo() -> None:
        raise DiskError("nor can it be taken back")

    with pytest.raises(UserError, match="cannot be written") as found, on_error(undo):
        raise UserError("cannot be written")
    assert str(found.value) == "cannot be written"
    assert found.value.__notes__ == ["after that: nor can it be taken back"]
    with pytest.raises(KeyboardInterrupt) as interrupted, on_error(lambda: None):
        raise KeyboardInterrupt
    assert not hasattr(interrupted.value, "__notes__")
