from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvswap.errors import ConfigError
from kvswap.units import GIB, KIB, MIB, format_bytes, format_parts, format_rate, format_s, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24MiB", 24 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("500MB", 500_000_000),
        ("2kb", 2000),
        ("3 gb", 3_000_000_000),
        (" 7 k ", 7 * KIB),
        ("8M", 8 * MIB),
        ("1g", GIB),
        ("12b", 12),
        ("4096", 4096),
        (4096, 4096),
    ],
)
def test_sizes_with_units(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "MiB", "0", 0, "0.2", "-1MiB", -5, "1TiB", "1e9", "1,5GiB", "1 2", "nan", "inf", True]
)
def test_what_is_no_size_is_refused_with_its_name(text: str | int) -> None:
    with pytest.raises(ConfigError, match=r"kv_memory: .*24MiB") as caught:
        parse_bytes(text, name="kv_memory")
    assert repr(text) in str(caught.value)


def test_a_size_past_all_numbers_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_bytes("9" * 400)


@given(st.integers(min_value=1, max_value=1 << 53))
def test_whole_counts_are_exact(count: int) -> None:
    assert parse_bytes(count) == count
    assert parse_bytes(str(count)) == count


@given(st.integers(min_value=1, max_value=1 << 50))
def test_printed_sizes_mean_what_they_print(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= 0.05 * count + 1


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (20.4 * MIB, "20.4 MiB"),
        (GIB, "1.0 GiB"),
        (-2 * MIB, "-2.0 MiB"),
    ],
)
def test_bytes_for_people(count: float, expected: str) -> None:
    assert format_bytes(count) == expected


@pytest.mark.parametrize(("rate", "expected"), [(226e6, "226 MB/s"), (1.804e9, "1.80 GB/s"), (0.0, "0 MB/s")])
def test_rates_count_in_powers_of_ten(rate: float, expected: str) -> None:
    assert format_rate(rate) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.85, "850 ms"), (12.34, "12.3 s"), (119.0, "119.0 s"), (125.9, "2 min 5 s")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert format_s(seconds) == expected


def test_parts_come_largest_first_without_empty_ones() -> None:
    parts = {"write_queue": MIB, "sketch": 10 * MIB, "slots": 0}
    assert format_parts(parts) == "sketch 10.0 MiB, write queue 1.0 MiB"
