"""Methods with their own configuration: names, refused files, identity of results, and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvswap.config import Config
from kvswap.disk.json_files import read_results
from kvswap.errors import ConfigError
from kvswap.lab.bench.results import summarise
from kvswap.lab.bench.variants import Variant, read_variants
from kvswap.lab.tables import variant_lines
from kvswap.tuning.solution import TunedConfig
from tests.tuning.test_solution import solution

PLACE = {"batch": 8, "context": 4096}
ROOT = Path(__file__).parents[2]


def settings(folder: Path, name: str = "wide.json", **values: object) -> Path:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values))
    return file


def tuned(folder: Path) -> Path:
    solutions = [
        solution(1, 4096, kv_memory=1 << 24, kv_dir="/elsewhere"),
        solution(8, 4096, kv_memory=1 << 27, group_tokens=8, layer_select_tokens=None),
    ]
    found = TunedConfig(model="tiny", fingerprint="abc", made="now", disk="ext4", prefer="speed", solutions=solutions)
    found.save(folder / "tuned.json")
    return folder / "tuned.json"


def only(text: str, kv_memory: str | None = None, kv_dir: str | None = None) -> Variant:
    (name,), (variant,) = read_variants([text], kv_memory=kv_memory, kv_dir=kv_dir)
    assert variant.name == name
    return variant


def test_names_are_method_and_stem_without_duplicates(tmp_path: Path) -> None:
    file = settings(tmp_path, select_tokens=500)
    again = f"{tmp_path}/../{tmp_path.name}/wide.json"
    methods = ["window", f"kvswap@{file}", f"kvswap-paper@{file}", f"kvswap@{again}", "window"]
    names, variants = read_variants(methods, kv_memory=None, kv_dir=None)
    assert names == ["window", "kvswap@wide", "kvswap-paper@wide"]
    assert [(each.name, each.method) for each in variants] == [
        ("kvswap@wide", "kvswap"),
        ("kvswap-paper@wide", "kvswap-paper"),
    ]


def test_limit_and_folder_of_the_command_line_apply_to_all(tmp_path: Path) -> None:
    file = settings(tmp_path, kv_memory="8MiB", kv_dir="/elsewhere", group_tokens=8)
    assert only(f"kvswap@{file}").config(PLACE) == Config(kv_memory="8MiB", group_tokens=8)
    given = only(f"kvswap@{file}", kv_memory="auto", kv_dir="/data").config(PLACE)
    assert given == Config(kv_memory="auto", kv_dir="/data", group_tokens=8)
    assert only(f"kvswap@{settings(tmp_path, 'empty.json')}").config(PLACE) == Config()


def test_a_tuned_file_gives_the_solution_for_batch_and_context(tmp_path: Path) -> None:
    variant = only(f"kvswap@{tuned(tmp_path)}")
    one, eight = variant.config({"batch": 1, "context": 4000}), variant.config(PLACE)
    assert (one.group_tokens, one.layer_select_tokens, one.kv_memory, one.kv_dir) == (4, (200, 400), 1 << 24, None)
    assert (eight.group_tokens, eight.layer_select_tokens, eight.kv_memory) == (8, None, 1 << 27)
    assert only(f"kvswap@{tuned(tmp_path)}", kv_memory="1MiB").config(PLACE).kv_memory == "1MiB"
    variant.check_model("abc")
    with pytest.raises(ConfigError, match="kvswap@tuned: the configuration was tuned for another model, tiny"):
        variant.check_model("xyz")


def test_identity_covers_every_setting_and_no_folder(tmp_path: Path) -> None:
    text = f"kvswap@{settings(tmp_path, select_tokens=500, kv_dir='/a', layer_select_tokens=[300, 500])}"
    first = only(text).identity()
    assert first == json.loads(json.dumps(first)) == {"select_tokens": 500, "layer_select_tokens": [300, 500]}
    assert only(text, kv_dir="/b").identity() == first
    assert only(text, kv_memory="9MiB").identity() != first
    settings(tmp_path, select_tokens=501)
    assert only(text).identity() != first
    places = [(each["batch"], each["context"]) for each in only(f"kvswap@{tuned(tmp_path)}").identity()]
    assert places == [(1, 4096), (8, 4096)]


@pytest.mark.parametrize(
    ("method", "content", "words"),
    [
        ("magic@{}", "{}", "method: got 'magic'"),
        ("kvswap@", "{}", "no file after @; write for example kvswap@tuned.json"),
        ("full@{}", "{}", "full has no configuration; use one of kvswap, "),
        ("kvswap@{}.absent", "{}", "No such file"),
        ("kvswap@{}", "{", "config file"),
        ("kvswap@{}", "[]", "not a JSON object"),
        ("kvswap@{}", '{"group_token": 4}', "x.json: unknown config key 'group_token'; did you mean 'group_tokens'"),
        ("kvswap@{}", '{"format": "kvswap-tuned", "version": 2}', "damaged"),
    ],
)
def test_mistakes_are_errors_with_a_hint(method: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_variants([method.format(tmp_path / "x.json")], kv_memory=None, kv_dir=None)
    assert words in str(caught.value) and caught.value.hint


def test_two_files_of_one_stem_are_refused(tmp_path: Path) -> None:
    files = settings(tmp_path), settings(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"would both be called wide in the results; rename"):
        read_variants([f"kvswap@{files[0]}", f"kvswap-paper@{files[1]}"], kv_memory=None, kv_dir=None)


def test_in_files_older_than_a_setting_it_has_its_default(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    values = Config(select_tokens=400).to_dict()
    file.write_text(json.dumps({"format": 1, "identity": {"config": {"select_tokens": 400}}}))

    def read(config: dict[str, object], older: dict[str, object] | None) -> object:
        return read_results(file, {"format": 1, "identity": {"config": config}}, kind="a test", older=older)

    assert read(values, {"config": values})
    for other, older in (({**values, "select_tokens": 500}, values), ({**values, "read_depth": 8}, values)):
        with pytest.raises(ConfigError, match="its config differ"):
            read(other, {"config": older})
    with pytest.raises(ConfigError, match="its config differ"):
        read(values, None)
    file.write_text(json.dumps({"format": 1, "identity": []}))
    with pytest.raises(ConfigError, match="damaged: identity"):
        read(values, {"config": values})


def test_tables_say_what_was_changed_and_where() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "bench-smollm2-4k-batch8-emmc.json").read_text())
    ours = next(record for record in content["records"] if record["method"] == "kvswap")
    assert variant_lines(summarise([each for each in content["records"] if "@" not in each["method"]])) == []
    wide = {**ours, "method": "kvswap@wide", "config": {"group_tokens": 8}}
    plain = {**ours, "method": "kvswap@plain", "config": {}}
    layers = {**wide, "context": 8192, "config": {"layer_select_tokens": [200, 600, 400]}}
    assert variant_lines(summarise([ours, wide, {**wide, "context": 1024}, plain])) == [
        "`kvswap@wide`: group_tokens 8.",
        "`kvswap@plain`: all defaults.",
    ]
    assert variant_lines(summarise([wide, layers])) == [
        "`kvswap@wide` at 8 x 4,096 tokens: group_tokens 8.",
        "`kvswap@wide` at 8 x 8,192 tokens: layer_select_tokens 200 to 600.",
    ]
