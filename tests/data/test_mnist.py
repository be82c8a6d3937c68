"""The download of MNIST: from mirrors that work, fail, lie or stop half-way; small files, a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import re
import sys
import threading

import numpy as np
import pytest

from gpudbn.data import load, mnist
from gpudbn.errors import UserError
from tests.data.writers import idx_bytes, pictures, rows_of


class Handler(http.server.BaseHTTPRequestHandler):
    """/<behaviour>/<name>.gz"""

    def do_GET(self):
        _, behaviour, name = self.path.split("/")
        self.server.asked.append((behaviour, name))
        content = self.server.files.get(name)
        if content is None or behaviour == "absent":
            self.send_error(404)
            return
        if behaviour == "corrupt":  # a valid gzip file of other content
            content = gzip.compress(gzip.decompress(content)[:-1] + b"\xfe")
        elif behaviour == "damaged":
            content = content[:12] + b"\xff\xff\xff\xff\xff" + content[17:]
        elif behaviour == "page":
            content = b"<html>Sign in to this network</html>"
        elif behaviour == "long":
            content = gzip.compress(gzip.decompress(content) + bytes(1_000_000))
        elif behaviour == "recompressed":
            content = gzip.compress(gzip.decompress(content), compresslevel=1)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if behaviour == "truncated" else content)

    def log_message(self, *_):
        """Nothing."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that hung up is what some tests want."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, with four small files as MNIST's, and the cache folder empty."""
    (x, y), (x_test, y_test) = pictures(61), pictures(23, seed=1)
    contents = dict(zip(mnist.FILES, map(idx_bytes, (x, y, x_test, y_test)), strict=True))
    monkeypatch.setattr(mnist, "FILES", {name: (len(content), hashlib.sha256(content).hexdigest())
                                         for name, content in contents.items()})
    monkeypatch.setenv("GPUDBN_DATA", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
        server.asked = []
        server.x = x

        def mirrors(*behaviours):
            here = f"http://127.0.0.1:{server.server_port}/"
            monkeypatch.setattr(mnist, "MIRRORS", [b if "://" in b else f"{here}{b}/" for b in behaviours])

        server.mirrors = mirrors
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "mnist").iterdir())


def test_the_published_sizes_and_checksums():
    """Sizes follow from the published counts; the checksums are of the unpacked files."""
    sizes = {name: size for name, (size, _) in mnist.FILES.items()}
    assert sizes == {"train-images-idx3-ubyte": 16 + 60_000 * 784, "train-labels-idx1-ubyte": 8 + 60_000,
                     "t10k-images-idx3-ubyte": 16 + 10_000 * 784, "t10k-labels-idx1-ubyte": 8 + 10_000}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for _, digest in mnist.FILES.values())
    assert len(mnist.MIRRORS) >= 2
    assert all(re.fullmatch(r"https://\S+/", mirror) for mirror in mnist.MIRRORS)


def test_downloaded_once(server, tmp_path):
    server.mirrors("good")
    data = load("mnist", quiet=True)
    assert data.describe() == "mnist: 51 training, 10 validation and 23 test rows of 15 columns (5 x 3), 4 classes"
    np.testing.assert_array_equal(rows_of(data.train), server.x[:51].reshape(51, 15).astype("f") * np.float32(1 / 255))
    assert cached(tmp_path) == sorted(mnist.FILES)
    assert len(server.asked) == 4
    load("mnist", quiet=True)
    assert len(server.asked) == 4


def test_only_what_is_missing_or_cut_short_is_downloaded_again(server, tmp_path):
    server.mirrors("good")
    load("mnist", quiet=True)
    (tmp_path / "cache/mnist/t10k-labels-idx1-ubyte").unlink()
    (tmp_path / "cache/mnist/train-images-idx3-ubyte").write_bytes(b"half")
    load("mnist", quiet=True)
    assert [name for _, name in server.asked[4:]] == ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


CLOSED = "http://127.0.0.1:9/"
BAD = {"absent": "HTTP 404", "corrupt": "checksum .* instead of", "damaged": "Error -?[0-9]+ while decompressing",
       "page": "incorrect header check", "long": "more than 931 bytes", "truncated": r"\d+ of 931 bytes",
       CLOSED: r"Connection refused", "file:///no/such/folder/": "No such file or directory"}


@pytest.mark.parametrize("bad", BAD)
def test_the_next_mirror_is_asked(bad, server, tmp_path):
    server.mirrors(bad, "recompressed")
    assert len(load("mnist", quiet=True).train) == 51
    assert cached(tmp_path) == sorted(mnist.FILES)


@pytest.mark.parametrize(("bad", "reason"), BAD.items())
def test_without_a_good_mirror_one_line_says_why(bad, reason, server, tmp_path):
    server.mirrors(bad, CLOSED)
    text = (f"mnist: must be downloaded once, and no mirror gave train-images-idx3-ubyte; got .*{reason}.*; "
            "127.0.0.1:9: .*refused. Without the internet: --data FOLDER with its four IDX files, or --data digits")
    with pytest.raises(UserError, match=text) as caught:
        load("mnist", quiet=True)
    assert "\n" not in str(caught.value)
    assert cached(tmp_path) == []  # nothing that might be taken for the file


def test_a_name_that_cannot_be_resolved(server):
    server.mirrors("http://mirror.invalid/")
    with pytest.raises(UserError, match=r"mirror.invalid: .*(resol|Name|nodename|known)"):
        load("mnist", quiet=True)


def test_a_mirror_of_files(server, tmp_path):
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, content in server.files.items():
        (folder / name).write_bytes(content)
    server.mirrors(folder.as_uri() + "/")
    assert len(load("mnist", quiet=True).test) == 23


def test_a_cache_folder_that_cannot_be_written(server, tmp_path, monkeypatch):
    server.mirrors("good")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPUDBN_DATA", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"GPUDBN_DATA: must be a folder that can be written; got .*file"):
        load("mnist", quiet=True)


def test_the_folder_without_a_setting(monkeypatch):
    monkeypatch.setenv("GPUDBN_DATA", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert mnist.cache_folder().as_posix() == "/home/someone/.cache/gpudbn"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(server, capsys, monkeypatch):
    server.mirrors("good")
    load("mnist")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"mnist: train-images-idx3-ubyte from 127.0.0.1:{server.server_port} (0.0 MB)"
    assert len(lines) == 4
    load("mnist")
    assert capsys.readouterr().err == ""
    (mnist.cache_folder() / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    monkeypatch.setattr(sys, "stderr", Terminal())
    load("mnist")
    assert re.fullmatch(r"(\rmnist: t10k-labels-idx1-ubyte from \S+ \[#*\.*\] +\d+ %)+\n", sys.stderr.getvalue())
    assert sys.stderr.getvalue().endswith("[####################] 100 %\n")
