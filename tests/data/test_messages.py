"""Every mistake in data gives its one line: what, the rule, what was found, and a hint."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pytest

from gpudbn.data import load
from gpudbn.errors import UserError
from tests.data.writers import idx_bytes, pictures, write_idx

X, Y = pictures(61)
FLOATS = (X.reshape(61, 15) / 255).astype(np.float32)


def npy(folder, x, y=None, **options):
    np.save(folder / "x.npy", x)
    if y is not None:
        np.save(folder / "y.npy", y)
        options["labels"] = folder / "y.npy"
    return load(folder / "x.npy", **{"need_labels": False, **options})


def npz(folder, *, options=None, **arrays):
    np.savez(folder / "f.npz", **arrays)
    return load(folder / "f.npz", **(options or {"need_labels": False}))


def raw(folder, name, content, **options):
    (folder / name).write_bytes(content)
    return load(folder / name, need_labels=False, **options)


def changed(folder, name, content, *, zipped=False, **options):
    """A folder of IDX files of which one is another."""
    write_idx(folder, zipped=zipped)
    name = name + ".gz" if zipped else name
    (folder / name).write_bytes(content((folder / name).read_bytes()))
    return load(folder, **options)


def spoilt(value, row=17, column=4, dtype=np.float32):
    x = FLOATS.astype(dtype)
    x[row, column] = value
    return x


def labelled(value, dtype):
    y = Y.astype(dtype)
    y[9] = value
    return y


CASES = {
    "unknown name": (lambda _: load("mnits"),
                     "data: must be digits, mnist, a folder .*; got mnits. Did you mean mnist?"),
    "unknown name, nothing near": (lambda _: load("zebra"), "got zebra. There is no such file here"),
    "missing file": (lambda f: (npy(f, FLOATS), load(f / "y.npy")),
                     r"y.npy: must be a file or folder; got nothing there. Did you mean .*x.npy\?"),
    "missing file, nothing near": (lambda f: load(f / "rows.npz"), "holds no name like it"),
    "missing folder": (lambda f: load(f / "a" / "b.npy"), "got nothing there, nor a folder .*a. Relative paths"),
    "missing labels file": (lambda f: (npy(f, FLOATS, Y), load(f / "x.npy", labels=f / "yy.npy")),
                            r"yy.npy: must be a file .*Did you mean .*y.npy\?"),
    "another kind of file": (lambda f: raw(f, "x.csv", b"1,2"),
                             "x.csv: must be a folder of IDX files, or an .npz or .npy file; got another kind"),
    "one IDX file": (lambda f: raw(f, "train-images-idx3-ubyte", b""), "got another kind. Give the folder it is in"),
    "folder without IDX files": (lambda f: (npy(f, FLOATS), load(f)),
                                 "must hold train-images-idx3-ubyte, .*; got x.npy. A file of arrays is given by its"),
    "empty folder": (load, "must hold train-images-idx3-ubyte.*got an empty folder"),
    "labels with other data": (lambda _: load("digits", labels="y.npy"),
                               "labels: must be given only with an .npy file of rows; got y.npy with digits"),

    "IDX cut short": (lambda f: changed(f, "train-images-idx3-ubyte", lambda c: c[:-5]),
                      "images-idx3-ubyte: must hold 915 bytes after its header; got 910. It is cut short"),
    "IDX too long": (lambda f: changed(f, "train-images-idx3-ubyte", lambda c: c + b"x"),
                     "got more. It has something appended"),
    "IDX header cut": (lambda f: changed(f, "t10k-labels-idx1-ubyte", lambda c: c[:7]),
                       "must be an IDX file; got only 7 bytes"),
    "IDX empty": (lambda f: changed(f, "t10k-labels-idx1-ubyte", lambda _: b""),
                  "must be an IDX file; got only 0 bytes"),
    "IDX magic": (lambda f: changed(f, "train-images-idx3-ubyte", lambda c: b"\0\0\x0d\3" + c[4:]),
                  "must start with the magic number 0x00000803 of images; got 0x00000d03. It is no IDX file of bytes"),
    "IDX swapped": (lambda f: changed(f, "train-images-idx3-ubyte", lambda _: idx_bytes(np.tile(Y, 3))),
                    "got 0x00000801. It holds labels"),
    "IDX swapped labels": (lambda f: changed(f, "train-labels-idx1-ubyte", lambda _: idx_bytes(X)),
                           "0x00000801 of labels; got 0x00000803. It holds images"),
    "IDX counts differ": (lambda f: changed(f, "train-labels-idx1-ubyte", lambda _: idx_bytes(Y[:60])),
                          "labels-idx1-ubyte: labels must be as many as the rows, 61; got 60"),
    "IDX without pictures": (lambda f: changed(f, "train-images-idx3-ubyte", lambda _: idx_bytes(X[:0])),
                             r"must hold at least one row and one column; got shape \(0, 5, 3\)"),
    "gz cut short": (lambda f: changed(f, "train-images-idx3-ubyte", lambda c: c[:-300], zipped=True),
                     "ubyte.gz: must be a whole gzip file; got: Compressed file ended"),
    "gz damaged": (lambda f: changed(f, "train-images-idx3-ubyte", lambda c: c[:200] + b"abcd" + c[204:], zipped=True),
                   "ubyte.gz: must be a whole gzip file; got: "),
    "gz of a short IDX": (lambda f: changed(f, "train-images-idx3-ubyte", lambda _: gzip.compress(idx_bytes(X)[:-5]),
                                            zipped=True), "must hold 915 bytes after its header; got 910"),
    "gz of a long IDX": (lambda f: changed(f, "train-images-idx3-ubyte",
                                           lambda _: gzip.compress(idx_bytes(X) + b"12345"), zipped=True), "got more"),
    "test pictures of another size": (
        lambda f: changed(f, "t10k-images-idx3-ubyte", lambda _: idx_bytes(pictures(23, 4)[0])),
        "t10k-images-idx3-ubyte: test rows must have 15 columns as the training rows; got 12"),

    "npy is something else": (lambda f: raw(f, "x.npy", b"hello, this is no array"),
                              "x.npy: must be an array as numpy.save writes it; got something else"),
    "npy empty": (lambda f: raw(f, "x.npy", b""), "x.npy: must be an array as numpy.save writes it"),
    "npy cut short": (lambda f: (npy(f, FLOATS), raw(f, "x.npy", (f / "x.npy").read_bytes()[:-8])),
                      "x.npy: must hold 3660 bytes after its header; got 3652. It is cut short: write it again"),
    "npy too long": (lambda f: (npy(f, FLOATS), raw(f, "x.npy", (f / "x.npy").read_bytes() + b"12")),
                     "got 3662. It has something appended"),
    "npy of objects": (lambda f: npy(f, np.array([[1], [2, 3]], object)),
                       "x.npy: must hold numbers; got Python objects, which are never unpickled"),
    "npy of a negative shape": (lambda f: (npy(f, FLOATS), raw(f, "x.npy", (f / "x.npy").read_bytes().replace(
        b"(61, 15), }  ", b"(-61, -15), }", 1))), r"got something else \(shape \(-61, -15\)\)"),
    "npz is no zip": (lambda f: raw(f, "x.npz", b"hello"),
                      "x.npz: must be a whole .npz file.*got: File is not a zip file"),
    "npz cut short": (lambda f: (npz(f, x=FLOATS), raw(f, "f.npz", (f / "f.npz").read_bytes()[:-300])),
                      "must be a whole .npz file"),
    "npz of other names": (lambda f: npz(f, a=FLOATS, b=Y),
                           "must hold arrays x and y, or .*got a, b. Name them: numpy.savez"),
    "npz of nothing": (npz, "must hold arrays x and y.*got nothing"),
    "npz of two kinds": (lambda f: npz(f, x=FLOATS, images=X),
                         "f.npz: must hold one array of a kind; got x and images. Rename one"),
    "npz of objects": (lambda f: npz(f, x=np.array([[1], [2, 3]], object)),
                       r"f.npz \[x\]: must hold numbers; got Python"),

    "one dimension": (lambda f: npy(f, FLOATS[0]), r"\(rows, height, width\); got \(15,\). One row: save x\[None, :\]"),
    "colour": (lambda f: npy(f, np.zeros((2, 3, 4, 3), np.float32)), r"got \(2, 3, 4, 3\). Colour: save one channel"),
    "no dimension": (lambda f: npy(f, np.float32(1)), r"got \(\). One array, not a number"),
    "five dimensions": (lambda f: npy(f, np.zeros((2, 3, 4, 3, 1), np.float32)), r"Save x.reshape\(len\(x\), -1\)"),
    "no rows": (lambda f: npy(f, FLOATS[:0]), r"must hold at least one row and one column; got shape \(0, 15\)"),
    "pictures in Fortran order": (lambda f: npy(f, np.asfortranarray(X)),
                                  "must be stored row by row; got Fortran order"),
    "complex": (lambda f: npy(f, FLOATS.astype(complex)),
                "must hold uint8, bool or floating numbers; got dtype complex128"),
    "int64": (lambda f: npy(f, X.astype(int)), r"got dtype int64. Whole numbers 0..255: save x.astype\(numpy.uint8\)"),
    "few levels": (lambda f: npy(f, X // 16), r"range 0..255, or be 0 and 1; got 0..15. Save \(x / 15\)"),
    "NaN": (lambda f: npy(f, spoilt(np.nan)),
            r"x.npy: values must lie in \[0, 1\]; got nan at row 17, column 4. Replace"),
    "infinity": (lambda f: npy(f, spoilt(np.inf)), "got inf at row 17, column 4. Replace or drop"),
    "too large": (lambda f: npy(f, spoilt(17.5)), r"got 17.5 at row 17, column 4. Scale them: \(x - x.min\(\)\)"),
    "negative": (lambda f: npy(f, spoilt(-0.25, dtype=np.float16)), "got -0.25 at row 17, column 4. Scale"),
    "far down": (lambda f: npy(f, np.where(np.arange(3_000_000)[:, None] == 2_999_990, 2, 0.5).astype(np.float32)),
                 "got 2 at row 2999990, column 0"),
    "test values": (lambda f: npz(f, x=FLOATS, x_test=spoilt(2)), r"f.npz \[x_test\]: values must lie"),
    "grey test rows of bits": (lambda f: npz(f, x=X // 128, x_test=X),
                               "values must lie in 0..1 as those of the training rows; got 255"),
    "constant rows": (lambda f: npy(f, np.full((50, 3), 0.5)), "rows must differ; got 50 with the same values"),
    "one row": (lambda f: npy(f, FLOATS[:1]), "rows must differ; got 1 with"),

    "no labels": (lambda f: npy(f, FLOATS, need_labels=True),
                  "labels: must be there for fine-tuning; got none for .*x.npy. Give them, or pretrain only"),
    "no test labels": (lambda f: npz(f, x=X, y=Y, x_test=X, options={"need_labels": True}),
                       r"got none for .*\[x_test\]"),
    "no labels in the folder": (lambda f: (write_idx(f, labels=False), load(f)),
                                "got none for .*train-images-idx3-ubyte"),
    "labels of another length": (lambda f: npy(f, FLOATS, Y[:7]),
                                 "y.npy: labels must be as many as the rows, 61; got 7"),
    "one-hot labels": (lambda f: npy(f, FLOATS, np.eye(4)[Y]),
                       r"got shape \(61, 4\). One-hot labels: save labels.argmax"),
    "negative label": (lambda f: npy(f, FLOATS, labelled(-1, np.int8)),
                       "labels must be whole numbers .*got -1 at row 9"),
    "broken label": (lambda f: npy(f, FLOATS, labelled(1.5, float)), "labels must be whole numbers .*got 1.5 at row 9"),
    "NaN label": (lambda f: npy(f, FLOATS, labelled(np.nan, float)), "got nan at row 9"),
    "huge label": (lambda f: npy(f, FLOATS, labelled(2**63, np.uint64)), "below 65536; got 9.22337e.18 at row 9"),
    "names as labels": (lambda f: npz(f, x=X, y=Y.astype(str)),
                        r"\[y\]: labels must be whole .*got dtype <U.*return_inverse"),

    "validation too large": (lambda _: load("digits", validation=1500),
                             "must leave at least one training row of the 1797 in digits; got 1500 and 300"),
    "validation is all": (lambda f: (write_idx(f), load(f, validation=61)), "of the 61 in .*; got 61 and 0"),
    "negative split": (lambda _: load("digits", validation=-1),
                       "validation: must be a count of rows or a fraction below 1; got -1"),
    "split of no meaning": (lambda _: load("digits", test=1.5), "test: must be a count .*; got 1.5"),
    "NaN split": (lambda _: load("digits", test=float("nan")), "got nan"),
    "infinite split": (lambda _: load("digits", test=float("inf")), "got inf"),
    "true split": (lambda _: load("digits", test=True), "got True"),
    "test of given test rows": (lambda f: (write_idx(f), load(f, test=5)),
                                "test: must not be set for data with test rows of their own; got 5"),
    "name too long": (lambda f: load(f / ("a" * 300 + ".npy")), "File name too long|got nothing there"),
}


@pytest.mark.parametrize(("cause", "text"), CASES.values(), ids=CASES.keys())
def test_message(cause, text, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUDBN_DATA", str(tmp_path / "cache"))
    folder = tmp_path / "f"
    folder.mkdir()
    with pytest.raises(UserError, match=text) as caught:
        cause(folder)
    message = str(caught.value)
    assert re.match(r"[^\n]+: [^\n]*must [^\n]+; got[ :][^\n]+$", message), message


@pytest.mark.parametrize("kind", ["stored.npz", "packed.npz", "x.npy", "plain", "zipped"])
def test_damaged_files_are_refused_or_read(kind, tmp_path):
    """Whatever bytes are changed or missing: rows, or one line; never a traceback."""
    target = tmp_path / kind
    np.savez(tmp_path / "stored.npz", x=X, y=Y)
    np.savez_compressed(tmp_path / "packed.npz", x=X, y=Y)
    np.save(tmp_path / "x.npy", X)
    write_idx(tmp_path / "plain")
    write_idx(tmp_path / "zipped", zipped=True)
    if target.is_dir():
        target = next(path for path in target.iterdir() if path.name.startswith("train-images"))
    good, numbers = target.read_bytes(), np.random.default_rng(0)
    messages = []
    for trial in range(150):
        bad = bytearray(good)
        for where in numbers.integers(0, 150, 2) - (150 if trial % 3 == 0 else 0):
            bad[where] = numbers.integers(0, 256)
        target.write_bytes(bad[: numbers.integers(0, len(bad))] if trial % 5 == 0 else bad)
        try:
            load(tmp_path / kind, need_labels=False).describe()
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert not any("\n" in message for message in messages)


def test_nothing_is_unpickled(tmp_path):
    """A pickle that would write a file is refused before it is read."""
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    np.save(tmp_path / "x.npy", np.array([[Harm()]]), allow_pickle=True)
    with pytest.raises(UserError, match="never unpickled"):
        load(tmp_path / "x.npy")
    assert not (tmp_path / "harm").exists()


def test_unreadable_file(tmp_path, monkeypatch):
    """An error of the operating system is the user's to mend: no traceback."""
    np.save(tmp_path / "x.npy", FLOATS)

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match=r"x.npy: must be readable; got: Permission denied"):
        load(tmp_path / "x.npy")
