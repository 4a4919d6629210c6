"""``kvswap profile``: a table, a file that loads, a plot, and mistakes that are found before measuring."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from kvswap.cli.main import run_command
from kvswap.errors import ConfigError
from kvswap.models.loading import LoadedModel
from kvswap.tuning import measure_disk as disk_costs
from kvswap.tuning import profile
from kvswap.tuning.profile import load_profile
from kvswap.units import MIB

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure the disk in a second."""
    measure = functools.partial(disk_costs.measure_disk, point_s=0.001, file_bytes=16 * MIB)
    monkeypatch.setattr(profile, "measure_disk", measure)


def test_disk_alone(tmp_path, capfd):
    words = ["profile", "--kv-dir", tmp_path / "kv", "--json", tmp_path / "p.json", "--plot", tmp_path / "p.png"]
    assert run_command([str(word) for word in words]) == 0
    out, err = capfd.readouterr()
    assert "random reads" in out and "80 % of the best read rate" in out and "measuring the disk: 100%" in err
    found = load_profile(tmp_path / "p.json", str(tmp_path / "kv"))
    assert found.model is None and {point.depth for point in found.disk.bursts} == set(disk_costs.DEPTHS)
    rates = {(point.read_bytes, point.depth): point.bytes_per_s for point in found.disk.bursts}
    assert rates[MIB, 16] > rates[found.disk.alignment_bytes, 1]
    short = [point for point in found.disk.bursts if point.read_bytes <= max(disk_costs.PACED_SIZES)]
    assert [(each.read_bytes, each.depth) for each in found.disk.paced] == [(e.read_bytes, e.depth) for e in short]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path / "kv") == []


def test_with_a_model(tiny, tmp_path, cache_home, capfd):
    assert run_command(["profile", "--model", str(tiny), "--kv-dir", str(tmp_path / "kv")]) == 0
    out = capfd.readouterr().out
    target = Path(out.rsplit("written to ", 1)[1].strip())
    assert target.is_relative_to(cache_home) and "prediction of a layer at 4,096 tokens" in out
    found = load_profile(target, str(tmp_path / "kv"))
    costs = found.costs
    assert costs is not None and found.model is not None and found.model.layers == 3
    assert costs.prefill_tokens_per_s > 0 and costs.outside_s > 0
    assert costs.compute.base_s > 0 and costs.slots.base_s > 0 and costs.submit.base_s > 0
    assert costs.predict_s(16384, 16, 4) > costs.predict_s(1024, 16, 4) > 0


def test_the_model_has_the_weights_that_were_asked_for(tiny, tmp_path, monkeypatch, capfd):
    def take(kv_dir: str, loaded: LoadedModel, **_: object) -> None:
        raise ConfigError(f"profiled with {loaded.weights}")

    monkeypatch.setattr(profile, "take_profile", take)
    assert run_command(["profile", "--model", str(tiny), "--kv-dir", str(tmp_path), "--weights", "q8"]) == 2
    assert "profiled with q8" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "q8"], "--weights or --no-mmap without --model"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json: cannot be written"),
        (["--plot", "."], "--plot .: a directory"),
        (["--model", "./absent"], "./absent: no such file or directory"),
        (["--kv-dir", __file__], "is a file"),
        (["--kv-dir", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_mistakes_are_one_line_on_stderr(words, message, capfd):
    assert run_command(["profile", *words]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1 and message in err


def test_plot_without_its_extra(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("kvswap.tuning.plots.importlib.util.find_spec", lambda name: None)
    assert run_command(["profile", "--plot", str(tmp_path / "p.png")]) == 2
    assert "pip install 'kvswap[plots]'" in capfd.readouterr().err


def test_a_full_disk_is_an_error(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(disk_costs, "free_bytes", lambda path: 1000)
    assert run_command(["profile", "--kv-dir", str(tmp_path / "kv")]) == 2
    assert "free some space" in capfd.readouterr().err
