"""Files that are replaced whole or not at all, and files that hold anything."""

import os
import resource
import subprocess
import sys
import textwrap

import pytest

from tfkern import files


def limited(code, *arguments, size=10):
    """Runs code in a process that can write no more than so many bytes to a file."""
    code = f"import sys\nfrom tfkern import files\n{textwrap.dedent(code)}"
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_is_replaced(tmp_path, umask):
    file = tmp_path / "a.txt"
    file.write_text("old")
    file.chmod(0o600)
    before = os.umask(umask)
    try:
        files.write(file, "new")
    finally:
        os.umask(before)
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_block_that_fails_changes_nothing(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(file) as new:
        new.write_text("ne")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_changes_nothing(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    told = limited(
        """
        try:
            files.write(sys.argv[1], "x" * 99)
        except OSError as error:
            sys.stdout.write(error.strerror)
        """,
        file,
        size=20,
    )
    assert told == "File too large"
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_links_are_followed_and_pipes_are_written_to(tmp_path):
    file, link, pipe = tmp_path / "a.txt", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    files.write(link, "new")
    assert link.is_symlink() and file.read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write(pipe, "through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    code = "from tfkern import files; files.write('/dev/stdout', 'out')"
    with (tmp_path / "out").open("w") as out:  # a regular file, which the shell holds open
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "out"


def test_what_the_dead_left_is_removed_and_the_living_are_waited_for(tmp_path):
    (tmp_path / ".tfkern-dead").mkdir()
    (tmp_path / ".tfkern-dead" / "file").touch()
    with files.beside(tmp_path) as ours:
        (ours.folder / "a.txt").write_text("ours")
        code = f"from tfkern import files; files.write({str(tmp_path / 'b.txt')!r}, 'theirs')"
        other = subprocess.Popen([sys.executable, "-c", code])
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)  # it waits for us, and our folder is still there
        ours.settle()
        ours.place("a.txt")
    assert other.wait() == 0
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]


def test_a_new_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    new, path, done = tmp_path / "a.new", tmp_path / "a", []
    new.write_text("new")
    sync, replace = os.fsync, os.replace

    def syncs(handle):
        done.append(("sync", os.fstat(handle).st_ino))
        sync(handle)

    def replaces(*names):
        done.append(("replace",))
        replace(*names)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(os, "replace", replaces)
    files.place(new, path)
    assert os.listdir(tmp_path) == ["a"] and path.read_text() == "new"
    folder, file = tmp_path.stat().st_ino, path.stat().st_ino
    assert done == [("sync", file), ("replace",), ("sync", folder)]


def test_a_folder_of_the_name_is_found_before_anything_is_replaced(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError, match="b"), files.beside(tmp_path) as new:
        for name in "ab":
            (new.folder / name).touch()
        new.settle()
        new.place("a", "b")
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"[]", "must hold an object, got list"),
    ],
)
def test_texts_that_are_no_object(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as found:
        files.read_object(tmp_path / "x.json")
    assert "x.json" in str(found.value) and "\n" not in str(found.value)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(1 << 40)
    for name, message in {
        "pipe": "not a regular file", ".": "not a regular file", "loop": "symbolic links",
        "none": "No such file", "endless": "more than", "/dev/zero": "not a regular file",
        "n" * 300: "too long", "nul\0": "null byte",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            files.read(tmp_path / name)


def test_what_cannot_be_replaced_is_known_before(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("file", "new", "link", "/dev/stdout"):
        assert files.replaceable(tmp_path / name) == tmp_path / name
    for name, message in {
        "folder": "Is a directory", "file/x": "Not a directory", "no/x": "No such file",
        "n" * 300: "too long", "/proc/x": "can be written to",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot write to .*{message}"):
            files.replaceable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


def test_a_platform_without_locks(tmp_path):
    """Windows has no fcntl, and opens no folders."""
    code = """
        import os, sys
        sys.modules["fcntl"] = None
        opened = os.open
        def refuses(path, *arguments):
            if os.path.isdir(path):
                raise PermissionError(13, "Permission denied", path)
            return opened(path, *arguments)
        os.open = refuses
        from tfkern import files, models
        files.write(sys.argv[1], "new")
        files.replaceable(files.Path(sys.argv[1]))
    """
    (tmp_path / "a.txt").write_text("old")
    code = textwrap.dedent(code)
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], check=True)
    assert (tmp_path / "a.txt").read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
