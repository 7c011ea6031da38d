"""Data sets of Debian packages, text of one's own, the tokenizer and the batches; nothing is downloaded here."""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattn.models.data import MissingData, fetch, folder, help_pairs, help_text, read_pairs, read_text
from pyattn.models.data.__main__ import main
from pyattn.models.text import END, PAD, START, batches, place, split, split_text, train_tokenizer, windows

# ---- fetching ----------------------------------------------------------------------------------------------

APT_GET = """#!/bin/sh
echo "$@" >> "$CALLS"
shift
for package; do echo "$package" > "${package}_1_all.deb"; done
"""
DPKG_DEB = """#!/bin/sh
mkdir -p "$3/usr"
cp "$2" "$3/usr/"
"""
FAILS = '#!/bin/sh\nmkdir -p unpacked\necho "E: no space on $1" >&2\nexit 100\n'


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A folder for data, and one of programs, of which none is there but two that act apt-get and dpkg-deb."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "mkdir", "cp"):
        (programs / name).symlink_to(next(p for p in (Path("/bin", name), Path("/usr/bin", name)) if p.exists()))
    for name, text in {"apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYATTN_DATA", str(tmp_path / "data" / "sets"))
    return tmp_path


def test_folder(monkeypatch):
    monkeypatch.setenv("PYATTN_DATA", "~/elsewhere")
    assert folder() == Path.home() / "elsewhere"
    for unset in (lambda: monkeypatch.setenv("PYATTN_DATA", ""), lambda: monkeypatch.delenv("PYATTN_DATA")):
        unset()
        assert folder() == Path.home() / ".cache" / "pyattn"


def test_fetch_unpacks_all_packages_of_a_set_once(debian):
    lines = []
    fetch(["help"], lines.append)
    fetch(["help"], lines.append)
    assert (debian / "calls").read_text() == "download libreoffice-help-en-us libreoffice-help-de\n"
    assert [path.name for path in folder().iterdir()] == ["help"], "nothing else is left there"
    assert sorted(path.name for path in (folder() / "help" / "usr").iterdir()) == [
        "libreoffice-help-de_1_all.deb",
        "libreoffice-help-en-us_1_all.deb",
    ]
    assert lines == [
        f"help: fetching libreoffice-help-en-us, libreoffice-help-de into {folder()}/help",
        f"help: is in {folder()}/help",
    ]


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("apt-get", "apt-get download libreoffice-help-en-us libreoffice-help-de"),
        ("dpkg-deb", "dpkg-deb -x libreoffice-help-de_1_all.deb unpacked"),
    ],
)
def test_a_failure_says_why_and_leaves_nothing(debian, capsys, program, command):
    working = (debian / "bin" / program).read_text()
    (debian / "bin" / program).write_text(FAILS)
    with pytest.raises(RuntimeError, match=f"`{re.escape(command)}` failed .*`apt-get update`(.|\n)*E: no space on"):
        fetch(["help"])
    assert list(folder().iterdir()) == []
    with pytest.raises(SystemExit, match="2"):
        main(["help"])
    assert f"python -m pyattn.models.data: `{command}` failed" in capsys.readouterr().err
    (debian / "bin" / program).write_text(working)
    main(["help"])
    assert capsys.readouterr().out.startswith("help: fetching ")
    assert (folder() / "help").is_dir()


@pytest.mark.parametrize("program", ["apt-get", "dpkg-deb"])
def test_a_program_that_is_not_there(debian, program):
    (debian / "bin" / program).unlink()
    with pytest.raises(RuntimeError, match=rf"{program} is not there \(.*Debian"):
        fetch(["help"])
    assert list(folder().iterdir()) == []


def test_an_unknown_set(debian, capsys):
    with pytest.raises(ValueError, match=r"names must be among help, glosses, .*, got music, art"):
        fetch(["help", "music", "art"])
    with pytest.raises(SystemExit, match="2"):
        main(["music"])
    assert ", got music\n" in capsys.readouterr().err
    assert not folder().exists(), "nothing is fetched, not even what is known"


# ---- LibreOffice's help ------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html><html><head><title>Title</title><script>var x = "<p>no</p>";</script></head><body>
<header id="TopLeftHeader"><p>LibreOffice Help</p></header>
<div id="DisplayArea" itemprop="softwareHelp">{}</div>
<footer><h3>Help content debug info:</h3><p>This page is: x</p></footer></body></html>"""


def page(root, language, name, body):
    path = root / "usr/share/libreoffice/help" / language / "text" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PAGE.format(body), encoding="utf-8")


def pages(root, name, english, german):
    page(root, "en-US", name, english)
    page(root, "de", name, german)


def p(id, text):
    return f'<p id="{id}">{text}</p>'


def test_blocks_of_a_page(tmp_path):
    body = """<a name="x"></a><h1 id="h">Open  &amp;
      close</h1>
      <p id="a">Press <span class="switch"><span hidden="true" class="MAC">Command <span>+</span> Z</span><span
      hidden="true">Ctrl </span></span>now.<br>Then wait.</p>
      <pre>Sub <code>Main</code></pre><script>if (1 < 2) p()</script>
      <table><tr><td id="c">cell</td><td><p id="d">Für Ü</p> </td></tr></table><ul><li>one<li>two</ul>
      <style>p {}</style>after<p id="e"> </p>"""
    page(tmp_path, "en-US", "a.html", body)
    lines = ["Open & close", "Press Ctrl now. Then wait.", "cell", "Für Ü", "one", "two", "after"]
    assert help_text(tmp_path) == "\n".join(lines) + "\n"


def test_pairs_are_made_by_ids(tmp_path):
    english = p("a", "apple") + p("p", "pear") + p("e", "") + p("o", "only here") + "<p>link</p>" + p("t", "1")
    german = p("p", "Birne") + p("a", "Apfel") + p("e", "leer") + "<p>Verweis</p>" + p("t", "1") + p("n", "nur hier")
    pages(tmp_path, "deep/er/a.html", english, german)
    page(tmp_path, "en-US", "b.html", p("a", "not translated"))
    assert help_pairs(tmp_path) == [("apple", "Apfel"), ("pear", "Birne"), ("link", "Verweis")]


def test_an_id_that_comes_several_times(tmp_path):
    pages(tmp_path, "a.html", p("a", "one") + p("a", "two"), p("a", "eins") + p("a", "zwei"))
    pages(tmp_path, "b.html", p("a", "three") + p("a", "four"), p("a", "vier"))  # which of them?
    pages(tmp_path, "c.html", p("a", "head"), '<h1 id="a">Kopf</h1>')
    assert help_pairs(tmp_path) == [("one", "eins"), ("two", "zwei")]


def test_each_pair_once_and_none_too_long(tmp_path):
    words = {n: " ".join(["w"] * n) for n in (3, 4, 40, 41)}
    sides = [("a", "b"), ("a", "c"), (words[40], "b"), (words[41], "b"), ("a", words[41]), (words[4], words[3])]
    english, german = ("".join(p(i, pair[side]) for i, pair in enumerate(sides)) for side in (0, 1))
    for name in ("a.html", "b.html"):
        pages(tmp_path, name, english, german)
    assert help_pairs(tmp_path) == [sides[0], sides[1], sides[2], sides[5]]
    assert help_pairs(tmp_path, longest=3) == sides[:2]


def test_text_of_pages_in_order_each_block_once(tmp_path):
    page(tmp_path, "en-US", "b/c.html", p("a", "first") + p("b", "menu") + p("c", "last") + p("d", "last"))
    page(tmp_path, "en-US", "a/z.html", p("a", "menu") + p("b", "a"))
    page(tmp_path, "en-US", "a/zz.html", p("b", "menu"))
    assert help_text(str(tmp_path)) == "menu\na\n\nfirst\nlast\n"


@pytest.mark.parametrize("read", [help_pairs, help_text])
def test_a_set_that_is_missing(debian, read):
    commands = "`make data` or `python -m pyattn.models.data help`"
    for root, where in [(None, folder() / "help"), (debian, debian)]:
        with pytest.raises(MissingData, match=re.escape(f"the set 'help' is not in {where}: {commands}")):
            read(root)


def test_a_language_that_is_missing(tmp_path):
    page(tmp_path, "en-US", "a.html", p("a", "one"))
    with pytest.raises(MissingData):
        help_pairs(tmp_path)


@pytest.fixture(scope="module")
def fetched_pairs():
    try:
        return help_pairs()
    except MissingData as error:
        pytest.skip(str(error))


def test_the_set_itself(fetched_pairs):
    lengths = [max(len(side.split()) for side in pair) for pair in fetched_pairs]
    assert len(fetched_pairs) > 30_000
    assert sum(length <= 15 for length in lengths) > 21_000
    assert max(lengths) == 40
    assert all(pair[0] and pair[1] for pair in fetched_pairs)
    assert len(help_text()) > 2_500_000


# ---- text of one's own -------------------------------------------------------------------------------------


def test_read_pairs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffa b\tc\r\nd\u2028e\t f \n".encode())
    assert read_pairs(path) == read_pairs(str(path)) == [("a b", "c"), ("d\u2028e", "f")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nc\n", r", line 2: must be source<TAB>target, got 'c'"),
        (b"a\tb\n\nc\td\n", r", line 2: must be source<TAB>target, got ''"),
        (b"a\tb\tc\n", r", line 1: must be source<TAB>target, got 'a\tb\tc'"),
        (b"a\tb\na\t \n", r", line 2: must be"),
        (b" \tb\n", r", line 1: must be"),
        (b"\xef\xbb\xbfa\tb\na\t\xff\n", ", line 2: must be UTF-8, but invalid start byte"),
        (b" \n", " is empty"),
        (b"", " is empty"),
    ],
)
def test_pairs_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{message}")):
        read_pairs(path)


def test_read_text(tmp_path):
    (tmp_path / "b.txt").write_text("bé\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("a\n\na", encoding="utf-8")
    (tmp_path / "c.md").write_text("no")
    assert read_text(tmp_path / "b.txt") == "bé\n"
    assert read_text(str(tmp_path)) == "a\n\na\n\nbé\n"
    (tmp_path / "c.txt").write_bytes(b"c\n\xe4")
    with pytest.raises(ValueError, match=r"c\.txt, line 2: must be UTF-8"):
        read_text(tmp_path)
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"c\.txt is empty"):
        read_text(tmp_path)


@pytest.mark.parametrize("read", [read_pairs, read_text])
def test_a_path_that_is_missing(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        read(tmp_path / "none")


def test_a_folder_without_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no files"):
        read_text(tmp_path)


# ---- what is held out --------------------------------------------------------------------------------------


def test_split_by_the_source():
    pairs = [(f"source {i % 2000}", f"target {i}") for i in range(4000)]
    train, validation, test = split(pairs)
    assert Counter(train + validation + test) == Counter(pairs)
    sources = [{source for source, _ in part} for part in (train, validation, test)]
    assert sum(map(len, sources)) == 2000, "no source is in two parts"
    assert len(validation) == pytest.approx(200, abs=60)
    assert len(test) == pytest.approx(400, abs=80)
    assert [source for source, _ in validation[:4]] == [f"source {i}" for i in (16, 28, 42, 47)], "on every machine"
    assert set(split(pairs[:100])[2]) <= set(test), "others do not matter"
    by_target = split(pairs, key=lambda pair: pair[1].encode())
    assert by_target[2] == [pair for pair in pairs if place(pair[1]) < 0.1] != test
    assert split(pairs, 0, 0) == (pairs, [], [])
    assert split(pairs, 1, 0) == ([], [], pairs)


@pytest.mark.parametrize("parts", [(-0.1, 0.1), (0.1, -0.1), (0.6, 0.5)])
def test_parts_that_are_none(parts):
    with pytest.raises(ValueError, match="held_out and validation must be parts of 1"):
        split([], *parts)


@given(st.text("ab\n", max_size=30), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_split_text(text, fraction):
    try:
        first, last = split_text(text, fraction)
    except ValueError:
        assert "\n" not in text[: len(text) - max(1, round(len(text) * fraction))]
        return
    assert first + last == text
    assert first.endswith("\n")
    assert len(last) >= max(1, round(len(text) * fraction))
    assert len(last.partition("\n")[2]) < max(1, round(len(text) * fraction)), "a line less is too little"


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_a_fraction_that_is_none(fraction):
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1"):
        split_text("a\nb\nc", fraction)


# ---- the tokenizer -----------------------------------------------------------------------------------------

TEXTS = ["Open the file, then save it. </s></s> <pad> <s>", "Öffnen Sie die Datei, und speichern Sie sie. </s>"] * 20
TOKENIZER = train_tokenizer(TEXTS, 300)


@given(st.text())
@pytest.mark.parametrize("extra", ["", "</s>", " <s>", "<pad>\r\n \t\u2028\x00", "👩‍👩‍👧 \u00a0 \ud7ff"])
def test_any_string_makes_the_round_trip(extra, text):
    ids = TOKENIZER.encode(extra + text).ids
    assert TOKENIZER.decode(ids) == extra + text
    assert TOKENIZER.decode([START, *ids, END, PAD]) == extra + text
    assert not {PAD, START, END} & set(ids)


def test_what_a_tokenizer_has():
    assert TOKENIZER.get_vocab_size() == 300
    assert [TOKENIZER.id_to_token(i) for i in (PAD, START, END)] == ["<pad>", "<s>", "</s>"]
    assert (PAD, START, END) == (0, 1, 2)
    assert len(TOKENIZER.encode(TEXTS[0]).ids) < len(TEXTS[0]) / 1.5, "it has learned words"
    assert train_tokenizer(iter(TEXTS), 300).to_str() == TOKENIZER.to_str()
    assert train_tokenizer([], 259).get_vocab_size() == 259


def test_a_vocabulary_without_room_for_bytes():
    with pytest.raises(ValueError, match="vocabulary must be at least 259, got 258"):
        train_tokenizer(TEXTS, 258)


def test_without_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pyattn\[models\]'"):
        train_tokenizer(TEXTS, 300)


# ---- batches -----------------------------------------------------------------------------------------------


def random_pairs(n, longest=50):
    draw = random.Random(0)
    lengths = [draw.randrange(1, longest) for _ in range(n)]
    return [([3 + i] * s, [4 + i] * draw.randrange(s // 2, s + 1)) for i, s in enumerate(lengths)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unpadded(batch):
    """The pairs that a batch was made of; what else is in its tensors is checked here."""
    source, source_lengths, target, target_lengths = batch
    assert source.dtype == target.dtype == torch.int64
    assert source.shape == (len(source_lengths), max(source_lengths))
    assert target.shape == (len(target_lengths), max(target_lengths) + 1)
    for row, n in [*zip(source, source_lengths, strict=True), *zip(target[:, 1:], target_lengths, strict=True)]:
        assert not row[n:].any()
    assert (target[:, 0] == START).all()
    assert all(row[n] == END for row, n in zip(target, target_lengths, strict=True))
    rows = zip(source.tolist(), source_lengths, target.tolist(), target_lengths, strict=True)
    return [(s[:n], t[1:m]) for s, n, t, m in rows]


@pytest.mark.parametrize("n", [0, 1, 9000])
def test_an_epoch_has_each_pair_once(n):
    pairs = random_pairs(n)
    assert sorted(pair for batch in batches(pairs, 1000, seeded()) for pair in unpadded(batch)) == sorted(pairs)


def test_batches_are_full_and_of_similar_lengths():
    epoch = list(batches(random_pairs(9000), 1000, seeded()))
    assert max(max(batch.source.numel(), batch.target[:, 1:].numel()) for batch in epoch) <= 1000
    tokens = sum(sum(batch.source_lengths) for batch in epoch)
    assert tokens / sum(batch.source.numel() for batch in epoch) > 0.9
    assert tokens / len(epoch) > 850


def test_batches_are_in_random_order():
    pairs = random_pairs(9000)
    first, again, other = (
        [unpadded(batch) for batch in batches(pairs, 1000, generator)] for generator in (seeded(), seeded(), seeded(1))
    )
    assert first == again
    assert sorted(map(sorted, first)) != sorted(map(sorted, other)), "not only their order"
    generator = seeded()
    epochs = [[batch.source_lengths for batch in batches(pairs, 1000, generator)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    lengths = [len(batch[0][0]) for batch in first]
    steps = [b - a for a, b in itertools.pairwise(lengths)]
    assert min(sum(step < 0 for step in steps), sum(step > 0 for step in steps)) > 0.3 * len(steps)


def test_a_pair_longer_than_a_batch_goes_alone():
    pairs = [([3] * 20, [4]), ([5], [6] * 20), ([7], [])]
    assert sorted(batch.source_lengths for batch in batches(pairs, 10, seeded())) == [[1], [1], [20]]
    assert [batch.source_lengths for batch in batches(pairs[:1], 10, seeded())] == [[20]]


def test_windows():
    ids = torch.arange(100, 110)
    found = windows(ids, 7, 200, seeded())
    assert found.shape == (200, 8)
    assert (found.diff(dim=1) == 1).all()
    assert set(found[:, 0].tolist()) == {100, 101, 102}, "from the first to the last"
    assert torch.equal(found, windows(ids, 7, 200, seeded()))
    assert not torch.equal(found, windows(ids, 7, 200, seeded(1)))
    with pytest.raises(ValueError, match="ids must be more than length=10 tokens, got 10"):
        windows(ids, 10, 1)
