"""Measure kvswap and llama.cpp at the size of Llama-3.1-8B, on a file of random weights and contexts of random K, V.

    python benchmarks/real_size.py --file FILE.gguf --context 8192,16384,32768 --prepare
    python benchmarks/real_size.py --file FILE.gguf --context 8192,16384 --json out.json
    python benchmarks/real_size.py --file FILE.gguf --context 32768 --only=kvswap --json out.json

Only speed and memory mean something here: random weights write random text, and each step attends to other tokens than
the step before. So kvswap reads more for each token than it does with text.

``--prepare`` writes the file, and every context twice: as a session of kvswap and as a saved state of llama.cpp, both
with the same K, V. Nothing is computed for them, because a prompt takes the better part of an hour at this size. Each
program then opens a context in a process of its own and takes tokens one by one, in turns. Files are put out of the
page cache before. A third run with ``--only`` may be under a memory limit of the kernel: its size is recorded, and a
program that is killed or needs longer than ``--patience`` is a result as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvswap.core.calibration import store_statistics
from kvswap.disk.atomic import atomic_file
from kvswap.disk.folders import VARIABLE
from kvswap.disk.json_files import read_results, write_json
from kvswap.errors import KVSwapError
from kvswap.lab.peers.run import PAUSE_S, Worker
from kvswap.memory.available import memory_limit
from kvswap.models.adapter import ModelParts, inspect
from kvswap.models.loading import load_model
from kvswap.selection.basis import KeyCovariance
from kvswap.sessions.catalog import session_path
from kvswap.sessions.session import Session
from kvswap.tuning.machine import describe_machine
from kvswap.weights.gguf_file import TYPES, GgufFile

PROGRAMS = ("kvswap", "llama.cpp")
KEYS = ("program", "context", "memory_limit_bytes")
"""What a result is about: a new one replaces an older one."""
WARM_STEPS = 4
"""Steps of each program that are not counted."""
Q4_K, Q6_K, F32 = 12, 14, 0
SCALE_PLACES = {Q4_K: (0, 2), Q6_K: (208,)}
"""Where a block has float16."""
PANEL_BLOCKS = 1 << 14
KEY_SPREAD, VALUE_SPREAD = 2.0, 0.5
"""Standard deviation of the first element of a head's keys, which falls to a tenth of it, and of values."""
CALIBRATION_TOKENS = 2048

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a model of the Llama family."""

    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    inner: int = 14_336
    vocabulary: int = 128_256
    rope_base: float = 500_000.0
    most_tokens: int = 131_072


LLAMA_31_8B = Geometry()


# ---- the model's file


def write_model(path: Path, geometry: Geometry) -> None:
    """Write a GGUF file of random blocks, of the types that llama.cpp calls Q4_K_M."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, geometry)
    tensors = list(_tensors(geometry))
    for name, kind, shape in tensors:
        _, block, block_bytes = TYPES[kind]
        if kind == F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            packed = (shape[0], shape[1] // block * block_bytes)
            size_bytes, raw = packed[0] * packed[1], gguf.GGMLQuantizationType(kind)
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), size_bytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    panels = {kind: _random_blocks(kind) for kind in SCALE_PLACES}
    for number, (_name, kind, shape) in enumerate(tensors):
        if kind == F32:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            blocks = shape[0] * shape[1] // TYPES[kind][1]
            turned = np.roll(panels[kind], number, axis=0)  # else all layers would be alike
            writer.write_tensor_data(np.resize(turned, (blocks, TYPES[kind][2])))
    writer.close()


def _tensors(geometry: Geometry) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Name, type and shape ``[outputs, inputs]`` of every tensor, in the order of the file."""
    hidden, inner, heads_out = geometry.hidden, geometry.inner, geometry.heads * geometry.head_dim
    key_out, eighth = geometry.kv_heads * geometry.head_dim, geometry.layers // 8
    yield "token_embd.weight", Q4_K, (geometry.vocabulary, hidden)
    for layer in range(geometry.layers):
        outer = layer < eighth or layer >= 7 * geometry.layers // 8
        better = Q6_K if outer or (layer - eighth) % 3 == 2 else Q4_K
        for name, kind, shape in (
            ("attn_norm", F32, (hidden,)),
            ("attn_q", Q4_K, (heads_out, hidden)),
            ("attn_k", Q4_K, (key_out, hidden)),
            ("attn_v", better, (key_out, hidden)),
            ("attn_output", Q4_K, (hidden, heads_out)),
            ("ffn_norm", F32, (hidden,)),
            ("ffn_gate", Q4_K, (inner, hidden)),
            ("ffn_up", Q4_K, (inner, hidden)),
            ("ffn_down", better, (hidden, inner)),
        ):
            yield f"blk.{layer}.{name}.weight", kind, shape
    yield "output_norm.weight", F32, (hidden,)
    yield "output.weight", Q6_K, (geometry.vocabulary, hidden)


def _random_blocks(kind: int) -> NDArray[np.uint8]:
    """Blocks ``[PANEL_BLOCKS, bytes]`` of every code, with scales that give weights a deviation of some 0.02."""
    noise = np.random.default_rng(kind)
    found = noise.integers(0, 256, (PANEL_BLOCKS, TYPES[kind][2]), np.uint8)
    # Q4_K: (0 to 63) d (0 to 15) - (0 to 63) dmin, so dmin is 7.5 d; Q6_K: (-128 to 127) d (-32 to 31).
    scales = (1e-4, 7.5e-4) if kind == Q4_K else (1.5e-5,)
    for place, scale in zip(SCALE_PLACES[kind], scales, strict=True):
        found[:, place : place + 2] = np.array([scale], np.float16).view(np.uint8)
    return found


def _add_metadata(writer: Any, geometry: Geometry) -> None:
    """State the geometry, and a tokenizer of bytes and fillers."""
    from tokenizers import pre_tokenizers

    writer.add_context_length(geometry.most_tokens)
    writer.add_embedding_length(geometry.hidden)
    writer.add_block_count(geometry.layers)
    writer.add_feed_forward_length(geometry.inner)
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(geometry.rope_base)
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    words += [f"<{number}>" for number in range(len(words), geometry.vocabulary)]
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


# ---- contexts


def token_ids(count: int, vocabulary: int) -> list[int]:
    """Random tokens, without those that begin and end a text."""
    return list(map(int, np.random.default_rng(0).integers(2, vocabulary, count)))


def keys_values(parts: ModelParts, layer: int, part: int, tokens: int) -> torch.Tensor:
    """Random K (part 0) or V (part 1) of one layer, float16 ``[H_kv, tokens, d]``; the same at every call."""
    noise = torch.Generator().manual_seed(2 * layer + part)
    found = torch.randn(parts.kv_heads, tokens, parts.head_dim, generator=noise)
    found *= KEY_SPREAD * torch.linspace(1, 0.1, parts.head_dim) if part == 0 else VALUE_SPREAD
    return found.half()


class Layers:
    """K, V of a context by layer, made when they are asked for: what ``KVSwapCache.adopt`` reads of a full cache."""

    def __init__(self, parts: ModelParts, tokens: int) -> None:
        self._parts, self._tokens = parts, tokens

    def __getitem__(self, layer: int) -> Any:
        keys, values = (keys_values(self._parts, layer, part, self._tokens)[None].float() for part in (0, 1))
        return SimpleNamespace(keys=keys, values=values)


def calibrate(parts: ModelParts) -> None:
    """Store statistics of the random keys, and of random queries, in the place of a calibration."""
    found, noise = list[KeyCovariance](), torch.Generator().manual_seed(0)
    for layer in range(len(parts.offloaded)):
        each = KeyCovariance(parts.kv_heads, parts.head_dim)
        each.add(keys_values(parts, layer, 0, CALIBRATION_TOKENS).float().transpose(0, 1))
        each.add_queries(torch.randn(parts.query_heads, CALIBRATION_TOKENS, parts.head_dim, generator=noise))
        found.append(each)
    if problem := store_statistics(parts, found):
        raise SystemExit(problem)


def write_state(path: Path, parts: ModelParts, ids: list[int]) -> None:
    """Write K, V as ``llama_state_seq_save_file`` does for a float16 cache with flash attention: tokens, cells, K, V.

    llama.cpp rotates the elements of a head in pairs, where kvswap has halves.
    """
    with atomic_file(path) as file:
        file.write(struct.pack(f"<4sII{len(ids)}i", b"qsgg", 3, len(ids), *ids))
        file.write(struct.pack("<II", 1, len(ids)))  # one stream
        np.array([(position, 1, 0) for position in range(len(ids))], "<i4").tofile(file)
        file.write(struct.pack("<II", 0, len(parts.layers)))  # values are not transposed
        for part in (0, 1):
            for layer in range(len(parts.layers)):
                found = keys_values(parts, layer, part, len(ids))
                if part == 0:
                    found = torch.stack(found.chunk(2, dim=-1), dim=-1).flatten(-2)
                rows = found.transpose(0, 1).reshape(len(ids), -1).numpy()
                file.write(struct.pack("<IQ", 1, rows.shape[1] * rows.itemsize))
                rows.tofile(file)


def prepare(args: argparse.Namespace) -> None:
    """Write the file, and the contexts that are missing."""
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.file.exists():
        with atomic_file(args.file) as file:
            write_model(Path(file.name), LLAMA_31_8B)
    loaded = load_model(str(args.file), on_notice=print)
    parts = inspect(loaded.model)
    calibrate(parts)
    for tokens in args.context:
        ids = token_ids(tokens, parts.config.vocab_size)
        for program in PROGRAMS:
            place, started_s = stored(args.folder, program, tokens), time.perf_counter()
            if place.exists():
                continue
            if program == "kvswap":
                with Session.create(place.name, loaded) as session:
                    session.cache.adopt(SimpleNamespace(layers=Layers(parts, tokens)))
                    session.commit(ids)
            else:
                write_state(place, parts, ids)
            print(f"{program}: {tokens:,} tokens stored in {time.perf_counter() - started_s:.0f} s", flush=True)


def stored(folder: Path, program: str, tokens: int) -> Path:
    """Where a program's context lies."""
    if program == "kvswap":
        return session_path(None, f"context-{tokens}")
    return folder / f"context-{tokens}.state"


# ---- measuring


def put_out_of_page_cache(path: Path) -> None:
    """Have a file, or all files of a folder, read from the disk. Pages that are there count for no new limit."""
    for each in [path, *path.rglob("*")]:
        if each.is_file():
            with open(each, "rb") as file:
                os.fsync(file.fileno())  # only written pages can be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Run:
    """One program with one context, in a process of its own. ``row`` is its result."""

    def __init__(self, name: str, context: int, args: argparse.Namespace) -> None:
        self.name, self._context, self._args = name, context, args
        self.row: Row = {"program": name, "context": context, "outcome": "answers", "step_s": []}
        self.ids = token_ids(context + WARM_STEPS + args.turns * args.steps + 1, args.vocabulary)[context:]
        self._worker = Worker(name)

    def ask(self, do: str, **values: Any) -> Row:
        """Ask the program, unless it is gone; an end is its outcome."""
        if self.row["outcome"] == "ended":
            return {}
        started_s = time.perf_counter()
        try:
            return self._worker.ask(do, **values)
        except KVSwapError as error:
            self.row |= {"outcome": "ended", "how": str(error), "after_s": time.perf_counter() - started_s}
            return {}

    def open(self) -> None:
        """Load the model and the context, and take the first tokens."""
        place = stored(self._args.folder, self.name, self._context)
        put_out_of_page_cache(place)
        started_s = time.perf_counter()
        options = {"threads": self._args.threads, "config": {"kv_memory": self._args.kv_memory}}
        options |= dict.fromkeys(("model", "file"), str(self._args.file))
        self.row |= self.ask("load", context_tokens=self._context + len(self.ids), **options)
        self.row["load_s"] = time.perf_counter() - started_s
        self.row |= self.ask("resume", context=place.name if self.name == "kvswap" else str(place))
        self.row["first_step_s"] = sum(self.ask("steps", tokens=self.ids[:1]).get("step_s", []))
        self.ask("steps", tokens=self.ids[1 : 1 + WARM_STEPS])

    def turn(self, number: int) -> None:
        """Take the tokens of one turn."""
        first = 1 + WARM_STEPS + number * self._args.steps
        time.sleep(PAUSE_S)
        found = self.ask("steps", tokens=self.ids[first : first + self._args.steps])
        if found:
            self.row["step_s"].append([round(each, 6) for each in found["step_s"]])

    def close(self) -> None:
        """Note memory and counters, and end the program."""
        self.row |= self.ask("memory")
        if self.name == "kvswap":
            self.row["stats"] = self.ask("stats")
        self._worker.close()
        if self.row["step_s"]:
            step_s = statistics.median(chain.from_iterable(self.row["step_s"]))
            self.row |= {"median_step_s": step_s, "decode_tokens_per_s": 1 / step_s}
        elif self.row["outcome"] == "answers":
            self.row["outcome"] = "too slow"


def measure(context: int, args: argparse.Namespace) -> list[Row]:
    """Measure every program at one context, in turns whose order changes; one row each."""
    started_s, limit = time.perf_counter(), memory_limit()
    put_out_of_page_cache(args.file)
    with ExitStack() as stack:
        runs = [stack.enter_context(closing(Run(name, context, args))) for name in args.programs]
        for run in runs:
            run.open()
        for number in range(args.turns):
            if time.perf_counter() - started_s > args.patience:
                break
            for run in runs if number % 2 == 0 else runs[::-1]:
                run.turn(number)
    for run in runs:
        run.row["memory_limit_bytes"] = limit.limit_bytes if limit else None
    return [run.row for run in runs]


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="the model; contexts lie in a folder beside it")
    parser.add_argument("--context", default="8192,16384", metavar="N,...")
    parser.add_argument("--prepare", action="store_true", help="write what is missing, and measure nothing")
    parser.add_argument("--only", choices=PROGRAMS, help="measure one program")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=300, metavar="S", help="no turn begins after these seconds")
    parser.add_argument("--kv-memory", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.context = [int(each) for each in args.context.split(",")]
    args.programs = [args.only] if args.only else list(PROGRAMS)
    args.folder = args.file.with_suffix("")
    os.environ[VARIABLE] = str(args.folder / "kvswap")  # the calibration must not be taken for a real one
    if args.prepare:
        prepare(args)
        return
    for path in [args.file, *(stored(args.folder, name, each) for name in args.programs for each in args.context)]:
        if not path.exists():
            raise SystemExit(f"{path} is missing: run with --prepare first")
    file = GgufFile(args.file)
    args.vocabulary = len(file.metadata["tokenizer.ggml.tokens"])
    identity = {"model": args.file.name, "model_bytes": args.file.stat().st_size, "threads": args.threads}
    empty = {"format": 1, "identity": identity, "environment": {"machine": {}}, "results": []}
    content = read_results(args.json, empty, kind="a run at real size") if args.json else empty
    content["environment"]["machine"] = dataclasses.asdict(describe_machine())
    for context in args.context:
        for row in measure(context, args):
            print(json.dumps(row), flush=True)
            others = [each for each in content["results"] if any(each[key] != row[key] for key in KEYS)]
            content["results"] = [*others, row]
        if args.json:
            write_json(args.json, content)


if __name__ == "__main__":
    main()
