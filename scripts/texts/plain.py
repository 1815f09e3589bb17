"""Plain text out of files of several forms."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

BOILERPLATE = (
    "//script|//style|//noscript|//nav|//header|//footer|//form|//head"
    "|//*[contains(@class, 'navheader') or contains(@class, 'navfooter')]"
    "|//*[contains(@class, 'docnav') or contains(@class, 'nav-panel') or @class='nav']"
    "|//*[contains(@class, 'sphinxsidebar') or contains(@class, 'headerlink')]"
    "|//*[contains(@class, 'toc') or contains(@class, 'contents topic')]"
    "|//*[contains(@class, 'related') or contains(@class, 'breadcrumb')]"
    "|//*[@class='header' or @class='footer' or @class='up' or @class='toplang']"
    "|//*[@class='bottomlang' or @class='linkList' or @class='nodefooter']"
    "|//*[@id='page-header' or @id='quickview' or @id='footer' or @id='comments_section']"
    "|//*[@id='menu-bar' or @id='sidebar' or @id='copyright' or @id='DonationBlock']"
    "|//*[@id='SearchFrame' or @id='Bookmarks' or @id='BottomLeft' or @id='Contents']"
)
"""XPath of what surrounds the text in the pages of the generators that are met."""


NAVIGATION = re.compile(
    r"^[ \t]*(?:\[ ?<.*\]|(?:Contents|Index|Next|Prev|Previous|Up|Home|Top)\W{0,6}|\* \* \*)"
    r"[ \t]*$",
    re.M,
)
"""Lines of links that no markup tells apart from text."""


def read_bytes(path: Path) -> bytes:
    """A file's bytes, decompressed (dictzip is gzip)."""
    return (
        gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    )


def tidy(text: str) -> str:
    """Without trailing spaces, form feeds, backspaced bold type, lines of links and more than one
    empty line.
    """
    text = re.sub(r".\x08", "", text.replace("\r\n", "\n").replace("\f", "\n").replace("\xa0", " "))
    text = NAVIGATION.sub("", re.sub(r"[ \t]+$", "", text, flags=re.M))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in Latin-1 where it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def read_text(path: Path) -> Iterator[str]:
    """Plain text and lightly marked text, as it is."""
    yield decoded(read_bytes(path))


def read_html(path: Path) -> Iterator[str]:
    """The text of a page, with Markdown's headings and lists."""
    from lxml import html

    data = read_bytes(path)
    if not data.strip():
        return
    page = html.fromstring(data if b"charset" in data[:2000] else decoded(data))
    for element in page.xpath(BOILERPLATE):
        if element.getparent() is not None:
            element.drop_tree()
    yield as_text(html.tostring(page, encoding="unicode"))


def as_text(markup: str) -> str:
    """HTML without tags, lines as long as paragraphs."""
    from html2text import HTML2Text

    writer = HTML2Text(bodywidth=0)
    writer.ignore_links = writer.ignore_images = writer.ignore_emphasis = True
    writer.ignore_tables = True
    return re.sub(r"\\([-+.#()_*`\[\]])", r"\1", writer.handle(markup))


def read_mallard(path: Path) -> Iterator[str]:
    """GNOME's help pages, whose elements are not HTML's."""
    markup = re.sub(r"(?s)<info>.*?</info>|<\?xml.*?\?>|<!--.*?-->", "", decoded(read_bytes(path)))
    for ours, theirs in (("title", "h2"), ("item", "li"), ("steps", "ol"), ("note", "div")):
        markup = re.sub(rf"<(/?){ours}\b[^>]*>", rf"<\1{theirs}>", markup)
    yield as_text(markup)


def read_pod(path: Path) -> Iterator[str]:
    """Perl's documentation without formatting codes; commands stay."""
    text = decoded(read_bytes(path))
    text = re.sub(r"(?ms)^=(begin|for) .*?(^=end .*?$|\n\n)", "", text)
    for _ in range(3):  # codes stand inside of codes
        text = re.sub(r"\b[BICFSXZL]<([^<>|]*)(?:\|[^<>]*)?>", r"\1", text)
    text = re.sub(r"\bC<<+ (.*?) >>+", r"\1", text).replace("E<lt>", "<").replace("E<gt>", ">")
    text = re.sub(r"(?m)^=(head|item|over|back|cut|pod|encoding)\d? ?(\* ?)?", "", text)
    yield text


def read_fortunes(path: Path) -> Iterator[str]:
    """Sayings, parted by an empty line instead of a percent sign."""
    yield re.sub(r"(?m)^%$\n?", "\n", decoded(read_bytes(path)))


def read_story(path: Path) -> Iterator[str]:
    """What is told and said in a campaign: strings marked for translation, in order."""
    for told in re.findall(
        r'(?s)(?:message|story|text|description)\s*=\s*_\s*"((?:[^"]|"")*)"',
        decoded(read_bytes(path)),
    ):
        yield re.sub(r"<[^>]+>", "", told.replace('""', '"'))


def read_sword(path: Path) -> Iterator[str]:
    """Modules of the SWORD project: a zlib stream of OSIS markup for each book or chapter. Their
    places and sizes are in a file whose name ends in ``s`` instead of ``z``.
    """
    data, index = path.read_bytes(), path.with_suffix(path.suffix[:-1] + "s").read_bytes()
    for at, size, _ in struct.iter_unpack("<III", index):
        block = zlib.decompress(data[at : at + size])
        text = re.sub(r"(?s)<note\b.*?</note>|<title type=\"x-gen.*?</title>", "", decoded(block))
        text = re.sub(r"</p>|</div>|<lb ?/>|<milestone[^>]*>|</title>|</verse>|</l>", "\n", text)
        yield re.sub(r"<[^>]+>", "", text.replace("\0", "\n"))


def read_r_strings(path: Path) -> Iterator[str]:
    """Character vectors of an R package's data, a line each: streams of R's serialization format,
    each behind the number of its bytes.
    """
    data = path.read_bytes()
    while len(data) > 4:
        stream = zlib.decompressobj()
        if lines := r_strings(stream.decompress(data[4:])):
            yield "\n".join(lines)
        data = stream.unused_data


def r_strings(data: bytes) -> list[str]:
    """The strings of a serialized character vector; nothing for other objects."""
    vector, string = 16, 9
    (version,) = struct.unpack_from(">i", data, 2)
    at = 14
    if version == 3:
        at += 4 + struct.unpack_from(">i", data, at)[0]
    flags, count = struct.unpack_from(">ii", data, at)
    at += 8
    if flags & 255 != vector:
        return []
    lines = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", data, at)
        assert flags & 255 == string
        at += 8
        lines.append(decoded(data[at : at + max(0, size)]))
        at += max(0, size)
    return lines


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "text": read_text,
    "html": read_html,
    "mallard": read_mallard,
    "pod": read_pod,
    "fortunes": read_fortunes,
    "story": read_story,
    "sword": read_sword,
    "r_strings": read_r_strings,
}
