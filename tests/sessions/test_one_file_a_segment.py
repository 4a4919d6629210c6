"""All layers of a segment are in one file: descriptors, syncs and disk space do not grow with the layers."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.models.adapter import cache_keyword
from kvswap.models.loading import LoadedModel
from kvswap.sessions.catalog import session_path, used_bytes
from kvswap.sessions.check import check
from kvswap.sessions.export_import import export_session, import_session
from kvswap.sessions.session import Session
from tests.helpers.families import tiny_model, tokens
from tests.helpers.folders import byte_tokenizer

pytestmark = pytest.mark.usefixtures("cache_home")
LAYERS = (2, 9)


def loaded(layers: int) -> LoadedModel:
    return LoadedModel(tiny_model("llama", vocab_size=300, num_hidden_layers=layers), byte_tokenizer(), "tiny-llama")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(select_tokens=56, recent_tokens=16, kv_memory="16MiB", kv_dir=str(tmp_path / "kv"))


def descriptors() -> int:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the system does not list descriptors")
    return len(os.listdir("/proc/self/fd"))


def test_a_cache_has_one_file_whatever_the_layers_and_sequences(config) -> None:
    opened = []
    for layers, batch in ((2, 1), (9, 1), (2, 5)):
        model, before = tiny_model("llama", num_hidden_layers=layers), descriptors()
        with attach(model, config) as cache, torch.no_grad():
            model(tokens(batch, 300), **{cache_keyword(model): cache})
            opened.append(descriptors() - before)
    assert opened[0] == opened[1] == opened[2]


def test_a_session_has_one_file_a_segment_whatever_the_layers(config) -> None:
    """Each fork begins a segment of its own behind those that it took over."""
    seen: list[list[int]] = []
    for layers in LAYERS:
        model, before = loaded(layers), descriptors()
        seen.append([])
        with Session.create(f"s{layers}-0", model, config) as session:
            session.append(tokens(1, 60)[0].tolist())
            session.fork(f"s{layers}-1")
        for number in range(1, 4):
            with Session.open(f"s{layers}-{number}", model, config) as session:
                session.append(tokens(1, 60, seed=number)[0].tolist())
                session.fork(f"s{layers}-{number + 1}")
                seen[-1].append(descriptors() - before)
                assert len(session.store.manifest.segments) == number + 1
                assert len([name for name in session.store.folder.names() if name.startswith("data-")]) == number + 1
        assert descriptors() <= before + 1
    assert seen[0] == seen[1] == [seen[0][0] + number for number in range(3)]


def test_a_commit_syncs_one_data_file(config, monkeypatch) -> None:
    synced: list[str] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(Path(sys._getframe(1).f_code.co_filename).name)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    for layers in LAYERS:
        with Session.create(f"s{layers}", loaded(layers), config) as session:
            for number in range(3):
                synced.clear()
                session.append(tokens(1, 90, seed=number)[0].tolist())
                assert synced.count("file_backend.py") == 1
                assert len(synced) <= 5  # the data file, index, tail, manifest, and basis at first
                synced.clear()
                session.commit(session.token_ids, b'["text"]')
                assert synced.count("file_backend.py") == 0


@pytest.mark.parametrize("reserves", [True, False])
def test_no_file_is_longer_than_what_it_takes(reserves, config, tmp_path, monkeypatch) -> None:
    """Holes would be written out by every copy. There is less than one stripe of them, also where no space can be
    reserved, and limits count what is taken."""

    def refuse(*args: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    if not reserves and hasattr(os, "posix_fallocate"):
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    model = loaded(9)
    with Session.create("s", model, config) as session:
        session.append(tokens(1, 700)[0].tolist())
        list(session.generate(max_new_tokens=30))
        for _ in range(3):
            session.append(tokens(1, 400)[0].tolist())
        export_session(session.store, tmp_path / "s.kvswap")
    path = session_path(config.kv_dir, "s")
    with Session.open("s", model, config) as session:
        (segment,), layout = session.store.manifest.segments, session.store.manifest.layout
        stripe_bytes = segment.stripe_groups * layout.slot_bytes * layout.layers
        groups_bytes = sum(segment.high) * layout.slot_bytes
    apparent_bytes = (path / "data-0").stat().st_size
    assert groups_bytes <= apparent_bytes < groups_bytes + stripe_bytes
    taken_bytes = (path / "data-0").stat().st_blocks * 512
    assert taken_bytes <= apparent_bytes + 16384  # the file system's own blocks
    if not reserves:
        assert taken_bytes <= groups_bytes + 9 * 8192
    assert used_bytes(path.parent) >= taken_bytes
    assert (tmp_path / "s.kvswap").stat().st_size < groups_bytes + stripe_bytes + (1 << 20)
    import_session(tmp_path / "s.kvswap", path.with_name("t"))
    answers = []
    for name in "st":
        with Session.open(name, model, config) as session:
            assert check(session.store).problems == []
            list(session.generate(max_new_tokens=20))
            answers.append(session.token_ids)
    assert answers[0] == answers[1]
