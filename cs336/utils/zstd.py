"""Zstandard files as streams of bytes, over the zstandard package, which is asked for at the first one."""

import builtins
import io
import os
from typing import IO

BLOCK = 1 << 17  # packed bytes read at once
PIECE = 1 << 10  # and unpacked at once: 4 bytes may be 128 KiB, so that a bomb fills 32 MiB at most


def open(path: str | os.PathLike | IO[bytes], mode: str = "rb") -> IO[bytes]:
    """The unpacked bytes of a file, or of one that is open, of every frame in it.

    Raises ImportError that names the extra; reading raises EOFError where the file is damaged or cut off.
    """
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"reading {path} needs zstandard: pip install 'cs336[data]'") from None
    return io.BufferedReader(
        _Reader(builtins.open(path, mode) if isinstance(path, str | os.PathLike) else path, zstandard)
    )


class _Reader(io.RawIOBase):
    def __init__(self, file: IO[bytes], zstandard):
        self._file, self._zstandard = file, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed, self._unpacked, self._begun = memoryview(b""), memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._unpacked:
            self._packed = self._packed or memoryview(self._file.read(BLOCK))
            if not self._packed:
                if self._begun and not self._frame.eof:
                    raise EOFError("it ends inside a frame")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    def _unpack(self) -> None:
        if self._frame.eof:
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        self._begun = True
        piece, self._packed = self._packed[:PIECE], self._packed[PIECE:]
        try:
            self._unpacked = memoryview(self._frame.decompress(piece))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        if self._frame.eof and self._frame.unused_data:
            self._packed = memoryview(self._frame.unused_data + bytes(self._packed))

    def close(self) -> None:
        self._file.close()
        super().close()
