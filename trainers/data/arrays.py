"""One numpy array a file, in storage: whole or absent, memory-mapped where storage is local. Objects are refused."""

import io

import numpy as np

from trainers.data.encoded import Array
from trainers.storage import Folder


def save_array(folder: Folder, name: str, array: Array) -> None:
    """Write an array, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    folder.write_bytes(name, buffer.getvalue())


def load_array(folder: Folder, name: str) -> Array:
    """Read an array back. Raises FileNotFoundError."""
    array: Array
    if folder.is_local:
        array = np.load(folder.path / name, mmap_mode="r")
    else:
        array = np.load(io.BytesIO(folder.read_bytes(name)))
    return array
