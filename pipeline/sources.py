"""Where bytes come from: a mirror folder, the Hugging Face hub, the official addresses; checked against pinned hashes.

For the real corpora the first route that answers is taken. A route does not answer when it is not configured or cannot
be reached (`Unanswered`); what was tried is printed. Bytes that came and are wrong are an error and never a reason to
try the next route. Set QRNN_DATA_MIRROR to a folder of the files named in `MIRROR` to work offline.
"""

import contextlib
import hashlib
import http.client
import json
import lzma
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files, paths
from pipeline.corpora.progress import Progress
from pipeline.errors import UserError

MIRROR_VARIABLE = "QRNN_DATA_MIRROR"
TIMEOUT_S = 15.0
HUB_TIMEOUT_S = 5.0
SPARE_BYTES = 64 * 2**20
CHUNK_BYTES = 2**20
BLOCK_BYTES = 4096  # what a small file takes on most disks
_NETWORK = (OSError, ValueError, http.client.HTTPException)  # what urllib raises


class Unanswered(Exception):
    """A route is not configured or cannot be reached; says why in a few words."""


@dataclass(frozen=True)
class Packed:
    """One xz file of the mirror: sha256 and size as it lies there, and unpacked."""

    packed: str
    packed_bytes: int
    unpacked: str
    unpacked_bytes: int


MIRROR = {
    "ptb.train.txt.xz": Packed(
        "aa7c7ac769e4614f02494a5c0426d7fc5226ba2c96cec8f897d7af9ff5d6945b", 1190972,
        "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf", 5101618),
    "ptb.valid.txt.xz": Packed(
        "db806f69dbaa34525f88b45b027965d4acf3e8ae3e238fe856b0802d75799a6e", 112024,
        "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2", 399782),
    "ptb.test.txt.xz": Packed(
        "a97f11d96f2e0690356d55a720f1c01d1745586cbc687fc4f609d6cd49ea4930", 123576,
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0", 449945),
    "imdb.train.jsonl.xz": Packed(
        "3e73fba33dd6e2b6c306fae37b0ef6fe10abc6073197a1011f613a4f15444fb4", 9121016,
        "ead2ddb3f276dc031c966caeb452968726f911e9355df50e72bd2b0f9014b2be", 34810970),
    "imdb.test.jsonl.xz": Packed(
        "e0a7aa901097a45f5a26f204fca0bb05641fd54ca6f0884b68349aac070c9ef2", 8883368,
        "3da8a03a17f15e9b429da917a86727273eb9f68977ff74ed04854969a97c11d2", 34004568),
    "iwslt.train.lctok.de.xz": Packed(
        "4f8b43fca78526dc50c891918e735aeda2b0ed3517b97bfd0c2781d9e3ce0419", 2204720,
        "66505d108a7a03dee578123b3ce9b45948b5eed3f69a45feb44a417f5fc3c955", 8363355),
    "iwslt.train.lctok.en.xz": Packed(
        "01f351208f0df8c08cb6ea17d7b5d260bf45d2069e791aab470fab71c5151544", 2017576,
        "fb7672f01ebdde383547d049a3f218703ac9ceee4005aca27cad70d70c4f45d7", 7566619),
    "iwslt.tst2013.lctok.de.xz": Packed(
        "f2e8c8f152f25a1c092cc5e4c634e02c4f99a7a3ea0289c4b0d3c869300c7331", 36456,
        "c882a21acad234958156ce800c4b4424dd9b05ae48c62fead7b384a73fafe939", 111561),
    "iwslt.tst2013.lctok.en.xz": Packed(
        "de1c5b4039f32afca3352d194d9e9eb4b88e34944042eb9733fd03deea46c8c7", 32792,
        "d22f996c1376ef7b8abc5ce8efd9f6749f7c540cedbda6e7f402570944688ae4", 100557),
    "iwslt.tst2014.lctok.de.xz": Packed(
        "97b4ee8d6c898eede89d44269445ad2ca0c3be294b562dadaf4d0771c0313127", 44520,
        "00a9ddaa618f14516f8bca8ae668f1b3ff07f424cb7252ab1546518c4e90327f", 136046),
    "iwslt.tst2014.lctok.en.xz": Packed(
        "b2a23e59e80d4f7b43c046ad2bccf4ab5dc27486d348a07cab44b6cde6914ce2", 40220,
        "6faf5f153cacdb4561071562473f362817b5672ff801345f6ed0bfbb8514057f", 121147),
    "glove.840B.300d.subset.txt.xz": Packed(
        "436a001cf2fafec3842625e7a37e445bd0a5d69d91071fc1a9ce76b1464d80c4", 3419628,
        "f57ba2e24167435e766ce1b3df4a5d2c91cc89a9b59ce22ee54b134ca113175f", 10504883),
}  # fmt: skip


@dataclass(frozen=True)
class Address:
    """A file on the network: its URL, its pinned hash as `<algorithm>:<hex>`, and about how large it is."""

    url: str
    hash: str
    bytes: int

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def first_answering(
    what: str, routes: Mapping[str, Callable[[Path], None]], folder: Path, content: Mapping[str, str]
) -> None:
    """Fills `folder` by the first route that answers; the folder is whole or absent.

    Args:
        routes: name -> function that writes the raw files and their provenance into the folder it is given.
        content: file name -> sha256 that any route has to give.

    Raises:
        UserError: no route answers, or one gave other bytes than those pinned.
    """
    tried = []
    for name, route in routes.items():
        try:
            with files.replacing_folder(folder) as temporary:
                need_space(temporary, 0, f"the raw text of {what}")
                route(temporary)
                for file, expected in content.items():
                    require_hash(temporary / file, f"sha256:{expected}", f"{what}: {file} by route {name}")
        except Unanswered as reason:
            tried.append(f"{name}: {reason}")
            print(f"{what}: route {tried[-1]}", flush=True)
        else:
            print(f"{what}: raw text by route {name}", flush=True)
            return
    raise UserError(f"{what}: no route to the text answers; {'; '.join(tried)}")


class Mirror:
    """A folder of xz files, each checked packed and unpacked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unpack(self, name: str, target: Path) -> str:
        """Writes the text of one file to `target`; gives the sha256 of the packed file.

        Raises:
            UserError: the file is missing, truncated, or has another hash.
        """
        source, pin = self.folder / name, MIRROR[name]
        if not source.is_file():
            raise UserError(f"{source}: no such file in the mirror; expected one with sha256 {pin.packed}")
        found = files.sha256_file(source)
        if found != pin.packed:
            raise UserError(f"{source}: expected {pin.packed_bytes} bytes with sha256 {pin.packed}, "
                            f"found {source.stat().st_size} bytes with sha256 {found}")  # fmt: skip
        need_space(target.parent, pin.unpacked_bytes, name)
        with lzma.open(source) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, CHUNK_BYTES)
        require_hash(target, f"sha256:{pin.unpacked}", f"{source} unpacked")
        return found


def mirror() -> Mirror:
    """The mirror that QRNN_DATA_MIRROR names.

    Raises:
        Unanswered: the variable is not set.
        UserError: it names no folder.
    """
    value = os.environ.get(MIRROR_VARIABLE, "")
    if not value:
        raise Unanswered(f"{MIRROR_VARIABLE} is not set")
    if not Path(value).is_dir():
        raise UserError(f"{MIRROR_VARIABLE}: expected a folder, got {value!r}")
    return Mirror(Path(value))


class Hub:
    """Parquet files of the Hugging Face hub, by `datasets`."""

    def __init__(self, base: str) -> None:
        self.base = base

    def rows(self, library: Any, pattern: str) -> Any:
        """Rows of the files `<owner>/<set>@<revision>/<path pattern>`; `library` as pipeline.corpora.loading has it.

        Raises:
            Unanswered: the files cannot be reached, or what answers is not the hub.
            UserError: they are not what they should be, or do not fit on the disk.
        """
        address = f"{self.base}{pattern}"
        print(f"hub: loading {address}", flush=True)
        try:
            return library.load("parquet", address)
        except _no_answer() as error:
            raise Unanswered(f"{address}: {_short(error)}") from None
        except (UserError, OSError, ValueError) as error:
            raise UserError(f"{address}: expected tables of the hub: {_short(error)}") from None


def hub() -> Hub:
    """The hub, after a look whether it can be reached: that fails in seconds where its library retries for minutes.

    Raises:
        Unanswered: offline by HF_HUB_OFFLINE, or unreachable.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Unanswered("HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(endpoint, timeout=HUB_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers, which is all that was asked
    except _NETWORK as error:
        raise Unanswered(f"{endpoint}: {_short(error)}") from None
    # Read when huggingface_hub is first imported, which is after this.
    os.environ.setdefault("HF_HUB_CACHE", str(paths.downloads() / "hub"))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", f"{HUB_TIMEOUT_S:.0f}")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", f"{TIMEOUT_S:.0f}")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return Hub("hf://datasets/")


def _no_answer() -> tuple[type[Exception], ...]:
    """What the hub's client raises when it gets no answer, a refusal, or a page where the hub has JSON.

    Its own error's parents tell its HTTP library's; one of them is OSError, which a full disk is too.
    """
    from huggingface_hub.errors import HfHubHTTPError

    parents = (parent for parent in HfHubHTTPError.__bases__ if parent is not OSError)
    return (HfHubHTTPError, *parents, ConnectionError, TimeoutError, FileNotFoundError, json.JSONDecodeError)


def download(address: Address) -> Path:
    """The file of an address under `paths.downloads()`, where it is found again by its hash.

    What broke off is kept beside it as `.part`, and the next call goes on from there if the server allows it.

    Raises:
        Unanswered: the address cannot be reached.
        UserError: it broke off, has another hash, or does not fit on the disk; or another process downloads it.
    """
    target = paths.downloads() / f"{address.hash.split(':')[1]}-{address.name}"
    if target.is_file():
        require_hash(target, address.hash, str(target), "; delete it to have it fetched anew")
        return target
    with files.alone(target.with_name(f".{target.name}.lock"), f"the download of {address.name}"):
        part = target.with_name(f"{target.name}.part")
        _receive(address, part)
        try:
            require_hash(part, address.hash, address.url)
        except UserError:
            part.unlink()
            raise
        os.replace(part, target)
    return target


def _receive(address: Address, part: Path) -> None:
    """Fills a file that an earlier call may have begun."""
    begun = part.stat().st_size if part.is_file() else 0
    with _opened(address, begun) as response:
        if response.status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # there is no more of it
            return
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            begun = 0
        length = response.headers.get("Content-Length") or ""
        size = begun + int(length) if length.isdigit() else 0
        left = (size or address.bytes) - begun
        need_space(part.parent, left, address.name)
        received = begun
        with part.open("ab" if begun else "wb") as file, Progress(f"download {address.name}", left, "bytes") as bar:
            while chunk := _read(response, address, received):
                file.write(chunk)
                received += len(chunk)
                bar.add(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if size and received != size:
        raise UserError(f"{address.url}: broke off after {received} of {size} bytes; run again to go on")


def _opened(address: Address, begun: int) -> Any:
    """The answer to a request for the bytes from `begun` on; that there are none is an answer too."""
    request = urllib.request.Request(address.url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except _NETWORK as error:
        if getattr(error, "code", None) == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return error
        raise Unanswered(f"{address.url}: {_short(error)}") from None


def _read(response: Any, address: Address, received: int) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except _NETWORK as error:
        raise UserError(
            f"{address.url}: broke off after {received} bytes: {_short(error)}; run again to go on"
        ) from None


@contextlib.contextmanager
def extracted(archive: Path, wanted: Callable[[str], bool]) -> Iterator[Path]:
    """A temporary folder with the regular files of a tar archive whose name is `wanted`; links are left out.

    They are written one by one: tarfile's own filters came with Python 3.11.4, and some systems have 3.11.2.

    Raises:
        UserError: no readable archive, or a member (wanted or not) that would land outside the folder.
        OSError: the disk is full, or cannot be read or written.
    """
    with tempfile.TemporaryDirectory(prefix=".extract-", dir=archive.parent) as name:
        folder = Path(name)
        try:
            with tarfile.open(archive) as tar:
                _require_inside(archive, tar.getnames())
                members = [member for member in tar if member.isfile() and wanted(member.name)]
                blocks = sum(-(-member.size // BLOCK_BYTES) for member in members)
                need_space(folder, blocks * BLOCK_BYTES, archive.name)
                for member in members:
                    target = folder / member.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        shutil.copyfileobj(tar.extractfile(member), file)
        except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the archive's
                raise
            raise UserError(f"{archive}: expected a tar archive: {_short(error)}") from None
        yield folder


def _require_inside(archive: Path, names: Iterable[str]) -> None:
    for name in names:
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise UserError(f"{archive}: refused the member {name!r}, which would land outside the folder")


def copy(source: Path, target: Path) -> None:
    need_space(target.parent, source.stat().st_size, target.name)
    shutil.copyfile(source, target)


def need_space(folder: Path, size: int, what: str) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        UserError: fewer than `size` bytes and a reserve are free where `folder` lies.
    """
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise UserError(f"{what}: expected {(size + SPARE_BYTES) / 1e6:.0f} MB free on the disk of {folder}, "
                        f"found {free / 1e6:.0f} MB")  # fmt: skip


def require_hash(path: Path, expected: str, what: str, remedy: str = "") -> None:
    """Checks a file against `<algorithm>:<hex>`; the message ends with the remedy.

    Raises:
        UserError: the file is missing or has another hash.
    """
    algorithm, digest = expected.split(":")
    if not path.is_file():
        raise UserError(f"{what}: expected {algorithm} {digest}, found no such file")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != digest:
        raise UserError(f"{what}: expected {algorithm} {digest}, found {found} ({path.stat().st_size} bytes){remedy}")


def _short(error: BaseException) -> str:
    """The error in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
