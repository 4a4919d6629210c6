"""Law 5: whatever a session's files contain, opening gives what was written or a clear error; no crash, no big memory.

Files are changed as a failing disk would (bits, ranges, lengths, two files in each other's place), and the manifest
also as somebody would who then writes the right checksum: values of other types and sizes, fields gone or double.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswap.errors import DamagedError, KVSwapError
from kvswap.sessions.check import check
from kvswap.sessions.commits import SessionStore
from kvswap.sessions.encryption import KEY_VARIABLE
from kvswap.sessions.index import LayerIndex
from kvswap.sessions.manifest import Layout, Model
from kvswap.sessions.manifest_json import MAGIC, VERSION
from kvswap.sessions.seal import text_sum

LAYOUT = Layout(
    layers=2,
    kv_heads=2,
    head_dim=8,
    group_tokens=4,
    dtypes=("float16", "bfloat16"),
    alignment_bytes=512,
    sketch_rank=8,
    sketch_bits=4,
    sketch_kind="identity",
    sink_tokens=4,
    recent_tokens=8,
)
STRIPE_GROUPS = 6  # the second commit goes on in a stripe and into the next
MODEL = Model(name="m", fingerprint="f", tokenizer="t", rope="r", dtype="float32")
MORE_MEMORY_BYTES = 64 << 20
VALUES: tuple[Any, ...] = (-1, 0, 1, 2**31, 2**62, 2**80, 1e300, "", "x" * 5000, "../../etc/passwd", None, True, [], {})


def commit_groups(store: SessionStore, rng: np.random.Generator, first: int, groups: int) -> None:
    """Write that many groups of every layer behind those of before, and commit."""
    start = (first,) * LAYOUT.layers
    segment = store.manifest.segments[-1] if store.appendable() else store.begin_segment(start, STRIPE_GROUPS)
    store.sealer.begin()
    file, layers = store.open_data(*segment.names(), direct=False), []
    for layer in range(LAYOUT.layers):
        slots = np.zeros((groups, LAYOUT.slot_bytes), np.uint8)
        body = slots[:, : LAYOUT.geometry.group_bytes]
        body[:] = rng.integers(0, 256, body.shape, dtype=np.uint8)
        seals = store.sealer.seal(layer, first, body)
        for run in segment.runs(LAYOUT, layer, first, first + groups, 1 << 20):
            os.pwrite(file, slots[run.first - first :][: run.count].tobytes(), run.offset_bytes)
        size = groups * LAYOUT.group_tokens
        codes = rng.integers(0, 256, (LAYOUT.code_rows, size), dtype=np.uint8)
        layers.append(LayerIndex(seals, codes, rng.integers(0, 999, (2, size)).astype(np.uint16)))
    os.close(file)
    flushed = first + groups
    tokens = flushed * LAYOUT.group_tokens + 3
    tail = {f"waiting-{n}": rng.integers(0, 256, 3 * LAYOUT.geometry.token_bytes, dtype=np.uint8) for n in range(2)}
    tail |= {"ids": np.arange(tokens + 1), "conversation": np.frombuffer(b'["hello"]', np.uint8)}
    shape = (LAYOUT.basis_rows, LAYOUT.sketch_rank)
    store.commit(
        model=MODEL,
        layout=LAYOUT,
        basis={str(layer): rng.random(shape).astype(np.float32) for layer in range(LAYOUT.layers)},
        tokens=tokens,
        flushed=(flushed,) * LAYOUT.layers,
        new_groups=layers,
        tail=tail,
        data_bytes=1,
        interim=False,
    )


def make(path: Path, *, encrypt: bool) -> Path:
    """A session of two commits."""
    rng = np.random.default_rng(0)
    with SessionStore.create(path, encrypt=encrypt) as store:
        commit_groups(store, rng, 0, 5)
        commit_groups(store, rng, 5, 3)
    return path


@pytest.fixture(autouse=True, scope="module")
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "5c" * 32)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("sessions") / "whole", encrypt=False)


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("sessions") / "secret", encrypt=True)


def content(path: Path) -> tuple[Any, ...]:
    """All that a session says it holds, read and checked. Raises KVSwapError."""
    with SessionStore.open(path, write=False) as store:
        stored, manifest = store.load(), store.manifest
        basis = [each.tobytes() for each in store.basis()] if manifest.basis else []
        report = check(store)
        assert stored is not None or not manifest.checkpoints
        tail = {name: array.tobytes() for name, array in stored.tail.items()} if stored else {}
        index = [
            ({name: array.tobytes() for name, array in store.sealer.pack(g.seals).items()}, g.codes.tobytes())
            for g in (stored.groups if stored else ())
        ]
        index += [(g.scales.tobytes(),) for g in (stored.groups if stored else ())]
        groups = []
        for segment, layer in itertools.product(manifest.segments, range(manifest.layout.layers if basis else 0)):
            for run in segment.runs(manifest.layout, layer, segment.start[layer], segment.high[layer], 1 << 20):
                slot_bytes = manifest.layout.slot_bytes
                data = store.folder.read(run.file, run.count * slot_bytes, offset_bytes=run.offset_bytes)
                slots = np.frombuffer(data, np.uint8).reshape(-1, slot_bytes)  # padding is not part of a group
                groups.append(slots[:, : manifest.layout.geometry.group_bytes].tobytes())
        if report.problems:
            raise KVSwapError("; ".join(report.problems), hint="repair")
        return tail, index, basis, groups, manifest


def flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 3, 40))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def overwrite(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 8, 512, 1 << 20)))
    data[start:stop] = rng.choice((bytes(stop - start), rng.randbytes(stop - start), b"\xff" * (stop - start)))
    return data


def shorten(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.choice((0, 1, 8, rng.randrange(len(data))))]


def lengthen(data: bytearray, rng: random.Random) -> bytearray:
    return data + rng.choice((bytes(9), data, rng.randbytes(700)))


def shift(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.choice((1, 8, 512)) :]


CHANGES: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (flip, overwrite, shorten, lengthen, shift)


def damage(folder: Path, rng: random.Random) -> str:
    """One change of one file, as a disk could make it; what it was."""
    files = sorted(path for path in folder.iterdir() if path.name != "lock")
    target = rng.choice(files)
    if rng.random() < 0.1:
        other = rng.choice(files)
        one, two = target.read_bytes(), other.read_bytes()
        target.write_bytes(two)
        other.write_bytes(one)
        return f"{target.name} for {other.name}"
    change = rng.choice(CHANGES)
    target.write_bytes(change(bytearray(target.read_bytes()), rng))
    return f"{change.__name__} {target.name}"


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value with every key or index of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def write_manifest(folder: Path, values: Any) -> None:
    signed = (folder / "manifest").read_bytes().partition(b"\n")[0].split(b" ")[3:]
    body = json.dumps(values).encode()
    head = f"{MAGIC} {VERSION} {text_sum(body)}".encode()
    (folder / "manifest").write_bytes(b" ".join([head, *signed]) + b"\n" + body)


def forge(folder: Path, rng: random.Random) -> str:
    """Other values in the manifest, under the right checksum; what they were."""
    values = json.loads((folder / "manifest").read_bytes().partition(b"\n")[2])
    said = []
    for _ in range(rng.choice((1, 1, 2))):
        container, key = rng.choice(places(values))
        old, kind = container[key], rng.randrange(4)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(old, list):
            container[key] = old * rng.choice((2, 3, 2000))
        elif kind == 2 and isinstance(old, int):
            container[key] = old + rng.choice((-1, 1, 4, 512))
        else:
            container[key] = rng.choice(VALUES)
        said.append(f"{key}: {old!r:.60}")
    write_manifest(folder, values)
    return f"forged {', '.join(said)}"


def run(whole: Path, scratch: Path, rounds: int, seed: int) -> None:
    rng, before = random.Random(seed), content(whole)
    content(whole)
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MORE_MEMORY_BYTES
    refused = 0
    for number in range(rounds):
        copy = scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        copy.chmod(0o700)
        forged = rng.random() < 0.4
        what = forge(copy, rng) if forged else damage(copy, rng)
        try:
            after = content(copy)
        except KVSwapError as error:
            refused += 1
            assert str(error), what
        except Exception as error:
            raise AssertionError(f"change {number} of seed {seed}: {what}") from error
        else:
            may_differ = forged and before[-1].encryption is None  # nobody without the key can forge
            assert may_differ or after == before, f"change {number} of seed {seed}: {what}: wrong data"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < limit
    assert rounds / 2 < refused < rounds  # most changes damage something; some change bytes that are not used


def test_changed_files_give_an_error_or_what_was_written(whole, tmp_path) -> None:
    run(whole, tmp_path, 1_000, seed=1)


def test_changed_files_of_an_encrypted_session_give_an_error_or_what_was_written(secret, tmp_path) -> None:
    run(secret, tmp_path, 500, seed=3)


def test_another_digit_anywhere_in_the_manifest_is_refused(whole, tmp_path) -> None:
    """Damage that leaves a well-formed manifest, which only its checksum tells."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    copy.chmod(0o700)
    written = (copy / "manifest").read_bytes()
    body = written.index(b"\n")
    places = [at for at in range(body, len(written)) if 48 <= written[at] < 58]
    assert len(places) > 100
    for at in places:
        changed = bytearray(written)
        changed[at] ^= 1
        (copy / "manifest").write_bytes(changed)
        with pytest.raises(DamagedError, match="another checksum"):
            SessionStore.open(copy, write=False)


@pytest.mark.parametrize(
    "change",
    [
        {"sketch_bits": 3, "sketch_rank": 8},
        {"sketch_bits": 1, "sketch_rank": 8},
        {"sketch_kind": "os.system"},
        {"sketch_rank": 24},
        {"sketch_rank": 7},
        {"alignment_bytes": 100},
        {"layers": 3},
        {"dtypes": ["float16", "float32"]},
        {"dtypes": ["float64", "float64"]},
        {"dtypes": [["float16"], ["float16"]]},
        {"dtypes": [None, None]},
    ],
)
def test_an_impossible_layout_is_refused(whole, tmp_path, change) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    copy.chmod(0o700)
    values = json.loads((copy / "manifest").read_bytes().partition(b"\n")[2])
    write_manifest(copy, {**values, "layout": values["layout"] | change})
    with pytest.raises(DamagedError, match="malformed"):
        content(copy)
    write_manifest(copy, values)
    content(copy)


def test_a_signature_of_other_characters_is_refused(secret, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(secret, copy)
    copy.chmod(0o700)
    data = (copy / "manifest").read_bytes()
    head, _, body = data.partition(b"\n")
    assert body
    signed = head.split()[-1]
    (copy / "manifest").write_bytes(head[: -len(signed)] + "é".encode() + signed[2:] + b"\n" + body)
    with pytest.raises(KVSwapError):
        content(copy)


@pytest.mark.slow
def test_ten_thousand_changed_files(whole, tmp_path) -> None:
    run(whole, tmp_path, 10_000, seed=2)


@pytest.mark.slow
def test_ten_thousand_changed_files_of_an_encrypted_session(secret, tmp_path) -> None:
    run(secret, tmp_path, 10_000, seed=4)
