"""The search for tiles: which wins, what is remembered, what a broken cache does. No GPU."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from interpreter import run_python

from moso_fast.backends.triton import autotune
from moso_fast.backends.triton.autotune import TileCache, cache_folder, cache_name, kind

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


@dataclass(frozen=True)
class Tile:
    rows: int
    num_warps: int = 4


TILES = (Tile(16), Tile(32), Tile(64))


class Bench:
    """Launches that take as long as they are told, in a time of their own."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.seconds = {rows: list(times) for rows, times in seconds.items()}
        self.launches: list[int] = []

    def launch(self, tile: Tile) -> None:
        self.launches.append(tile.rows)

    def timer(self, work) -> float:
        work()
        times = self.seconds[self.launches[-1]]
        return times.pop(0) if len(times) > 1 else times[0]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "tiles.json"


def pick(cache: TileCache, bench: Bench, key: str = "k", tiles=TILES) -> Tile:
    return cache.pick(key, tiles, tiles[0], bench.launch, bench.timer)


def test_the_median_decides_not_the_best_run(path) -> None:
    bench = Bench({16: [3.0], 32: [0.1, 0.1, 5.0], 64: [2.0]})
    assert pick(TileCache(path), bench) == Tile(64)
    # One launch each to compile, then in turn.
    assert bench.launches[:9] == [16, 32, 64] * 3
    assert json.loads(path.read_text()) == {"k": {"rows": 64, "num_warps": 4}}
    assert os.listdir(path.parent) == [path.name]  # nothing temporary is left


def test_a_winner_on_record_is_not_timed_again(path) -> None:
    first = TileCache(path)
    pick(first, Bench({16: [3.0], 32: [1.0], 64: [2.0]}))
    for cache in (first, TileCache(path)):
        silent = Bench({})
        assert pick(cache, silent) == Tile(32)
        assert not silent.launches


def test_kinds_are_kept_apart_and_processes_add_up(path) -> None:
    one, other = TileCache(path), TileCache(path)
    pick(one, Bench({16: [3.0], 32: [1.0], 64: [2.0]}), "a")
    pick(other, Bench({16: [1.0], 32: [3.0], 64: [2.0]}), "b")
    both = TileCache(path)
    assert pick(both, Bench({}), "a") == Tile(32)
    assert pick(both, Bench({}), "b") == Tile(16)


def test_a_tile_that_is_no_longer_shipped_is_searched_for_anew(path) -> None:
    pick(TileCache(path), Bench({16: [3.0], 32: [1.0], 64: [2.0]}))
    fewer = (Tile(16), Tile(64))
    bench = Bench({16: [3.0], 64: [2.0]})
    assert pick(TileCache(path), bench, tiles=fewer) == Tile(64)
    assert bench.launches


def test_a_tile_that_the_device_refuses_is_passed_over(path) -> None:
    from triton.runtime.errors import OutOfResources

    bench = Bench({16: [3.0], 64: [2.0]})

    def launch(tile: Tile) -> None:
        if tile.rows == 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        bench.launch(tile)

    cache = TileCache(path)
    assert cache.pick("k", TILES, TILES[0], launch, bench.timer) == Tile(64)

    def never(tile: Tile) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert cache.pick("other", TILES, TILES[1], never, bench.timer) == TILES[1]
    assert "other" not in json.loads(path.read_text())
    with pytest.raises(ZeroDivisionError):  # any other error is the caller's to see
        cache.pick("third", TILES, TILES[0], lambda tile: 1 // 0, bench.timer)


def test_a_single_candidate_is_not_timed(path) -> None:
    bench = Bench({})
    assert pick(TileCache(path), bench, tiles=TILES[:1]) == Tile(16)
    assert not bench.launches and not path.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'{"k": 3}', b"\xff\xfe\x00", b"null"])
def test_a_corrupt_cache_gives_one_warning_and_a_fresh_search(path, content) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"tiles\.json cannot be read") as caught:
        found = pick(TileCache(path), Bench({16: [3.0], 32: [1.0], 64: [2.0]}))
    assert found == Tile(32) and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick(TileCache(path), Bench({})) == Tile(32)


def test_a_folder_in_its_place_warns_and_still_picks(path) -> None:
    path.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        cache = TileCache(path)
    with pytest.warns(RuntimeWarning, match="cannot be kept .* MOSO_FAST_CACHE"):
        assert pick(cache, Bench({16: [3.0], 32: [1.0], 64: [2.0]})) == Tile(32)
    assert pick(cache, Bench({})) == Tile(32)  # remembered for this process


def test_kinds_are_buckets() -> None:
    assert kind("a", 100, 512, torch.bfloat16) == kind("a", 128, 400, torch.bfloat16)
    distinct = {
        kind(*arguments)
        for arguments in (
            ("a", 100, 512, "x"), ("b", 100, 512, "x"), ("a", 129, 512, "x"),
            ("a", 100, 513, "x"), ("a", 100, 512, "y"), ("a", 1, 1),
        )
    }  # fmt: skip
    assert len(distinct) == 6


def test_the_file_is_of_one_gpu_one_triton_and_one_source(monkeypatch) -> None:
    name = cache_name("NVIDIA H200", "3.9.0")
    assert name.startswith("tiles-nvidia-h200-triton-3.9.0-") and name.endswith(".json")
    monkeypatch.setattr(autotune, "_source_hash", lambda: "other")
    others = {cache_name("NVIDIA H200", "3.9.0"), cache_name("NVIDIA H200", "3.6.0"),
              cache_name("NVIDIA A100", "3.9.0")}  # fmt: skip
    assert name not in others and len(others) == 3


def test_source_hash_follows_every_kernel_file(monkeypatch, tmp_path) -> None:
    import moso_fast.kernels.common as kernels

    (tmp_path / "common.py").write_text("a = 1\n")
    (tmp_path / "other.py").write_text("b = 1\n")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "common.py"))
    hashes = [autotune._source_hash.__wrapped__()]
    (tmp_path / "other.py").write_text("b = 2\n")
    hashes.append(autotune._source_hash.__wrapped__())
    (tmp_path / "third.py").write_text("")
    hashes.append(autotune._source_hash.__wrapped__())
    assert len(set(hashes)) == 3


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("MOSO_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "moso_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "moso_fast"
    monkeypatch.setenv("MOSO_FAST_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_times_are_taken_on_the_device_of_the_work(monkeypatch) -> None:
    """Not on the current one, behind a pause in which the host launches; unused, without memory."""
    current = [torch.device("cuda", 0)]
    said = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append(current[-1])

        def synchronize(self) -> None:
            said.append("waited")

        def elapsed_time(self, end: Event) -> float:
            return 2000.0

    @contextmanager
    def device(chosen: torch.device):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("paused"), raising=False)
    taken = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda size, dtype, device: taken.append((size, device)) or empty(1)
    )
    second = torch.device("cuda", 1)
    timer = autotune.device_timer(second)
    assert not taken
    assert timer(lambda: said.append("worked")) == 2.0
    assert said == ["paused", second, "worked", second, "waited"] and taken[0][1] == second
    assert taken[0][0] >= 2**28


def test_searches_only_on_request_and_only_on_a_gpu(monkeypatch, path) -> None:
    bench = Bench({16: [3.0], 32: [1.0], 64: [2.0]})
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(autotune, "cache_of", lambda device: TileCache(path))
    monkeypatch.setattr(autotune, "device_timer", lambda device: bench.timer)

    def found(device: str) -> Tile:
        return autotune.tile_for(torch.device(device), "k", TILES, TILES[0], bench.launch)

    monkeypatch.delenv("MOSO_FAST_AUTOTUNE", raising=False)
    assert found("cuda") == TILES[0] and not bench.launches
    monkeypatch.setenv("MOSO_FAST_AUTOTUNE", "1")
    assert found("cpu") == TILES[0] and not bench.launches
    capturing = True
    assert found("cuda") == TILES[0] and not bench.launches
    capturing = False
    assert found("cuda") == Tile(32)


@pytest.mark.exhaustive
def test_importing_it_imports_no_triton(tmp_path: Path) -> None:
    code = (
        "import sys, moso_fast.backends.triton.autotune; "
        "sys.exit('triton' in sys.modules and 'Triton was imported')"
    )
    run_python(code, tmp_path)
