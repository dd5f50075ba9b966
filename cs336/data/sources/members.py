"""The bytes of an archive: plain, or gzip members or zstd frames one after the other, of which any may be damaged.

An archive's writer begins a member a record, so what follows a damaged one can still be read: `resync` looks for the
next place where a member begins and unpacks to the head of a record. Unpacking never gets ahead of what is asked for
by more than 32 MiB, so a bomb costs what is read of it.
"""

import re
import zlib
from typing import IO

from cs336.data.sources.record import Damaged

GZIP, ZSTD, LZ4 = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"
BLOCK = 1 << 16  # bytes read and unpacked at once
FRAME_PIECE = 1 << 10  # of a zstd frame: 4 bytes unpack to 128 KiB at most, so this to 32 MiB
HEAD = re.compile(rb"WARC/\d|(?:https?|ftp|dns|filedesc)://?\S* [\d.]+ \d{14} ")
PLAIN_HEAD = re.compile(rb"(?<=\n)(?:WARC/\d\.\d\r?\n|(?:https?|ftp|dns)://?\S+ [\d.]+ \d{14} \S+ \d+\n)")
OVERLAP = 1 << 12  # a head is shorter
LONGEST_LINE = 1 << 16


class Members:
    """A seekable file's bytes. `begin` is where, in the file, the member or record that is being read begins."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._magic = file.read(4)
        file.seek(0)
        if self._magic == LZ4:
            raise ValueError("it is packed with lz4, which is not read: unpack it, or pack it with gzip or zstd")
        self.packed = self._magic[:3] == GZIP or self._magic == ZSTD
        self._raw, self._raw_end = b"", 0  # bytes that are read and not unpacked, and where the file stands
        self._data, self._at = b"", 0
        self._unpacker: _Gzip | _Zstd | None = None
        self.begin = 0
        self._guard_block = False

    @property
    def position(self) -> int:
        """In the file, of what comes next; of packed bytes, about."""
        return self._raw_end - len(self._raw) - (0 if self.packed else len(self._data) - self._at)

    def line(self) -> bytes:
        """With its end; b"" after the last."""
        while (end := self._data.find(b"\n", self._at) + 1) == 0:
            if len(self._data) - self._at > LONGEST_LINE:
                raise Damaged(f"a line of its head is longer than {LONGEST_LINE} bytes")
            if not self._fill():
                end = len(self._data)
                break
        found, self._at = self._data[self._at : end], end
        return found

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes of a record's block."""
        parts, left = [], size
        self._guard_block = True
        try:
            while left:
                if self._at == len(self._data) and not self._fill():
                    raise Damaged(f"it ends {left:,} of {size:,} bytes early")
                part = self._data[self._at : self._at + left]
                self._at += len(part)
                left -= len(part)
                parts.append(part)
        finally:
            self._guard_block = False
        return b"".join(parts)

    def skip(self, size: int) -> None:
        have = min(size, len(self._data) - self._at)
        self._at += have
        size -= have
        if not self.packed:
            self._file.seek(self._raw_end + size)
            self._raw_end += size
            return
        while size:
            size -= len(self.take(min(size, BLOCK)))

    def mark(self) -> None:
        """A record begins here."""
        self.begin = self.position if not self.packed or self._at == len(self._data) else self.begin

    def resync(self) -> bool:
        """Go to the next record that can be found after the one that begins at `begin`; False: there is none."""
        start = self._find(self.begin + 1)
        if start is None:
            return False
        self._file.seek(start)
        self._raw, self._raw_end, self._data, self._at, self._unpacker = b"", start, b"", 0, None
        self.begin = start
        return True

    # ---- unpacking ----

    def _fill(self) -> bool:
        """More bytes after those that are there; False at the end of the file."""
        fresh = self._plain() if not self.packed else self._unpacked()
        if not fresh:
            return False
        self._data, self._at = self._data[self._at :] + fresh, 0
        return True

    def _plain(self) -> bytes:
        block = self._file.read(BLOCK)
        self._raw_end += len(block)
        return block

    def _unpacked(self) -> bytes:
        while True:
            if not self._raw:
                self._raw = self._plain()
                if not self._raw:
                    if self._unpacker is not None:
                        self._unpacker = None
                        raise Damaged("the file ends within it")
                    return b""
            new = self._unpacker is None
            if new:
                self._begin_member()
            fresh = self._unpack()
            if new and self._guard_block and HEAD.match(fresh):
                self._data, self._at = self._data[self._at :] + fresh, 0
                raise Short("its block is shorter than its head says")
            if fresh:
                return fresh

    def _begin_member(self) -> None:
        if len(self._raw) < 4:
            self._raw += self._plain()
        if self._at == len(self._data):
            self.begin = self._raw_end - len(self._raw)
        if self._raw[:3] == GZIP:
            self._unpacker = _Gzip()
        elif self._raw[:4] == ZSTD or self._raw[1:4] == b"\x2a\x4d\x18":
            self._unpacker = _Zstd()
        else:
            raise Damaged("what follows the last member is neither gzip nor zstd")

    def _unpack(self) -> bytes:
        assert self._unpacker is not None
        fresh, self._raw, ended = self._unpacker.unpack(self._raw)
        if ended:
            self._unpacker = None
        return fresh

    # ---- finding ----

    def _find(self, start: int) -> int | None:
        """Where a record begins in the file, at `start` or later."""
        window = b""
        self._file.seek(max(0, start - 1))  # a plain head stands after a line end
        at = max(0, start - 1)
        while block := self._file.read(1 << 20):
            window += block
            if (found := self._head_in(window, at, start)) is not None:
                return found
            at += len(window) - len(window[-OVERLAP:])
            window = window[-OVERLAP:]
        return None

    def _head_in(self, window: bytes, at: int, start: int) -> int | None:
        if not self.packed:
            match = PLAIN_HEAD.search(window)
            return None if match is None else at + match.start()
        magic = GZIP if self._magic[:3] == GZIP else ZSTD
        here = window.find(magic)
        while here >= 0:
            if at + here >= start and self._begins_record(window[here : here + OVERLAP]):
                return at + here
            here = window.find(magic, here + 1)
        return None

    def _begins_record(self, packed: bytes) -> bool:
        try:
            unpacker = _Gzip() if packed[:3] == GZIP else _Zstd()
            return HEAD.match(unpacker.unpack(packed)[0]) is not None
        except Damaged:
            return False


class Short(Damaged):
    """The next record is at hand already."""


class _Gzip:
    def __init__(self):
        self._inflate = zlib.decompressobj(31)

    def unpack(self, packed: bytes) -> tuple[bytes, bytes, bool]:
        """(unpacked, what is left of the packed bytes, whether the member has ended)."""
        try:
            fresh = self._inflate.decompress(packed, BLOCK)
        except zlib.error as error:
            raise Damaged(f"it cannot be unpacked ({error})") from None
        ended = self._inflate.eof
        return fresh, self._inflate.unused_data if ended else self._inflate.unconsumed_tail, ended


class _Zstd:
    def __init__(self):
        try:
            import zstandard
        except ImportError:
            raise ImportError("reading a .zst archive needs zstandard: pip install 'cs336[data]'") from None
        self._error = zstandard.ZstdError
        self._inflate = zstandard.ZstdDecompressor().decompressobj()

    def unpack(self, packed: bytes) -> tuple[bytes, bytes, bool]:
        try:
            fresh = self._inflate.decompress(packed[:FRAME_PIECE])
        except self._error as error:
            raise Damaged(f"it cannot be unpacked ({error})") from None
        ended = self._inflate.eof
        return fresh, (self._inflate.unused_data if ended else b"") + packed[FRAME_PIECE:], ended
