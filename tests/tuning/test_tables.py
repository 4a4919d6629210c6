"""Tables: interpolation, bounds, selection by layer, the file, and the refusal of another model's tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from kvswap.core.calibration import CALIBRATION_TOKENS
from kvswap.errors import ConfigError, InputError
from kvswap.tuning.machine import version_of
from kvswap.tuning.measure_tables import settings_to_measure, stretches
from kvswap.tuning.tables import (
    GROUPS,
    LEAST_SHARE,
    MOST_SHARE,
    Quality,
    SketchSize,
    Tables,
    TablesFacts,
    groups_by_layer,
    load_tables,
    prediction_bound,
    sketch_sizes,
)

D, LAYERS, CONTEXTS = 192, 4, (1024, 8192)
DEFAULT = sketch_sizes(D)[0]
TEXT_FACTORS = (0.5, 1.5)
"""KL of each text relative to ``true_kl``; the mean is 1."""


def true_kl(tokens: int, sketch: SketchSize, group: int, select: int, by_layer: bool) -> float:
    """KL as a product of powers, the form for which interpolation is exact."""
    rough = {4: 1.0, 2: 1.5}[sketch.bits] * (DEFAULT.token_bytes / sketch.token_bytes) ** 0.5
    return 0.01 * (tokens / 8192) ** 0.5 * rough * group**0.4 * (400 / select) ** 2 * (0.8 if by_layer else 1.0)


def tables(**changes: object) -> Tables:
    qualities = [
        Quality(
            tokens=tokens,
            rank=each.sketch.rank,
            bits=each.sketch.bits,
            group_tokens=each.group_tokens,
            select_tokens=each.select_tokens,
            by_layer=each.by_layer,
            kl_by_text=[
                factor * true_kl(tokens, each.sketch, each.group_tokens, each.select_tokens, each.by_layer)
                for factor in TEXT_FACTORS
            ],
        )
        for tokens in CONTEXTS
        for each in settings_to_measure(D)
    ]
    facts = TablesFacts(
        model="tiny",
        fingerprint="abc",
        kvswap_version=version_of("kvswap"),
        text="none",
        texts=2,
        steps=4,
        contexts=list(CONTEXTS),
        qualities=qualities,
    )
    random = np.random.default_rng(0)
    rankings, kept = {}, {}
    for tokens in CONTEXTS:
        for group in GROUPS:
            groups, width = tokens // group, min(tokens // group, 1600 // group)
            skew = random.exponential(1.0, (8, LAYERS, groups)) * np.exp(-np.arange(groups) * group / 600)
            rankings[tokens, group] = (-skew).argsort(axis=2)[:, :, :width].astype(np.int32)
            rankings[tokens, group] = rankings[tokens, group].reshape(2, 4, LAYERS, width)
            line = 1 - np.exp(-np.outer([0.02, 0.01, 0.004, 0.001], np.arange(width + 1) * group))
            kept[tokens, group] = line.astype(np.float32)
    return Tables(dataclasses.replace(facts, **changes), rankings, kept)


@pytest.mark.parametrize("tokens", [1024, 2900, 8192])
@pytest.mark.parametrize("sketch", sketch_sizes(D))
@pytest.mark.parametrize("group", GROUPS)
def test_quality_is_interpolated(tokens: int, sketch: SketchSize, group: int) -> None:
    for select, by_layer in ((200, False), (300, True), (400, False), (800, True)):
        found = tables().kl(tokens, sketch, group, select, by_layer=by_layer)
        assert found.expected == pytest.approx(true_kl(tokens, sketch, group, select, by_layer), rel=1e-6)


def test_quality_outside_the_contexts_is_that_of_the_nearest() -> None:
    assert tables().kl(32768, DEFAULT, 4, 400, by_layer=False) == tables().kl(8192, DEFAULT, 4, 400, by_layer=False)


def changed(found: Tables, change: Callable[[Quality], list[float]]) -> Tables:
    """The same tables with other KLs."""
    qualities = [dataclasses.replace(each, kl_by_text=change(each)) for each in found.facts.qualities]
    facts = dataclasses.replace(found.facts, qualities=qualities, texts=len(qualities[0].kl_by_text))
    return dataclasses.replace(found, facts=facts)


def test_no_text_dominates_a_ratio() -> None:
    """One text has a hundred times the KL of the others, and its KL does not depend on the group size."""

    def change(each: Quality) -> list[float]:
        ordinary = 0.01 * each.group_tokens**0.4
        return [ordinary, ordinary, ordinary, 1.0]

    odd = changed(tables(), change)
    four, sixteen = (odd.kl(8192, DEFAULT, group, 400, by_layer=False).expected for group in (4, 16))
    assert sixteen / four == pytest.approx(4 ** (0.4 * 3 / 4), rel=1e-6)
    assert four == pytest.approx((3 * 0.01 * 4**0.4 + 1.0) / 4, rel=1e-6)  # the level is the mean over texts
    plain = (3 * 0.01 * 16**0.4 + 1.0) / (3 * 0.01 * 4**0.4 + 1.0)
    assert sixteen / four > 1.4 > plain


def test_nine_of_ten_unseen_texts_stay_below_the_bound() -> None:
    """Texts from a log-normal distribution: six measured ones and one unseen one, a thousand times."""
    random, kept = np.random.default_rng(1), 0
    for _ in range(1000):
        *seen, new = np.exp(random.normal(-4.5, 0.7, 7))
        kept += new < math.exp(prediction_bound(np.log(seen)))
    assert 0.87 <= kept / 1000 <= 0.93
    logs = np.log([0.005, 0.01, 0.02, 0.03])
    one_text_more = changed(tables(), lambda each: [math.exp(each) for each in logs])
    found = one_text_more.kl(4096, DEFAULT, 4, 400, by_layer=False)
    assert found.bound == pytest.approx(math.exp(prediction_bound(logs)))
    assert found.expected == pytest.approx(np.exp(logs).mean()) and found.bound > 2 * found.expected


def test_bounds_between_contexts_keep_the_spread_of_texts() -> None:
    """Each text is difficult at one of two contexts, so texts interpolated between them would look alike."""
    low, high = sorted(tables().facts.contexts)[:2]
    swapped = changed(tables(), lambda each: [0.01, 0.04, 0.02] if each.tokens == low else [0.04, 0.01, 0.02])
    there, between = (
        swapped.kl(tokens, DEFAULT, 4, 400, by_layer=False) for tokens in (low, round(math.sqrt(low * high)))
    )
    assert between.bound == pytest.approx(there.bound, rel=1e-3)


@pytest.mark.parametrize(("count", "t"), [(2, 3.078), (3, 1.886), (6, 1.476), (11, 1.372), (31, 1.310)])
def test_the_bound_is_that_of_student(count: int, t: float) -> None:
    values = np.random.default_rng(count).normal(0, 1, count)
    expected = values.mean() + t * values.std(ddof=1) * math.sqrt(1 + 1 / count)
    within = 0.05 if count == 2 else 0.004
    assert prediction_bound(values) - values.mean() == pytest.approx(expected - values.mean(), rel=within)


def test_sketch_sizes_stay_within_their_bytes() -> None:
    found = sketch_sizes(1024)
    assert [each.token_bytes <= 1024 // share * 2 for each, share in zip(found, (8, 4, 16, 32, 8, 16, 32), strict=True)]
    assert len(set(found)) == len(found) == 7


@pytest.mark.parametrize("spare", [0, 300, 100_000])
def test_texts_follow_the_tokens_of_the_basis_and_force_different_tokens(spare: int) -> None:
    ids = list(range(CALIBRATION_TOKENS + 1008 + 3 * 8 + spare))
    texts = stretches(ids, 4, prompt_tokens=1000, steps=8)
    assert [len(each) for each in texts] == [1008] * 4 and texts[0][0] == CALIBRATION_TOKENS
    forced = [token for each in texts for token in each[1000:]]
    assert len(set(forced)) == 4 * 8
    assert (len(set().union(*texts)) == 4 * 1008) == (spare == 100_000)  # nothing overlaps where there is room


def test_too_little_text_for_tables_is_an_error() -> None:
    ids = [0] * (CALIBRATION_TOKENS + 1008 + 3 * 8 - 1)
    with pytest.raises(InputError, match=f"has {len(ids):,} tokens, {len(ids) + 1:,} are needed"):
        stretches(ids, 4, prompt_tokens=1000, steps=8)


def test_round_trip(tmp_path: Path) -> None:
    saved = tables()
    saved.save(tmp_path / "new" / "t.safetensors")
    found = load_tables(tmp_path / "new" / "t.safetensors", "abc", LAYERS)
    assert found.facts == saved.facts
    for key, ranking in saved.rankings.items():
        assert (found.rankings[key] == ranking).all() and (found.kept[key] == saved.kept[key]).all()


def test_tables_of_another_model_or_version_are_refused_unless_forced(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    tables().save(file)
    with pytest.raises(ConfigError, match=r"computed for model tiny.*--force"):
        load_tables(file, "xyz", LAYERS)
    assert load_tables(file, "xyz", LAYERS, force=True).facts.model == "tiny"
    with pytest.raises(ConfigError, match="4 layers, the model has 5"):
        load_tables(file, "xyz", 5, force=True)
    tables(kvswap_version="0.0.1").save(file)
    with pytest.raises(ConfigError, match=r"computed for kvswap 0.0.1"):
        load_tables(file, "abc", LAYERS)


def test_damaged_tables_are_refused_with_a_message(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    tables().save(file)
    content, tensors = file.read_bytes(), load_file(file)
    about = {"format": "kvswap-tables", "version": 5, **dataclasses.asdict(tables().facts)}

    def write(about: object, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, file, metadata={"kvswap": json.dumps(about)})

    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="damaged"):
        load_tables(file, "abc", LAYERS)
    with pytest.raises(ConfigError, match="No such file"):
        load_tables(tmp_path / "absent", "abc", LAYERS)
    for changed, words in (
        ({**about, "format": "x"}, "not a kvswap-tables file"),
        ({**about, "version": 2}, "version 2, this kvswap reads 5"),
        ({**about, "version": 3}, "version 3, this kvswap reads 5"),
        ({**about, "qualities": []}, "nothing was measured"),
        ({**about, "qualities": [{**about["qualities"][0], "kl_by_text": [0.1]}]}, "KL of 1 texts"),
        ({**about, "qualities": [{**about["qualities"][0], "kl_by_text": [0.1, float("nan")]}]}, "KL of 2 texts"),
        ({**about, "steps": "many"}, "steps"),
        (None, "not a kvswap-tables file"),
    ):
        write(changed, tensors)
        with pytest.raises(ConfigError, match=words):
            load_tables(file, "abc", LAYERS)
    broken = {**tensors, "ranking.1024.4": tensors["ranking.1024.4"] - 5000}
    write(about, broken)
    with pytest.raises(ConfigError, match="ranking of 1024 tokens, G = 4"):
        load_tables(file, "abc", LAYERS)


def concentrated(sharpness: list[float], width: int = 200) -> np.ndarray:
    """Mass kept by the best groups of layers whose attention falls exponentially at these rates."""
    ranks = np.arange(width)
    mass = np.exp(-np.outer(sharpness, ranks))
    mass /= mass.sum(axis=1, keepdims=True)
    return np.concatenate((np.zeros((len(sharpness), 1)), mass.cumsum(axis=1)), axis=1).astype(np.float32)


def test_diffuse_layers_get_more_and_together_keep_more() -> None:
    kept = concentrated([0.2, 0.02, 0.005])
    found = groups_by_layer(kept, 50)
    assert found[0] < found[1] <= found[2] and sum(found) <= 150
    by_layer = sum(float(kept[layer, count]) for layer, count in enumerate(found))
    assert by_layer > float(kept[:, 50].sum())


def test_equal_layers_get_the_same() -> None:
    assert groups_by_layer(concentrated([0.03] * 4), 50) == [50] * 4


@given(
    arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(30, 90)), elements=st.floats(0, 1, width=32)),
    st.integers(1, 29),
)
def test_layers_stay_within_their_bounds_and_the_total(gains: np.ndarray, mean: int) -> None:
    found = groups_by_layer(gains.cumsum(axis=1, dtype=np.float32), mean)
    assert len(found) == len(gains) and sum(found) <= mean * len(gains)
    assert all(max(1, int(LEAST_SHARE * mean)) <= count <= max(1, int(MOST_SHARE * mean)) for count in found)
