"""Files behind URLs (`https://`, `s3://`, `hf://`, ...), read through fsspec block by block.

A read that fails (a lost connection, too few bytes) is repeated from the same byte. If it fails every time, it raises a
`UserError` and never counts as a damaged file: the same command resumes when the network is back.
"""

import io
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rich.markup import escape
from typing_extensions import override

from prunet.console import say
from prunet.errors import UserError

BLOCK = 4 << 20  # bytes of one request
TEMPORARY = (408, 429)  # a timeout; too many requests
WAITS_S = (0.5, 1, 2, 4)  # seconds before the second, third, ... try
SILENCE_S = 60  # seconds without data after which a connection counts as lost
AT_ONCE = 16  # files with requests for their marks at the same time
#: Names in filesystems of the mark that changes with a file's contents, the most reliable first.
MARKS = ("ETag", "etag", "md5Hash", "Content-MD5", "content_md5", "blob_id", "LastModified", "Last-Modified", "mtime")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Remote:
    """A file behind a URL, with the methods of a `Path` that readers of shards and tables use."""

    url: str

    @override
    def __str__(self) -> str:
        return self.url.partition("?")[0]  # the rest may be a secret signature

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.absolute().name

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return self.absolute().suffix

    def absolute(self) -> PurePosixPath:
        """The address of the file, as a path that can be compared with others."""
        parts = urlsplit(self.url)
        return PurePosixPath("/", parts.scheme, parts.netloc, parts.path.lstrip("/"))

    def is_file(self) -> bool:
        """Returns True, since the server is not asked."""
        return True

    def is_dir(self) -> bool:
        """Returns False, since only files are read by URL."""
        return False

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the file for reading.

        Raises:
            UserError: there is no such file, its server does not report its length, or a package is missing.
        """
        assert mode == "rb"
        return io.BufferedReader(_Reader(self), BLOCK // 4)

    def facts(self) -> dict[str, Any]:
        """What the server reports about the file; `size` in bytes."""
        return _facts(self)

    def mark(self) -> tuple[str, int, str]:
        """Name, bytes, and the server's mark that changes with the contents."""
        facts = self.facts()
        return self.name, int(facts["size"]), str(next((facts[key] for key in MARKS if facts.get(key)), ""))


#: A file on this machine or on a server.
File = Path | Remote


def is_url(text: str) -> bool:
    """Returns whether a source is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def remotes(url: str) -> list[Remote]:
    """Lists the files of a URL, which may have a pattern: `s3://bucket/train-*.tar`.

    Raises:
        UserError: no file matches the pattern.
    """
    if "*" not in url:
        return [Remote(url)]
    system = _system(Remote(url))
    found = _again(Remote(url), lambda: sorted(system.glob(url)))
    if not found:
        raise UserError(f"{url}: no file matches this pattern; fix the pattern, or name the files one by one")
    return [Remote(system.unstrip_protocol(name)) for name in found]


def marks(files: list[Remote]) -> list[tuple[str, int, str]]:
    """Returns the marks of several files."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(Remote.mark, files))


@lru_cache(maxsize=100_000)
def _facts(file: Remote) -> dict[str, Any]:
    system = _system(file)
    facts: dict[str, Any] = _again(file, lambda: system.info(file.url))
    if facts.get("size") is None:
        raise UserError(f"{file}: its server does not report its length, so a part could pass for the whole")
    return facts


def _system(file: Remote) -> Any:
    """Returns the filesystem of a URL's protocol.

    Raises:
        UserError: an unknown protocol, or a package that it needs is not installed.
    """
    import fsspec

    protocol = file.url.partition("://")[0]
    try:
        options: dict[str, Any] = {}
        if protocol in ("http", "https"):  # otherwise aiohttp ends every request after 5 minutes
            from aiohttp import ClientTimeout

            limits = ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
            options = {"client_kwargs": {"timeout": limits}}
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        if protocol in ("http", "https"):
            raise UserError(f"{file}: files by https need an extra: pip install 'prunet[data]'") from None
        raise UserError(f"{file}: {protocol}:// needs another package: {error}") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}; copy the files to this machine, or give an https:// address") from None


def _again(file: Remote, ask: Callable[[], _T]) -> _T:
    """Calls a function that may fail on the network; if it fails, again after each of `WAITS_S`.

    Raises:
        UserError: the function failed each time, or the server says that it always will.
    """
    for wait in (*WAITS_S, None):
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:  # every filesystem has its own errors
            status = getattr(error.__cause__ or error, "status", None)
            why = f"{status}" if status else " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            refused = isinstance(status, int) and 400 <= status < 500 and status not in TEMPORARY
            if wait is None or refused or isinstance(error, PermissionError):
                fix = "check the address, your right to read it and the network; the same command resumes"
                raise UserError(f"{file}: cannot be read ({why.replace(file.url, str(file))}): {fix}") from None
            if wait != WAITS_S[0]:
                say(f"[yellow]{escape(str(file))}:[/] {escape(why.replace(file.url, str(file)))}; trying again")
            time.sleep(wait)
    raise AssertionError("unreachable")


class _Reader(io.RawIOBase):
    """Reads a remote file at any place; each failed read is repeated with a new connection."""

    def __init__(self, file: Remote) -> None:
        self._file, self._system = file, _system(file)
        self._size, self._at = int(file.facts()["size"]), 0
        self._block = BLOCK  # 0: the server sends no parts, only the whole file
        self._opened: Any = None

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._at

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    @override
    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        buffer[:wanted] = _again(self._file, lambda: self._read(wanted))
        self._at += wanted
        return wanted

    def _read(self, count: int) -> bytes:
        try:
            if self._opened is None or (self._block == 0 and self._opened.tell() > self._at):
                self.close_connection()
                self._opened = self._system.open(self._file.url, "rb", block_size=self._block, cache_type="readahead")
            if self._block:
                self._opened.seek(self._at)
            while self._opened.tell() < self._at:
                if not self._opened.read(min(BLOCK, self._at - self._opened.tell())):
                    raise EOFError(f"ends at byte {self._opened.tell():,} of {self._size:,}")
            data = b""
            while len(data) < count:
                if not (more := self._opened.read(count - len(data))):
                    raise EOFError(f"ends at byte {self._at + len(data):,} of {self._size:,}")
                data += more
            return data
        except Exception as error:
            self.close_connection()
            if self._block and isinstance(error, ValueError):
                self._block = 0
                return self._read(count)
            raise

    def close_connection(self) -> None:
        """Drops the connection, and data that were read ahead."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    @override
    def close(self) -> None:
        if not self.closed:
            self.close_connection()
        super().close()
