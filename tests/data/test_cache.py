"""The cache between processes. Oracle: what each rank is told to do, and the folder's state afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunery.data.cache import CacheEntry, cache_folder, file_digest, key_of, rank
from tunery.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "cache"))


def test_the_folder_and_the_rank_come_from_the_environment(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TUNERY_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "tunery"
    monkeypatch.setenv("RANK", "3")
    assert rank() == 3
    monkeypatch.delenv("RANK")
    assert rank() == 0


def test_keys_differ_by_value_not_by_order(tmp_path):
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_an_entry_is_whole_or_absent():
    entry = CacheEntry("k")
    entry.claim()
    entry.done()
    with pytest.raises(ZeroDivisionError), entry.writing() as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert not entry.exists() and list(entry.folder.parent.iterdir()) == []
    with entry.writing() as folder:
        (folder / "file").write_text("x")
        assert not entry.exists()
    assert (entry.folder / "file").read_text() == "x"
    with entry.writing() as folder:  # another process, as late: somebody may be reading the first one's
        (folder / "file").write_text("y")
    assert (entry.folder / "file").read_text() == "x" and [p.name for p in entry.folder.parent.iterdir()] == ["k"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"the cache cannot be written .*set TUNERY_CACHE"):
        CacheEntry("k").claim()


def test_a_rank_waits_until_the_entry_is_there(monkeypatch):
    entry = CacheEntry("k")
    entry.claim()

    def build():
        time.sleep(0.3)
        with entry.writing() as folder:
            (folder / "file").write_text("x")

    thread = threading.Thread(target=build)
    thread.start()
    entry.wait(patience=10)
    thread.join()
    assert (entry.folder / "file").read_text() == "x"


def test_a_rank_with_a_damaged_entry_waits_for_the_next_one():
    entry = CacheEntry("k")
    entry.claim()
    with entry.writing() as folder:
        (folder / "file").write_text("damaged")
    damaged = entry.stamp()

    def build():
        time.sleep(0.2)
        entry.folder.rename(entry.folder.with_name("aside"))  # removed, but its inode number not free for the next one
        with entry.writing() as folder:
            (folder / "file").write_text("whole")

    thread = threading.Thread(target=build)
    thread.start()
    entry.wait(patience=10, damaged=damaged)
    thread.join()
    assert (entry.folder / "file").read_text() == "whole"


def test_a_rank_gives_up_without_a_sign_of_life_and_not_before(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    entry = CacheEntry("k")
    entry.claim()
    started = time.time()
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05) and time.time() < started + 0.6:
            entry.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(DataError, match=r"rank 1 waited 0 s for rank 0 to tokenise.*set TUNERY_CACHE"):
        entry.wait(patience=0.3)
    assert time.time() - started > 0.8  # the beats went on for 0.6 s
    stop.set()
    thread.join()
    entry.done()
    assert not entry.marker.exists()


RANKED = """
import json
import sys
from tunery.config import validate
from tunery.data.dataset import DataConfig, prepare
from toy_template import ToyObjective, ToyTemplate

template = ToyTemplate()
config = validate(DataConfig, {"train": sys.argv[1], "cache": sys.argv[2] == "true"})
made = prepare(config, template, ToyObjective(), seed=0)
print(json.dumps([len(made.train), made.report.cache, template.rows_encoded]))
"""


@pytest.mark.parametrize("cache", ["true", "false"])
def test_only_rank_0_tokenises_unless_the_cache_is_off(tmp_path, cache):
    """Two processes as torchrun starts them, rank 1 first."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"q{i}", "output": "a"}) + "\n" for i in range(50)))
    tests = str(Path(__file__).parents[1])
    processes = []
    for number in ("1", "0"):
        env = {**os.environ, "RANK": number, "WORLD_SIZE": "2", "PYTHONPATH": tests}
        words = [sys.executable, "-c", RANKED, str(path), cache]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    one, zero = (json.loads(process.communicate(timeout=60)[0]) for process in processes)
    if cache == "true":
        assert zero == [50, "built", 50] and one[0] == 50 and one[2] == 0
    else:
        assert zero == one == [50, "off", 50]
