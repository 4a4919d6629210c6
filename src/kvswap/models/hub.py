"""Whether a model id exists and can be fetched, asked before loading, so that a typo or a dead network fails at once.

transformers alone would retry an unreachable hub for a minute and then print pages. Offline mode (HF_HUB_OFFLINE), the
cache and its revisions are those of ``huggingface_hub``; transformers then loads the same revision from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from huggingface_hub import HfApi, errors, try_to_load_from_cache

TIMEOUT_S = 10.0
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a hub id cannot be used. ``final``: not even when a copy is in the local cache."""

    text: str
    hint: str = ""
    final: bool = False


def look_like_path(name: str) -> bool:
    """Whether a name that is no file here was meant as a path."""
    return name.startswith((".", "/", "~")) or name.lower().endswith(".gguf") or not _ID.fullmatch(name)


def has_cached(name: str) -> bool:
    """Whether the local cache holds something of this hub id."""
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def problem_with(name: str) -> Problem | None:
    """Ask the hub about an id. None when it exists and this user may read it."""
    # the base error of whichever HTTP library the hub's client uses, and OSError
    unreachable = cast(tuple[type[Exception], ...], errors.HfHubHTTPError.__bases__)
    try:
        HfApi().model_info(name, timeout=TIMEOUT_S)
    except errors.OfflineModeIsEnabled:
        return Problem(
            "no local file or directory of this name, and the hub is not asked because HF_HUB_OFFLINE is set",
            "give a local directory, or unset HF_HUB_OFFLINE",
        )
    except errors.GatedRepoError:
        return Problem(
            "the hub wants its licence accepted first", "accept it on its page, then log in with `hf auth login`"
        )
    except errors.RepositoryNotFoundError:
        return Problem("neither a local path nor a public model on the hub", final=True)
    except errors.HFValidationError as error:
        return Problem(str(error), final=True)
    except unreachable:
        return Problem(
            "no local file or directory of this name, and the hub cannot be reached", "give a local directory"
        )
    return None
