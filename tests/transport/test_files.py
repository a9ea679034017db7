"""Is a result written whole or not at all?"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest

from dpocheck.files import CannotWrite, new_folder_beside, replace_folder, write_atomic

needs_other_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def test_a_file_is_created_and_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "one é")
    assert path.read_text(encoding="utf-8") == "one é"
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_permissions_are_those_of_an_ordinary_file_and_survive_a_rewrite(tmp_path):
    path, ordinary = tmp_path / "a", tmp_path / "b"
    ordinary.write_text("")
    write_atomic(path, "x")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    path.chmod(0o640)
    write_atomic(path, "y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_full_disk_leaves_the_old_file_and_one_clear_error(tmp_path):
    # RLIMIT_FSIZE makes the kernel refuse the write (EFBIG), as a full disk does (ENOSPC).
    path = tmp_path / "a"
    path.write_text("old")
    code = (
        "import resource, signal, sys; from dpocheck.files import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomic(sys.argv[1], b'x' * 5000)\n"
        "except CannotWrite as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout
    assert "cannot write" in out
    assert str(path) in out
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("place", ["missing/a", "file/a"])
def test_a_place_that_is_none_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"cannot write .*a: .*; name a place"):
        write_atomic(tmp_path / place, "x")
    assert os.listdir(tmp_path) == ["file"]


def _result(folder, text):
    (folder / "results.jsonl").write_text(text)
    (folder / text).write_text(text)


def test_a_result_folder_is_replaced_whole(tmp_path):
    final = tmp_path / "out" / "audit"
    for text in ("first", "second"):
        new = new_folder_beside(final)
        _result(new, text)
        replace_folder(new, final)
    assert sorted(os.listdir(final)) == ["results.jsonl", "second"]
    assert os.listdir(tmp_path / "out") == ["audit"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    new = new_folder_beside(link)
    _result(new, "x")
    replace_folder(new, link)
    assert link.is_symlink()
    assert (real / "results.jsonl").read_text() == "x"


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    new = new_folder_beside(tmp_path / "out")
    _result(new, "x")
    replace_folder(new, tmp_path / "out")
    assert (tmp_path / "out" / "x").exists()


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CannotWrite, match=r"thesis\.tex.*not a result"):
        new_folder_beside(tmp_path)
    new = tmp_path / "new"
    new.mkdir()
    with pytest.raises(CannotWrite, match="not a result"):
        replace_folder(new, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CannotWrite, match="is a file"):
        new_folder_beside(tmp_path / "out")


def test_a_failed_exchange_leaves_the_old_result(tmp_path):
    final = tmp_path / "out"
    final.mkdir()
    _result(final, "old")
    with pytest.raises(CannotWrite):
        replace_folder(tmp_path / "never-made", final)
    assert (final / "old").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@needs_other_user
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CannotWrite, match="Permission denied"):
            new_folder_beside(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot write"):
        new_folder_beside(tmp_path / "file" / "out")


@pytest.mark.parametrize("exchange", ["by the kernel", "by two renames"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_result(tmp_path, exchange):
    # The child kills itself at its n-th open, rename, swap or removal below the folder; n grows until it survives.
    code = (
        "import os, signal, sys\n"
        "from dpocheck import files\n"
        "final, n = sys.argv[1], int(sys.argv[2]); seen = 0\n"
        "def hook(event, args):\n"
        "    global seen\n"
        "    if event in ('open', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree', 'ctypes.dlopen'):\n"
        "        seen += 1\n"
        "        if seen == n: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[3] == 'by two renames': files._exchanged = lambda new, old: False\n"
        "new = files.new_folder_beside(final)\n"
        "for name in ('results.jsonl', 'new'): (new / name).write_text('new')\n"
        "sys.addaudithook(hook)\n"
        "files.replace_folder(new, final)\n"
    )
    whole = (["new", "results.jsonl"], ["old", "results.jsonl"])
    for n in range(1, 40):
        final = tmp_path / f"case{n}" / "out"
        final.mkdir(parents=True)
        _result(final, "old")
        run = subprocess.run([sys.executable, "-c", code, str(final), str(n), exchange], check=False)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
        if final.exists():
            assert sorted(os.listdir(final)) in whole
        else:  # between the two renames: both are whole, beside
            assert exchange == "by two renames"
            assert sorted(sorted(os.listdir(folder)) for folder in final.parent.iterdir()) == sorted(whole)
    assert n > 4
    assert sorted(os.listdir(final)) == whole[0]
    assert os.listdir(final.parent) == ["out"]
