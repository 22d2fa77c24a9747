"""What goes through the pipe between the grader and a submission: length, JSON, arrays in npy. Nothing here runs what it reads.

A frame is four bytes of length and a payload; the payload is four bytes of length, a JSON header ``{"form": …,
"arrays": [lengths]}``, and the arrays one after the other, each as an npy file.
"""

import io
import json
import math
import struct

import numpy as np

__all__ = ["HEADER", "LONGEST", "frame", "length", "unpack"]

LONGEST = 64 * 2**20  # bytes of a payload; far more than an exercise needs
HEADER = 4 * 2**20  # bytes of JSON in a reply; as Python's objects it takes some twenty times as much
DTYPES = {np.dtype(name) for name in ("float16", "float32", "float64", "int32", "int64", "bool")}


def frame(form, arrays: list[np.ndarray]) -> bytes:
    """One message: a JSON value, and the arrays that it refers to."""
    blobs = []
    for array in arrays:
        blob = io.BytesIO()
        np.lib.format.write_array(blob, array, version=(1, 0), allow_pickle=False)
        blobs.append(blob.getvalue())
    header = json.dumps({"form": form, "arrays": [len(blob) for blob in blobs]}).encode()
    payload = struct.pack(">I", len(header)) + header + b"".join(blobs)
    return struct.pack(">I", len(payload)) + payload


def length(head: bytes) -> int:
    """The length of the payload, from the first four bytes of a frame.

    Raises:
        ValueError: If it is longer than any honest one.
    """
    (count,) = struct.unpack(">I", head)
    if count > LONGEST:
        raise ValueError(f"a message of {count} bytes is announced; at most {LONGEST} are read")
    return count


def unpack(payload: bytes, most: int = LONGEST) -> tuple[object, list[np.ndarray]]:
    """The JSON value and the arrays of a payload that may come from anybody.

    Arguments:
        payload: A frame without its first four bytes.
        most: How long the JSON may be, in bytes.

    Raises:
        ValueError: If it is not what `frame` writes: wrong lengths, no JSON, an array of objects or of another dtype.
    """
    try:
        (count,) = struct.unpack_from(">I", payload)
        if count > most:
            raise ValueError(f"a header of {count} bytes is announced; at most {most} are read")
        header = json.loads(payload[4 : 4 + count].decode())
        lengths = header["arrays"]
        if set(header) != {"form", "arrays"} or not all(type(n) is int and n >= 0 for n in lengths):
            raise ValueError("the header of a message must have form and arrays")
        if 4 + count + sum(lengths) != len(payload):
            raise ValueError("the lengths in a message do not add up")
        arrays, start = [], 4 + count
        for n in lengths:
            arrays.append(array(payload[start : start + n]))
            start += n
        return header["form"], arrays
    except Exception as error:  # the parsers of JSON and npy raise what they like: TokenError, OverflowError…
        raise ValueError(f"a malformed message: {str(error)[:200]}") from None


def array(blob: bytes) -> np.ndarray:
    """The array of an npy file, whose size must be what its header says: nothing is allocated on its word."""
    file = io.BytesIO(blob)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array must be npy of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype not in DTYPES or fortran or len(shape) > 16:
        raise ValueError(f"an array of dtype {dtype}, Fortran order {fortran}, is not read")
    data = blob[file.tell() :]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)
