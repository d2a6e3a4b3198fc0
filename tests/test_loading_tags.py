"""loading/tags.py: tags and captions from JSON lines, every refusal with its line number."""

import json
from pathlib import Path

import pytest
import torch

from clip import Tokenizer
from errors import DataError, DataWarning
from loading.tags import open_words, read_tags, tag_key

KNOWN = ["images/a.jpg", "images/b c/ä.jpg", "images/d.jpg"]


@pytest.fixture
def tag_file(tmp_path):
    def write(*lines: str | bytes, end: bytes = b"\n", start: bytes = b"") -> Path:
        encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
        (tmp_path / "tags.jsonl").write_bytes(start + b"".join(line + end for line in encoded))
        return tmp_path / "tags.jsonl"

    return write


def test_tags_and_captions_are_read(tag_file, tmp_path):
    """BOM, CRLF, blank lines, escapes, markup, roundabout paths, absolute ones inside the root."""
    lines = (
        '{"image": "images/a.jpg", "tags": [["car", 0.93], ["traffic  light", 1], ["<|endoftext|>", 0.0]]}',
        "",
        '{"image": "./images/x/../b c/\\u00e4.jpg", "tags": [], "caption": " two\\ncars "}',
        json.dumps({"image": str(tmp_path / "images/d.jpg"), "tags": [["naïve café", 0.5]], "caption": None}),
    )
    for end, start in ((b"\n", b""), (b"\r\n", b"\xef\xbb\xbf")):
        found = read_tags(tag_file(*lines, end=end, start=start), tmp_path, KNOWN)
        assert found.tags == {
            "images/a.jpg": [("car", 0.93), ("traffic light", 1.0), ("<|endoftext|>", 0.0)],
            "images/b c/ä.jpg": [],
            "images/d.jpg": [("naïve café", 0.5)],
        }
        assert found.captions == {"images/b c/ä.jpg": "two cars"}
        assert found.unknown == []


def test_spellings_that_clip_encodes_alike_are_one_tag(tag_file, tmp_path):
    """Case, blanks and composition: the first spelling, the highest score. A bare tag has the score 1."""
    nfd = "cafe\u0301"
    tags = [["Traffic  Light", 0.4], ["TRAFFIC LIGHT", 0.9], "caf\u00e9", [nfd, 0.2], "sky"]
    line = json.dumps({"image": "images/a.jpg", "tags": tags})
    found = read_tags(tag_file(line), tmp_path, KNOWN).tags["images/a.jpg"]
    assert found == [("Traffic Light", 0.9), ("caf\u00e9", 1.0), ("sky", 1.0)]
    tokenizer = Tokenizer("weights/tiny/tokenizer")
    ids = tokenizer(["Traffic Light", "traffic  light", "caf\u00e9", nfd])
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[2], ids[3])
    assert tag_key("Traffic  Light") == tag_key("traffic light") and tag_key(nfd) == tag_key("Caf\u00e9")


@pytest.mark.parametrize("tag", ["می\u200cخواهم", "क्\u200dष", "👩\u200d👧", "naïve café", "日本"])
def test_tags_of_every_script_are_tags(tag_file, tmp_path, tag):
    """Also those that need a zero-width joiner or non-joiner."""
    line = json.dumps({"image": "images/a.jpg", "tags": [[tag, 0.9]]})
    assert read_tags(tag_file(line), tmp_path, KNOWN).tags["images/a.jpg"] == [(tag, 0.9)]


def test_paths_match_through_links_and_in_either_composition(tag_file, tmp_path):
    """An absolute path by the link to the data or behind it; a name as macOS writes it (NFD)."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    lines = [json.dumps({"image": str(base / "images/a.jpg"), "tags": ["car"]}) for base in (real, link)]
    for root in (real, link):
        for line in lines:
            assert read_tags(tag_file(line), root, KNOWN).tags == {"images/a.jpg": [("car", 1.0)]}
    nfc, nfd = "images/b c/\u00e4.jpg", "images/b c/a\u0308.jpg"
    for written, known in ((nfc, nfd), (nfd, nfc), (nfd, nfd)):
        line = json.dumps({"image": written, "tags": ["car"]})
        assert read_tags(tag_file(line), tmp_path, [known]).tags == {known: [("car", 1.0)]}


def test_a_threshold_leaves_out_what_scores_lower(tag_file, tmp_path):
    """At the threshold a tag stays; an image may be left without any, and has then no words."""
    lines = [
        '{"image": "images/a.jpg", "tags": [["car", 0.5], ["sky", 0.4]]}',
        '{"image": "images/d.jpg", "tags": [["car", 0.3]]}',
    ]
    for threshold, expected in ((None, [["car", "sky"], ["car"]]), (0.5, [["car"], []])):
        paths = ["images/a.jpg", "images/d.jpg"]
        words = open_words("tagging", str(tag_file(*lines)), [], tmp_path, paths, threshold)
        assert [words(path, []) for path in paths] == expected


def test_a_line_of_a_megabyte(tag_file, tmp_path):
    """Within the limits of tags it is read; beyond them it is refused in one short sentence."""
    line = json.dumps({"image": "images/a.jpg", "tags": [[f"{i:03d}" + "x" * 197, 0.5] for i in range(1000)]})
    line += " " * (2**20 - len(line))
    assert len(read_tags(tag_file(line), tmp_path, KNOWN).tags["images/a.jpg"]) == 1000
    line = json.dumps({"image": "images/a.jpg", "tags": ["car"] * 150_000})
    with pytest.raises(DataError, match="line 1: .*a list of at most 1000 pairs") as caught:
        read_tags(tag_file(line), tmp_path, KNOWN)
    assert len(str(caught.value)) < 500


GOOD = '{"image": "images/a.jpg", "tags": [["car", 0.93]]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "../../x.jpg", "tags": []}', r"image '\.\./\.\./x\.jpg' is outside of"),
        ('{"image": "/etc/passwd", "tags": []}', "image '/etc/passwd' is outside of"),
        ('{"image": "images/../../x.jpg", "tags": []}', "is outside of"),
        ('{"tags": []}', 'an object with "image"'),
        ('["images/a.jpg"]', 'an object with "image"'),
        ('{"image": "images/d.jpg", "Tags": ["sky"]}', 'must have "tags" or a "caption"'),
        ('{"image": "images/d.jpg", "tags": [["sky", true]]}', r"score in 0\.\.1"),
        ('{"image": 3}', 'an object with "image"'),
        ('{"image": "images/d.jpg", "tags": [["car", 0.93]]', "one whole JSON object"),
        ("[" * 100_000, "one whole JSON object"),
        (b'{"image": "images/d.jpg", "caption": "\xff"}', "not UTF-8"),
        ('{"image": "images/d.jpg", "tags": {"car": 1}}', "a list of at most 1000 pairs"),
        (
            json.dumps({"image": "images/d.jpg", "tags": [["car", 1]] * 10_000}),
            "a list of at most 1000 pairs",
        ),
        ('{"image": "images/d.jpg", "tags": [7]}', r'a pair like \["car", 0\.93\] .* not 7'),
        ('{"image": "images/d.jpg", "tags": [["car", 1.5]]}', r"score in 0\.\.1"),
        ('{"image": "images/d.jpg", "tags": [["car", NaN]]}', r"score in 0\.\.1"),
        ('{"image": "images/d.jpg", "tags": [["car", "0.9"]]}', r"score in 0\.\.1"),
        ('{"image": "images/d.jpg", "tags": [["", 0.9]]}', "1 to 200 printable characters, not ''"),
        ('{"image": "images/d.jpg", "tags": [["c\\u0000r", 0.9]]}', "1 to 200 printable characters"),
        ('{"image": "images/d.jpg", "tags": ["\\ud83d"]}', "1 to 200 printable characters"),
        ('{"image": "images/d.jpg", "tags": ["\\u200c"]}', "1 to 200 printable characters"),
        (json.dumps({"image": "images/d.jpg", "tags": [["x" * 2**20, 1]]}), "1 to 200 printable characters"),
        ('{"image": "images/d.jpg", "caption": ["a"]}', "1 to 10000 printable characters"),
        (GOOD, r"images/a\.jpg has tags in line 1 already"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tag_file, tmp_path, line, message):
    with pytest.raises(DataError, match=rf"tags\.jsonl, line 3: .*{message}") as caught:
        read_tags(tag_file(GOOD, "", line), tmp_path, KNOWN)
    assert len(str(caught.value)) < 500


def test_unknown_images_are_counted_and_named(tag_file, tmp_path):
    """At most ten of them; a file that is about none of ours, or is absent, is refused."""
    others = [f'{{"image": "other/{i}.jpg", "tags": []}}' for i in range(12)]
    with pytest.warns(
        DataWarning, match=r"12 images are not in the data set: other/0\.jpg, .*9\.jpg, \.\.\.$"
    ):
        found = read_tags(tag_file(GOOD, *others), tmp_path, KNOWN)
    assert [*found.tags] == ["images/a.jpg"]
    assert found.unknown == [f"other/{i}.jpg" for i in range(12)]
    with pytest.raises(DataError, match="has none of the 3 images"):
        read_tags(tag_file(*others), tmp_path, KNOWN)
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read \(No such file"):
        read_tags(tmp_path / "absent.jsonl", tmp_path, KNOWN)
