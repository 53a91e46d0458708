"""Heads of served teachers as files: named by the hash of what is in them, and kept where the student is trained."""

import hashlib
import logging
import os
from pathlib import Path

import urllib3
from safetensors.torch import load_file, save
from torch import Tensor

from amid_trl.maths.kernel import Finish
from amid_trl.maths.linear import Head
from amid_trl.outputs import write_whole
from amid_trl.teacher.connection import Connection
from amid_trl.teacher.exchange import HEAD_PATH, AboutTeacher


logger = logging.getLogger(__name__)

PIECE = 2**20  # bytes that are hashed or written at a time


def write_head(head: Head, folder: Path) -> Path:
    """Write a head's weight and bias, unless they are there as a whole; the file is called by its hash."""
    content = packed_head(head)
    file = folder / f"{head_hash(content)}.safetensors"
    if not file.exists() or file_hash(file) != file.stem:
        write_whole(file, content)
    return file


def packed_head(head: Head) -> bytes:
    """A head's weight and bias as the file that holds them."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def head_hash(content: bytes) -> str:
    """By which a packed head is known."""
    return hashlib.sha256(content).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of what is in the file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def heads_folder() -> Path:
    """Where heads are kept: `amid_trl/heads` in $XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "amid_trl", "heads")


def kept_head(about: AboutTeacher, connection: Connection) -> Head:
    """The teacher's head from the folder of heads; fetched if it is not there, or is damaged.

    ValueError if what the server sends is not the head that it names.
    """
    file = heads_folder() / f"{about.head}.safetensors"
    if not file.exists() or file_hash(file) != about.head:
        if file.exists():
            logger.warning("%s is damaged: the head is fetched anew", file)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda beside: _fetch(about, connection, beside))
    tensors = load_file(file)
    return Head(_weight(tensors, about), tensors.get("bias"), Finish(about.scale, about.softcap))


def _fetch(about: AboutTeacher, connection: Connection, file: Path) -> None:
    def read(response: urllib3.BaseHTTPResponse) -> None:
        with open(file, "wb") as opened:
            for piece in response.stream(PIECE):
                opened.write(piece)

    try:
        response = connection.request("GET", f"{HEAD_PATH}/{about.head}", read=read)
        if response.status != 200:
            raise ValueError(f"the teacher at {connection.url} does not give its head ({response.status})")
        if (sent := file_hash(file)) != about.head:
            raise ValueError(f"the teacher at {connection.url} names the head {about.head} and has sent {sent}")
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _weight(tensors: dict[str, Tensor], about: AboutTeacher) -> Tensor:
    shape = (about.vocabulary, about.dim)
    if "weight" not in tensors or tuple(tensors["weight"].shape) != shape:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"the head of {about.name} should be a weight of shape {shape}; its file has {found}")
    return tensors["weight"]
