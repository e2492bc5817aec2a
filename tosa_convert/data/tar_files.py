"""What tarfile passes over in silence."""

import tarfile
from pathlib import Path


def check_whole(file: Path) -> None:
    """
    Raises:
        tarfile.TarError: it is no tar file, or it does not end where its files do: see :func:`check_end`.
    """
    with tarfile.open(file, "r:") as archive:
        for _ in archive:
            pass
        check_end(file, archive.offset)


def check_end(file: Path, offset: int) -> None:
    """
    Args:
        offset: where tarfile found no further file.

    Raises:
        tarfile.ReadError: there is something else behind it than the empty blocks with which tar files end. It was cut
            off, or a header in its middle is damaged, or several files were joined: what follows would be lost.
    """
    with file.open("rb") as opened:
        opened.seek(offset)
        block = opened.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends in the middle")
        while block:
            if any(block):
                raise tarfile.ReadError("it is damaged in the middle, or several tar files were joined")
            block = opened.read(2**20)
