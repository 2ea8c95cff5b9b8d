"""Where bytes come from: routes, pins, downloads, archives; what is wrong is named and nothing is left half-written."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import MIRROR, needs_mirror

from pipeline import paths, sources
from pipeline.corpora import ptb, raw
from pipeline.corpora.loading import library
from pipeline.errors import Busy, UserError
from pipeline.params import Fetch
from pipeline.sources import Address, Packed, Unanswered

TEXT = b" a cat sat \n the dog ran \n"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path / "project"))
    monkeypatch.delenv("QRNN_DATA_MIRROR", raising=False)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror with one good file, named by QRNN_DATA_MIRROR, its pin in place of the real one."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    packed = lzma.compress(TEXT)
    (folder / "ptb.train.txt.xz").write_bytes(packed)
    monkeypatch.setenv("QRNN_DATA_MIRROR", str(folder))
    pin = Packed(sha256(packed), len(packed), sha256(TEXT), len(TEXT))
    monkeypatch.setitem(sources.MIRROR, "ptb.train.txt.xz", pin)
    return folder


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `body`, of which `claimed` bytes are announced; heeds ranges if `ranges`; keeps what was asked for."""

    body, claimed, ranges = TEXT, str(len(TEXT)), True
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.asked.append(wanted := self.headers["Range"])
        if wanted is None or not self.ranges:
            self.answer(200, self.claimed, self.body)
        elif (rest := self.body[int(wanted.removeprefix("bytes=").removesuffix("-")) :]) == b"":
            self.answer(416, "0", b"")
        else:
            self.answer(206, str(len(rest)), rest)

    def answer(self, status: int, length: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a loopback server that serves TEXT under every name."""
    monkeypatch.setattr(Handler, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_text(folder: Path) -> None:
    (folder / "train.txt").write_bytes(TEXT)


def silent(folder: Path) -> None:
    (folder / "half.txt").write_text("half")
    raise Unanswered("nobody home")


# ---------------------------------------------------------------------------------------------------------- routes


def test_the_first_route_that_answers_is_taken_and_what_was_tried_is_printed(tmp_path, capsys):
    later = []
    routes = {"a": silent, "b": write_text, "c": later.append}
    sources.first_answering("ptb", routes, tmp_path / "raw", {"train.txt": sha256(TEXT)})
    assert everything(tmp_path / "raw") == ["train.txt"]
    assert later == []
    assert capsys.readouterr().out.splitlines() == ["ptb: route a: nobody home", "ptb: raw text by route b"]


def test_no_route_answers_names_each_with_its_reason_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError) as caught:
        sources.first_answering("ptb", {"a": silent, "b": silent}, tmp_path / "raw", {})
    assert str(caught.value) == "ptb: no route to the text answers; a: nobody home; b: nobody home"
    assert everything(tmp_path) == []


def test_wrong_content_is_an_error_and_not_a_reason_for_the_next_route(tmp_path):
    with pytest.raises(UserError, match=r"ptb: train.txt by route a: expected sha256 0{64}, found [0-9a-f]{64}"):
        sources.first_answering("ptb", {"a": write_text, "b": write_text}, tmp_path / "raw", {"train.txt": "0" * 64})
    assert everything(tmp_path) == []


def test_an_error_keeps_the_raw_text_that_was_there(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "old.txt").write_text("old")
    with pytest.raises(UserError):
        sources.first_answering("ptb", {"a": silent}, tmp_path / "raw", {})
    assert everything(tmp_path) == ["raw", "raw/old.txt"]


def test_without_mirror_and_network_fetch_says_what_was_tried(tmp_path, monkeypatch):
    nowhere = f"http://127.0.0.1:{unused_port()}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    official = {name: Address(f"{nowhere}/{name}", a.hash, a.bytes) for name, a in ptb.OFFICIAL.items()}
    monkeypatch.setattr(ptb, "OFFICIAL", official)
    with pytest.raises(UserError) as caught:
        ptb.fetch(Fetch("real"), tmp_path / "raw")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("mirror: QRNN_DATA_MIRROR is not set", f"hub: {nowhere}", f"official: {nowhere}/train.txt", "refused"):
        assert part in message
    assert not (tmp_path / "raw").exists()


# ---------------------------------------------------------------------------------------------------------- mirror


def test_mirror_unpacks_what_its_pins_allow(mirror, tmp_path):
    packed = sources.mirror().unpack("ptb.train.txt.xz", tmp_path / "train.txt")
    assert (tmp_path / "train.txt").read_bytes() == TEXT
    assert packed == sources.MIRROR["ptb.train.txt.xz"].packed


def test_mirror_that_is_no_folder_is_an_error(monkeypatch):
    monkeypatch.setenv("QRNN_DATA_MIRROR", "/no/such/folder")
    with pytest.raises(UserError, match="QRNN_DATA_MIRROR: expected a folder, got '/no/such/folder'"):
        sources.mirror()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file in the mirror; expected one with sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "expected {size} bytes .*, found {less} bytes with"),
        (lambda path: path.write_bytes(lzma.compress(b"another text\n")), "expected {size} bytes with sha256 .* found"),
    ],
    ids=["missing", "truncated", "other hash"],
)  # fmt: skip
def test_a_bad_mirror_file_is_an_error_naming_it_and_no_other_route_is_tried(mirror, tmp_path, damage, message, capsys):
    path = mirror / "ptb.train.txt.xz"
    size = path.stat().st_size
    damage(path)
    with pytest.raises(UserError, match=f"{path}: {message.format(size=size, less=size - 9)}") as caught:
        ptb.fetch(Fetch("real"), tmp_path / "raw")
    assert "\n" not in str(caught.value)
    assert "hub" not in capsys.readouterr().out
    assert not (tmp_path / "raw").exists()


def test_unpacked_bytes_are_checked_too(mirror, tmp_path, monkeypatch):
    pin = sources.MIRROR["ptb.train.txt.xz"]
    monkeypatch.setitem(sources.MIRROR, "ptb.train.txt.xz", Packed(pin.packed, pin.packed_bytes, "0" * 64, 9))
    with pytest.raises(UserError, match=r"unpacked: expected sha256 0{64}, found"):
        sources.mirror().unpack("ptb.train.txt.xz", tmp_path / "train.txt")


@needs_mirror
def test_every_file_of_the_real_mirror_has_its_pinned_hashes(tmp_path):
    for name, pin in sources.MIRROR.items():
        sources.Mirror(Path(MIRROR)).unpack(name, tmp_path / "text")
        assert (tmp_path / "text").stat().st_size == pin.unpacked_bytes
        assert (Path(MIRROR) / name).stat().st_size == pin.packed_bytes


# ------------------------------------------------------------------------------------------------------- downloads


def test_a_download_is_checked_named_by_its_hash_and_reused(server):
    first, second = sources.download(text_at(server)), sources.download(text_at(server))
    assert first == second == paths.downloads() / f"{sha256(TEXT)}-text.txt"
    assert first.read_bytes() == TEXT
    assert Handler.asked == [None]


def test_a_download_altered_on_the_disk_is_refused(server):
    address = text_at(server)
    sources.download(address).write_bytes(b"altered")
    with pytest.raises(
        UserError, match=r"text.txt: expected .*, found .* \(7 bytes\); delete it to have it fetched anew"
    ):
        sources.download(address)


def text_at(server: str) -> Address:
    return Address(f"{server}/text.txt", f"sha256:{sha256(TEXT)}", 1)


def downloads() -> list[str]:
    """Names of what lies there, the hash and the locks left out."""
    names = everything(paths.downloads())
    return [name.partition("-")[2] for name in names if not name.endswith(".lock")]


def test_a_download_with_another_hash_leaves_nothing(server):
    with pytest.raises(UserError, match=f"{server}/text.txt: expected md5 {'0' * 32}, found"):
        sources.download(Address(f"{server}/text.txt", f"md5:{'0' * 32}", 1))
    assert downloads() == []


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_or_begins_anew(server, monkeypatch, ranges):
    monkeypatch.setattr(Handler, "ranges", ranges)
    with monkeypatch.context() as short:
        short.setattr(Handler, "body", TEXT[:9])
        with pytest.raises(UserError, match=f"text.txt: broke off after 9 of {len(TEXT)} bytes; run again to go on"):
            sources.download(text_at(server))
    assert downloads() == ["text.txt.part"]
    assert sources.download(text_at(server)).read_bytes() == TEXT
    assert Handler.asked == [None, "bytes=9-"]
    assert downloads() == ["text.txt"]


@pytest.mark.parametrize("found", [TEXT, b"not at all, but as long as the text is"])
def test_of_a_download_that_has_all_bytes_the_hash_decides(server, found):
    target = sources.download(text_at(server))
    target.with_name(f"{target.name}.part").write_bytes(found)
    target.unlink()
    if found == TEXT:
        assert sources.download(text_at(server)) == target
    else:
        with pytest.raises(UserError, match=r"text.txt: expected sha256"):
            sources.download(text_at(server))
        assert downloads() == []
    assert Handler.asked == [None, f"bytes={len(found)}-"]


def test_two_downloads_of_one_file_are_not_made_at_once(server, monkeypatch):
    asked = []

    def urlopen(*_: object, **__: object) -> None:
        with pytest.raises(Busy, match=r"expected no other process at the download of text.txt"):
            sources.download(text_at(server))
        asked.append(True)
        raise OSError("no")

    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen)
    with pytest.raises(Unanswered):
        sources.download(text_at(server))
    assert asked


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n a cat",
            r"broke off after 0 bytes: .*; run again",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\n a cat", r"text.txt: expected sha256 .* \(6 bytes\)"),
    ],
)
def test_a_broken_answer_is_named(answer, message):
    with speaking(answer) as place, pytest.raises(UserError, match=message):
        sources.download(text_at(place))


def test_what_speaks_no_http_does_not_answer(monkeypatch):
    with speaking(b"220 mail.example ESMTP\r\n") as place, pytest.raises(Unanswered, match="220 mail"):
        sources.download(text_at(place))
    with speaking(b"220 mail.example ESMTP\r\n") as place:
        monkeypatch.setenv("HF_ENDPOINT", place)
        with pytest.raises(Unanswered, match="220 mail"):
            sources.hub()
    monkeypatch.setenv("HF_ENDPOINT", "http://a b")
    with pytest.raises(Unanswered, match="http://a b: "):
        sources.hub()


@contextlib.contextmanager
def speaking(answer: bytes) -> Iterator[str]:
    """The address of a port that answers whatever comes with these bytes and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as connection:
                connection.recv(2**16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def test_a_connection_that_dies_in_the_middle_is_gone_on_with(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_bytes(TEXT)
    reads = iter([TEXT[:5], ConnectionResetError("reset by peer")])

    def read(*_: int) -> bytes:
        if isinstance(part := next(reads), Exception):
            raise part
        return part

    opened = urlopened(tmp_path / "text.txt", read)
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *_, **__: opened)
    with pytest.raises(UserError, match="broke off after 5 bytes: reset by peer; run again to go on"):
        sources.download(text_at("http://x"))
    assert downloads() == ["text.txt.part"]


def urlopened(path: Path, read: object) -> object:
    response = sources.urllib.request.urlopen(path.as_uri())
    response.read = read
    return response


def test_an_address_that_cannot_be_reached_does_not_answer():
    with pytest.raises(Unanswered, match="refused"):
        sources.download(Address(f"http://127.0.0.1:{unused_port()}/text.txt", "sha256:0", 1))


def test_a_full_disk_is_seen_before_the_download(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(UserError, match=r"text.txt: expected 67 MB free on the disk of .*, found 1 MB"):
        sources.download(text_at(server))
    assert downloads() == []


def test_the_size_that_is_to_come_is_looked_for(server, mirror, tmp_path, monkeypatch):
    """9 bytes are free beyond the reserve, and the text has more."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, sources.SPARE_BYTES + 9))
    with pytest.raises(UserError, match=r"text.txt: expected 67 MB free"):
        sources.download(text_at(server))
    with pytest.raises(UserError, match=r"ptb.train.txt.xz: expected 67 MB free"):
        sources.mirror().unpack("ptb.train.txt.xz", tmp_path / "train.txt")


def test_a_full_disk_during_a_download_is_not_the_servers_fault(server):
    """/dev/full takes no byte."""
    paths.downloads().mkdir(parents=True)
    (paths.downloads() / f"{sha256(TEXT)}-text.txt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        sources.download(text_at(server))


def test_a_full_disk_stops_the_mirror_route(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40, 0))
    with pytest.raises(UserError, match="the raw text of ptb: expected 67 MB free"):
        ptb.fetch(Fetch("real"), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


# -------------------------------------------------------------------------------------------------------- archives


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_wanted_members_are_extracted_and_gone_afterwards(tmp_path):
    path = archive(tmp_path / "a.tgz", {"a/wanted.txt": TEXT, "a/other.txt": b"other"})
    with sources.extracted(path, lambda name: "wanted" in name) as folder:
        assert everything(folder) == ["a", "a/wanted.txt"]
        assert (folder / "a/wanted.txt").read_bytes() == TEXT
    assert everything(tmp_path) == ["a.tgz"]


def test_links_are_left_out(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "symbolic"), (tarfile.LNKTYPE, "hard")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    with sources.extracted(path, lambda _: True) as folder:
        assert everything(folder) == []


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt"])
def test_a_member_that_leaves_the_folder_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    path = archive(tmp_path / "in/a.tgz", {name: TEXT})
    with (
        pytest.raises(UserError, match=f"a.tgz: refused the member '{name}'"),
        sources.extracted(path, lambda _: False),
    ):
        pass
    assert everything(tmp_path) == ["in", "in/a.tgz"]


def test_what_is_no_archive_is_an_error(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"a.tgz: expected a tar archive"), sources.extracted(tmp_path / "a.tgz", bool):
        pass
    whole = archive(tmp_path / "b.tgz", {"a.txt": os.urandom(10_000)}).read_bytes()
    (tmp_path / "b.tgz").write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"b.tgz: expected a tar archive"), sources.extracted(tmp_path / "b.tgz", bool):
        pass


def test_a_full_disk_is_not_the_archives_fault(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tgz", {"a.txt": TEXT, "b.txt": TEXT})
    with monkeypatch.context() as small:
        # Two small files take two blocks.
        small.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, sources.SPARE_BYTES + 8191))
        with pytest.raises(UserError, match=r"a\.tgz: expected 67 MB free"), sources.extracted(path, lambda _: True):
            pass

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"), sources.extracted(path, lambda _: True):
        pass
    assert everything(tmp_path) == ["a.tgz"]


# ------------------------------------------------------------------------------------------------------------- hub


class Failing:
    """A library whose tables cannot be loaded."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def load(self, *_: str) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [json.JSONDecodeError("Expecting value", "<html>", 0), ConnectionError("reset"), FileNotFoundError("no such file")],
    ids=repr,
)
def test_a_hub_that_is_none_does_not_answer(error):
    with pytest.raises(Unanswered, match=re.escape(f"hf://x: {error}")):
        sources.Hub("hf://").rows(Failing(error), "x")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("no parquet")], ids=repr)
def test_bytes_of_the_hub_that_are_wrong_or_do_not_fit_are_an_error(error):
    with pytest.raises(UserError, match=r"hf://x: expected tables of the hub: .*(No space left|no parquet)"):
        sources.Hub("hf://").rows(Failing(error), "x")


def test_a_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "x.parquet").write_text("<html>no table</html>")
    with library() as datasets, pytest.raises(UserError, match=r"x.parquet: expected tables of the hub: Parquet magic"):
        sources.Hub(f"{tmp_path}/").rows(datasets, "x.parquet")


def test_a_refusal_is_an_answer(server, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.answer(403, "0", b""))
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert sources.hub().base == "hf://datasets/"


def test_the_hub_is_not_asked_when_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unanswered, match="HF_HUB_OFFLINE is set"):
        sources.hub()


def test_a_hub_that_has_not_the_files_does_not_answer_and_leaves_no_cache(tmp_path):
    """In a process of its own: the client reads its address when it is imported."""
    script = f"""
import http.server, os, threading
class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
    def log_message(self, *arguments): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{{server.server_port}}"
from pathlib import Path
from pipeline import sources
from pipeline.corpora.ptb import _hub
try:
    _hub(Path({str(tmp_path)!r}))
except sources.Unanswered as reason:
    print("unanswered:", reason)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=paths.CODE, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "unanswered: hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet" in done.stdout, done.stderr
    assert "404" in done.stdout
    assert everything(tmp_path / "home") == []


# ------------------------------------------------------------------------------------------------------ provenance


def test_raw_text_altered_after_the_fetch_is_refused(tmp_path):
    write_text(tmp_path)
    raw.seal(tmp_path, "sample", [])
    assert raw.provenance(tmp_path)["files"] == {"train.txt": sha256(TEXT)}
    (tmp_path / "train.txt").write_bytes(b"altered")
    with pytest.raises(UserError, match=r"train.txt: expected sha256 .*, found .*; run the fetch stage again"):
        raw.provenance(tmp_path)


def test_a_folder_without_provenance_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"provenance.json: no raw text; expected what the fetch stage makes"):
        raw.provenance(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"route": "sample"}'])
def test_a_provenance_cut_short_is_named(tmp_path, text):
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(UserError, match=r"provenance.json: expected what the fetch stage writes .*; run it again"):
        raw.provenance(tmp_path)
