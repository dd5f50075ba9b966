"""Zstandard files as streams of bytes, over the zstandard package, which is asked for at the first one."""

import builtins
import io
import os
from typing import IO

BLOCK = 1 << 17  # packed bytes read at once


def open(path: str | os.PathLike, mode: str = "rb") -> IO[bytes]:
    """The unpacked bytes of a file, of every frame in it.

    Raises ImportError that names the extra; reading raises EOFError where the file is damaged or cut off.
    """
    try:
        import zstandard
    except ImportError:
        raise ImportError(f"reading {path} needs zstandard: pip install 'cs336[data]'") from None
    return io.BufferedReader(_Reader(builtins.open(path, mode), zstandard))


class _Reader(io.RawIOBase):
    def __init__(self, file: IO[bytes], zstandard):
        self._file, self._zstandard = file, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed, self._unpacked, self._begun = b"", memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(BLOCK)
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
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        self._packed = self._frame.unused_data if self._frame.eof else b""

    def close(self) -> None:
        self._file.close()
        super().close()
