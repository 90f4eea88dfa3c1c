"""Files are written whole or not at all, whoever is killed and however many write at once, and nothing is left beside them."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from reward_guidance.guidance.disk import held, write
from reward_guidance.tests.unit.shared import CHECKOUT

SAVES = {"in place": "partial.write_bytes(b'x' * 1000)", "safetensors": "save_file({'a': torch.zeros(2**26)}, partial)"}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_killed_save_leaves_one_folder_which_the_next_save_deletes(tmp_path, save):
    """safetensors has a temporary file of its own."""
    script = f"""
import runpy, time, torch
runpy.run_path({str(CHECKOUT / "tests" / "conftest.py")!r})
from pathlib import Path
from safetensors.torch import save_file
from reward_guidance.guidance.disk import write
write(Path({str(tmp_path)!r}) / "net.safetensors", lambda partial: ({save}, time.sleep(60)))
"""
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script])
        while not any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*")):
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors.partial"]
        write(tmp_path / "net.safetensors", lambda partial: partial.write_bytes(b"whole"))
        assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]
        (tmp_path / "net.safetensors").unlink()


def test_files_that_differ_in_their_ending_have_temporary_files_of_their_own(tmp_path):
    def both(partial: Path) -> None:
        partial.write_bytes(b"a picture")
        write(tmp_path / "a.safetensors", lambda other: other.write_bytes(b"tensors"))

    write(tmp_path / "a.png", both)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.png": b"a picture",
        "a.safetensors": b"tensors",
    }


def test_two_writers_of_one_file_do_not_write_into_each_other(tmp_path):
    target, inside, done = tmp_path / "net.safetensors", threading.Event(), threading.Event()

    def slow(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(b"one")
            inside.set()
            done.wait(10)
            file.write(b" whole")

    thread = threading.Thread(target=lambda: write(target, slow))
    thread.start()
    inside.wait(10)
    write(target, lambda partial: partial.write_bytes(b"another"))
    assert target.read_bytes() == b"another"
    done.set()
    thread.join()
    assert target.read_bytes() == b"one whole" and [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_new_file_is_written_over_no_other(tmp_path):
    target = tmp_path / "a.json"
    with pytest.raises(FileExistsError):
        write(target, lambda partial: (partial.write_bytes(b"second"), target.write_bytes(b"first")), new=True)
    assert target.read_bytes() == b"first" and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_held_by_one(tmp_path):
    path = tmp_path / "a"
    path.touch()
    with held(path) as first, held(path) as second:
        assert first and not second
    with held(path) as third, held(tmp_path / "gone") as none:
        assert third and not none
