"""What ``import kvswap`` gives: every public name, what signatures need, and nothing heavy before it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing

import pytest

import kvswap


@pytest.mark.parametrize("name", kvswap.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(kvswap, name)
    assert inspect.getdoc(found)
    assert found.__module__.startswith("kvswap.")


def test_public_names_stay_what_they_are() -> None:
    for _ in range(2):  # the first use imports a module of the same name
        assert callable(kvswap.attach) and callable(kvswap.load)
    assert all(getattr(kvswap, name).__name__ == name for name in kvswap.__all__)
    assert set(kvswap.__all__) == {
        *("attach", "load", "load_model", "tune"),
        *("Config", "Document", "Engine", "Limits", "LoadedModel", "Sampling", "Session"),
        *("CacheStats", "RunStats"),
        *("ConfigError", "DamagedError", "DiskError", "InputError", "KVSwapError", "MemoryBudgetError", "ModelError"),
        *("OpenFilesError", "SessionError", "StorageError", "UnsupportedError"),
    }


def test_names_and_their_modules_agree() -> None:
    assert set(kvswap._HOMES) == set(kvswap.__all__) == set(dir(kvswap)) - {"__version__"}


@pytest.mark.parametrize("function", ["attach", "load", "load_model", "tune"])
def test_classes_in_signatures_are_public(function: str) -> None:
    """Methods to compare with, profiles and tables are for researchers and stay in their rooms."""
    ours = set()
    waiting = list(typing.get_type_hints(inspect.unwrap(getattr(kvswap, function))).values())
    while waiting:
        hint = waiting.pop()
        waiting += typing.get_args(hint)
        if inspect.isclass(hint) and hint.__module__.startswith("kvswap."):
            ours.add(hint.__name__)
    research = {"Method", "InMemory", "FullCache", "KVSwapCache", "SessionStore", "Profile", "Tables", "TunedConfig"}
    assert ours - research <= set(kvswap.__all__)


def test_importing_loads_neither_torch_nor_transformers() -> None:
    check = "import kvswap, sys; kvswap.Config(); assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvswap.nothing
