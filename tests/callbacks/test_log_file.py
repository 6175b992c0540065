"""`open_log_file` on a disk and in a store that cannot append."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path

import fsspec
import pytest

from paceline.callbacks.log_file import open_log_file, read_text, write_text


@pytest.fixture(params=["disk", "store"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/runs/a.txt" if request.param == "disk" else f"memory://{uuid.uuid4()}/runs/a.txt"


def test_lines_survive_reopening(path: str) -> None:
    file = open_log_file(path)
    file.append("one")
    file.append("two")
    file.close()
    again = open_log_file(path)
    assert again.count == 2
    again.append("three")
    again.save()
    assert again.lines() == ["one", "two", "three"]
    assert read_text(path) == "one\ntwo\nthree\n"


def test_rewriting_replaces_all_lines_and_goes_on(path: str) -> None:
    file = open_log_file(path)
    for line in "abc":
        file.append(line)
    file.rewrite(["a"])
    file.append("d")
    file.close()
    assert read_text(path) == "a\nd\n"


def test_a_disk_has_each_line_when_it_was_flushed(tmp_path: Path) -> None:
    file = open_log_file(str(tmp_path / "a.txt"))
    file.append("one")
    file.flush()
    assert (tmp_path / "a.txt").read_text() == "one\n"


def test_a_store_gets_the_lines_at_a_save() -> None:
    url = f"memory://{uuid.uuid4()}/a.txt"
    file = open_log_file(url)
    file.append("one")
    file.flush()
    assert read_text(url) is None
    file.save()
    assert read_text(url) == "one\n"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs POSIX limits")
def test_a_full_disk_is_told_and_no_line_is_lost_once_there_is_room(tmp_path: Path) -> None:
    import resource

    file = open_log_file(str(tmp_path / "a.txt"))
    file.append("one")
    file.flush()
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))  # the disk takes no more than "one\ntw"
    try:
        with pytest.warns(UserWarning, match=r"a\.txt cannot be written: File too large"):
            file.append("two")
            file.flush()
        file.append("three")
        assert file.lines() == ["one", "two", "three"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    file.close()
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\nthree\n"


def test_half_a_line_that_a_killed_process_left_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntw")
    file = open_log_file(str(tmp_path / "a.txt"))
    file.append("three")
    file.close()
    assert (tmp_path / "a.txt").read_text() == "one\nthree\n"


def test_rewriting_leaves_no_other_file(tmp_path: Path) -> None:
    file = open_log_file(str(tmp_path / "a.txt"))
    file.rewrite(["x"])
    file.close()
    write_text(str(tmp_path / "b" / "c.json"), "{}")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "b", "c.json"]


def test_small_files_of_a_store() -> None:
    root = f"memory://{uuid.uuid4()}"
    assert read_text(f"{root}/x/a.json") is None
    write_text(f"{root}/x/a.json", "1")
    write_text(f"{root}/x/a.json", "2")
    assert read_text(f"{root}/x/a.json") == "2"


def test_a_file_url_works_like_a_store(tmp_path: Path) -> None:
    file = open_log_file(f"file://{tmp_path}/deep/a.txt")
    file.append("one")
    file.close()
    assert fsspec.filesystem("file").cat(f"{tmp_path}/deep/a.txt") == b"one\n"
