"""Files that are replaced whole or not at all, and files that may hold anything."""

import json
import os
import re
import reprlib
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".tfkern-"  # begins the names of folders for new files
_STREAMS = ("/dev/std", "/dev/fd/", "/proc/")  # others have these open and would miss a new file
_LIMIT = 1 << 28  # most bytes that a text file may have
_TRIES = 100
T = TypeVar("T")


class Beside:
    """A folder within a directory, for new files that will replace the directory's own.

    Attributes:
        folder: the folder where the new files are written.
    """

    def __init__(self, directory: Path, folder: Path) -> None:
        self.directory, self.folder = directory, folder

    def settle(self) -> None:
        """Brings all new files to the disk, with the mode that this process gives to new files."""
        fresh = self.folder / ".mode"
        fresh.touch()  # shows the mode; to read the umask is to set it, for other threads, too
        mode = stat.S_IMODE(fresh.stat().st_mode)
        fresh.unlink()
        for file in self.folder.iterdir():
            if stat.S_IMODE(file.stat().st_mode) != mode:
                file.chmod(mode)
            _sync(file)
            if (self.directory / file.name).is_dir():
                raise IsADirectoryError(21, "Is a directory", str(self.directory / file.name))

    def place(self, *names: str) -> None:
        """Moves settled files into the directory in the order of names, each by one rename."""
        for name in names:
            _rename(self.folder / name, self.directory / name)

    def remove(self, *names: str) -> None:
        """Removes files from the directory."""
        for name in names:
            (self.directory / name).unlink(missing_ok=True)
        _sync(self.directory)


@contextmanager
def beside(directory: Path) -> Iterator[Beside]:
    """A folder for new files of a directory. The folder is removed when the block ends.

    A lock on the directory makes other callers wait until the block ends. If there are such folders
    when the lock is taken, processes that died in their blocks have left them, and they are
    removed. Where the file system or the platform (Windows) cannot lock, neither happens.

    Raises:
        OSError: a file cannot be written; the error names the directory.
    """
    with locked(directory) as held:
        for left in directory.glob(f"{PREFIX}*") if held else ():  # the living would hold the lock
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
        try:
            yield Beside(directory, folder)
        except OSError as error:
            if error.errno is None or error.filename and str(folder) not in str(error.filename):
                raise
            raise OSError(error.errno, error.strerror, str(directory)) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a folder or of a file during the block.

    The value is False where the file system or the platform (Windows) cannot lock: then nobody
    holds it.

    Raises:
        BlockingIOError: another process or block holds the lock, and `wait` is False.
    """
    if fcntl is None:  # on Windows, which cannot open folders either
        yield False
        return
    # File systems of networks lock only files that are open for writing.
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path for a new file, which replaces the one at `path` when the block ends.

    If the block fails, or the process ends within it, `path` is as it was. Links are followed. If
    `path` is no regular file, but /dev/stdout, a pipe or a device, it is written to directly.

        with replacing("rows.csv") as new:
            new.write_text("a,b\\n")

    Raises:
        OSError: `path` cannot be written, or its folder does not exist.
    """
    path = Path(path)
    if _written_to_itself(path):
        yield path
        return
    path = Path(os.path.realpath(path))
    with beside(path.parent) as new:
        yield new.folder / path.name
        new.settle()
        new.place(path.name)


def place(new: Path, path: Path) -> None:
    """Brings a new file to the disk and then to its place in the same folder, by one rename.

    Several processes may do so in one folder at a time, and none waits for another. A process that
    dies leaves the new file, so its name must be one that the next try overwrites.
    """
    _sync(new)
    _rename(new, path)


def write(path: str | Path, content: str | bytes) -> None:
    """Replaces the content of a file, as a whole or not at all: see `replacing`."""
    with replacing(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def replaceable(path: Path) -> Path:
    """`path`, if `replacing` can put a file there now: a check to make before long work.

    Raises:
        ValueError: `path` is a folder, or cannot be written, or its folder takes no files.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        if not _written_to_itself(path):
            with beside(Path(os.path.realpath(path)).parent):
                return path
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "nothing there can be written to")
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from None
    return path


def regular(path: Path) -> Path:
    """`path`, if it is a regular file, which can be read to its end: no pipe, device or folder.

    Raises:
        ValueError: there is no such file.
    """
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(kind):
        raise ValueError(f"{path} is not a regular file")
    return path


def read(path: Path) -> bytes:
    """The content of a regular file that is small enough to be text.

    Raises:
        ValueError: there is no such file, it is too large, or it cannot be read.
    """
    try:
        if (size := regular(path).stat().st_size) > _LIMIT:
            raise ValueError(f"{path} has {size} bytes, more than {_LIMIT}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def steadily(read: Callable[[], T], *paths: Path) -> T:
    """The result of `read`, a function that reads the files `paths`, from one state of them.

    If one of the files was replaced while `read` ran, it runs again. ValueErrors that it raises for
    files that stayed are passed on.

    Raises:
        ValueError: the files are replaced all the time.
    """
    for _ in range(_TRIES):
        before = [_seen(path) for path in paths]
        try:
            found = read()
        except ValueError:
            if [_seen(path) for path in paths] == before:
                raise
        else:
            if [_seen(path) for path in paths] == before:
                return found
    raise ValueError(f"{paths[0]} is written to all the time")


def parse(content: bytes | str, source: object) -> dict[str, Any]:
    """The JSON object of a text that may come from anyone.

    Args:
        source: name of the text in errors.

    Raises:
        ValueError: the text is no JSON object, or has a name twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{shown(name)} stands there twice")
            found[name] = value
        return found

    try:
        found = json.loads(content, object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{source} must hold an object, got {type(found).__name__}")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, by `read` and `parse`."""
    return parse(read(path), path)


def parse_yaml(content: bytes | str, source: object) -> Any:
    """The value of a text in YAML, of plain types alone.

    Numbers such as 1e-3 are floats, as in YAML 1.2. YAML 1.1, which the library reads, takes them
    for strings, since they have no point.

    Raises:
        ValueError: the text is no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    exponent = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|[-+]?[0-9]*\.[0-9]*[eE][0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    try:
        return yaml.load(content, Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: {one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping of names to values in a file of YAML.

    Raises:
        ValueError: the file cannot be read, or is no mapping.
    """
    told = parse_yaml(read(path), path)
    if not isinstance(told, dict):
        raise ValueError(f"{path}: a recipe is a mapping of names to values")
    return told


def check_recipe(told: Mapping[Any, Any], known: Collection[str], needed: Iterable[str]) -> None:
    """Checks the names of a recipe.

    Raises:
        ValueError: a name that is not known, or one that is needed and has no value.
    """
    for name in told:
        if name not in known:
            raise ValueError(f"{shown(name)} is not one of {', '.join(known)}")
    for name in needed:
        if told.get(name) is None:
            raise ValueError(f"a recipe needs {name}")


def shown(value: Any) -> str:
    """A value from a file as short text without line breaks, for messages."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int of thousands of digits
        return f"a huge {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """The message of an error as at most some 300 characters without line breaks."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 2, 3, 3


def _written_to_itself(path: Path) -> bool:
    return path.exists() and not path.is_file() or str(path.absolute()).startswith(_STREAMS)


def _seen(path: Path) -> tuple[int, int, int] | None:
    """Facts of a file that differ once it is replaced; None if there is no file."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _rename(new: Path, path: Path) -> None:
    os.replace(new, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if fcntl is None and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)
