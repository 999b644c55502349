"""A run's directory: pieces that are there whole or not at all, whoever is killed and however many write.

A piece is a directory of files with their SHA-256 in ``piece.json``. It is written as a hidden draft and renamed into
place, so that a killed process leaves nothing that looks finished, and of two processes that made the same piece one
wins. Locks (released by the system when their holder dies) only spare double work. Drafts and lock files go when their
process is done with them; those of killed processes, when the next one comes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from metaopt_lens._errors import FileFormatError, OutputError
from metaopt_lens._storage import provenance, write_text

RUN_FILE = "run.json"
RUN_FORMAT = 2  # 1: of version 0.1
PIECE_FILE = "piece.json"
_PIECE_KIND = "metaopt-lens piece"
_LOCK, _DRAFT = ".lock.", ".draft."


class RunStore:
    """The directory of one run."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    # ---- what the run is ----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make sure that the directory can be written and is a run's, or empty; remove what killed processes left.

        Raises:
            OutputError: it cannot be written, or holds something else.
        """
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(prefix=".writable-", dir=self.folder):
                pass
            strangers = [name for name in os.listdir(self.folder) if not name.startswith(".")]
        if strangers and not (self.folder / RUN_FILE).is_file():
            raise OutputError(
                f"{self.folder} is not empty and holds no run ({sorted(strangers)[0]} is there): give a new or empty "
                "directory."
            )
        for file in self.folder.glob(f"{_LOCK}*"):
            with self.lock(file.name.removeprefix(_LOCK)):
                pass

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None if it is not there.

        Raises:
            FileFormatError: it is damaged.
        """
        file = self.folder / name
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{file} is damaged ({error}): delete {self.folder} and run again.") from None
        if not isinstance(body, dict):
            raise FileFormatError(f"{file} is damaged: delete {self.folder} and run again.")
        return body

    def read_run(self) -> dict[str, Any] | None:
        """The description of the run; None if there is none.

        Raises:
            FileFormatError: it is damaged, or of version 0.1.
        """
        body = self.read(RUN_FILE)
        if body is not None and body.get("format") != RUN_FORMAT:
            raise FileFormatError(
                f"{self.folder} holds a run of metaopt-lens 0.1, whose shuffled labels, intervals and counts were "
                "wrong: run it again in a new directory."
            )
        return body

    def check(self, name: str, body: Mapping[str, Any], *, what: str) -> None:
        """Raise `OutputError` if the JSON file is there and differs from `body`; the message names the field.

        The field ``name`` may differ: a folder can be called by many names.
        """
        found = self.read(name)
        if found is None:
            return
        difference = _difference(found, {**body, "name": found.get("name")})
        if difference is not None:
            field, theirs, ours = difference
            raise OutputError(
                f"{self.folder} holds a run of another {what}: {field} is {_short(theirs)} there and {_short(ours)} "
                "here. Give another output directory, or the same settings to resume that run."
            )

    def pin(self, name: str, body: Mapping[str, Any], *, what: str) -> None:
        """Write a JSON file of the run once; from then on it must stay the same (see `check`)."""
        self.check(name, body, what=what)
        file = self.folder / name
        if file.is_file():
            return
        with self.writing():
            draft = write_text(
                file.with_name(f".{name}.{secrets.token_hex(4)}"), json.dumps(body, indent=1, ensure_ascii=False) + "\n"
            )
            try:
                os.link(draft, file)  # fails if another process was first
            except FileExistsError:
                pass
            except OSError:  # no hard links here
                draft.replace(file)
            finally:
                draft.unlink(missing_ok=True)
        self.check(name, body, what=what)

    # ---- pieces -------------------------------------------------------------------------------------------------

    def path(self, piece: str) -> Path:
        """Directory of a piece."""
        return self.folder / "pieces" / piece

    def is_finished(self, piece: str) -> bool:
        """Whether the piece is there (damaged or not)."""
        return self.path(piece).is_dir()

    def damage(self, piece: str) -> str | None:
        """What is wrong with a finished piece; None if nothing."""
        folder = self.path(piece)
        try:
            manifest = json.loads((folder / PIECE_FILE).read_text(encoding="utf-8"))
            files = dict(manifest["files"]) if manifest["kind"] == _PIECE_KIND else None
        except (OSError, ValueError, KeyError, TypeError):
            files = None
        if files is None:
            return f"{PIECE_FILE} is missing or unreadable"
        for name, digest in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != digest:
                return f"{name} has changed (its SHA-256 differs from the one in {PIECE_FILE})"
        return None

    def require_intact(self, pieces: Sequence[str], *, recompute: bool) -> list[str]:
        """Check all finished pieces; with `recompute` the damaged ones are removed, and their names returned.

        Raises:
            FileFormatError: a damaged piece, which is named.
        """
        removed = []
        for piece in pieces:
            problem = self.damage(piece) if self.is_finished(piece) else None
            if problem is None:
                continue
            if not recompute:
                raise FileFormatError(
                    f"the stored piece {self.path(piece)} is damaged: {problem}. To recompute it, pass "
                    "--recompute-damaged (recompute_damaged=True in Python)."
                )
            with self.writing():
                shutil.rmtree(self.path(piece))
            removed.append(piece)
        return removed

    def write(self, piece: str, save: Callable[[Path], object]) -> None:
        """Let `save` fill a directory, and put it in place as the piece.

        Raises:
            OutputError: the disk is full, read-only, ...
        """
        target = self.path(piece)
        with self.writing():
            draft = self.folder / f"{_DRAFT}{_flat(piece)}.{os.getpid()}-{secrets.token_hex(4)}"
            draft.mkdir(parents=True)
            try:
                save(draft)
                files = {p.relative_to(draft).as_posix(): _sha256(p) for p in sorted(draft.rglob("*")) if p.is_file()}
                manifest = {"kind": _PIECE_KIND, "piece": piece, "files": files}
                write_text(draft / PIECE_FILE, json.dumps(manifest, indent=1) + "\n")
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    draft.rename(target)
                except OSError:
                    if not self.is_finished(piece):  # else another process made it meanwhile
                        raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    @contextmanager
    def lock(self, piece: str) -> Iterator[bool]:
        """Whether this process may work on the piece; False if another one does."""
        lock = FileLock(self.folder / f"{_LOCK}{_flat(piece)}")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        except (OSError, NotImplementedError):  # a file system without locks
            yield True
            return
        try:
            with contextlib.suppress(OSError):  # for people; the lock itself is the system's
                Path(lock.lock_file).write_text(f"{os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            for draft in self.folder.glob(f"{_DRAFT}{_flat(piece)}.*"):  # of killed processes: nobody else works on it
                shutil.rmtree(draft, ignore_errors=True)
            yield True
        finally:
            # Whoever locks the removed file meanwhile finds the piece finished, or does at worst what another does.
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the block, what the disk refuses becomes an `OutputError`."""
        try:
            yield
        except OutputError:
            raise
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OutputError(
                f"{self.folder} cannot be written ({reason}). Finished pieces are kept: make room or allow writing and "
                "run the same command again, or give another output directory."
            ) from error


def require_own_version(stores: Sequence[RunStore]) -> None:
    """Refuse to add to runs of which another version of metaopt-lens made pieces.

    Args:
        stores: of the runs; those that are not begun are anyone's.

    Raises:
        OutputError: pieces of another version, by the run's own provenance.
    """
    ours = provenance()["metaopt-lens"]
    for store in stores:
        for file in sorted((store.folder / "provenance").glob("*.json")):
            log = store.read(f"provenance/{file.name}") or {}
            theirs = log.get("versions", {}).get("metaopt-lens")
            if log.get("pieces") and theirs not in (None, ours):
                raise OutputError(
                    f"{store.folder} holds pieces made by metaopt-lens {theirs}, and this is {ours}: results of two "
                    "versions are not mixed. Give another directory (--out), or install "
                    f"metaopt-lens=={theirs} to resume this one."
                )


def _flat(piece: str) -> str:
    return piece.replace("/", ".")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _difference(theirs: Any, ours: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two JSON-able values differ, and what it is in both."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in [*ours, *(k for k in theirs if k not in ours)]:
            found = _difference(theirs.get(key), ours.get(key), f"{field}.{key}" if field else str(key))
            if found is not None:
                return found
        return None
    return None if theirs == ours else (field, theirs, ours)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
