"""Which documents of which Debian packages are taken, and which of them are held out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Documents of one package.

    Attributes:
        package: its name.
        form: how its files are read (``plain.READERS``).
        files: glob patterns below the unpacked package.
        leave_out: regular expression on paths below the package; matching files are not read.
        joined: pages of one folder are pages of one work: short ones become one document.
    """

    package: str
    form: str
    files: tuple[str, ...]
    leave_out: str = ""
    joined: bool = False


def _doc(package: str, form: str, *files: str, leave_out: str = "", joined: bool = True) -> Source:
    return Source(package, form, tuple(f"usr/share/{name}" for name in files), leave_out, joined)


TEST_TITLES = ("NORTHANGER ABBEY", "PERSUASION")
"""Novels of `r-cran-janeaustenr` that are held out."""

TEST = (
    _doc("jargon-text", "text", "doc/jargon-text/jargon.txt.gz"),
    _doc("debian-policy", "text", "doc/debian-policy/policy.txt.gz"),
    _doc("gnucash-docs", "html", "doc/gnucash-docs/gnucash-guide-en/*.html", leave_out="fdl|index"),
    _doc("c++-annotations-html", "html", "doc/c++-annotations/html/*.html"),
)
"""Whole works of other kinds than the novels: a lexicon, rules, a tutorial, a book with code."""

PROSE = r"r-cran|anarchism|sword|wesnoth|fortunes|miscfiles|debian-history"
"""Packages of texts that are no documentation."""

TRAIN = (
    Source(
        "r-cran-janeaustenr",
        "r_strings",
        ("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
    ),
    # Prose: essays, history, sermons, stories, sayings.
    _doc("anarchism", "html", "doc/anarchism/html/*.html"),
    _doc("debian-history", "html", "doc/debian-history/docs/*.en.html"),
    _doc("sword-text-kjv", "sword", "sword/modules/**/*z"),
    _doc("sword-text-web", "sword", "sword/modules/**/*z"),
    _doc("sword-comm-mhcc", "sword", "sword/modules/**/*z"),
    _doc("sword-comm-tdavid", "sword", "sword/modules/**/*z"),
    *(
        _doc(f"wesnoth-1.16-{campaign}", "story", "games/wesnoth/1.16/data/campaigns/**/*.cfg")
        for campaign in ("did dm dw ei httt l low nr sof sota sotbe thot trow tsg utbs".split())
    ),
    _doc("miscfiles", "text", "state/*.gz"),
    _doc("fortunes", "fortunes", "games/fortunes/*", leave_out=r"\.dat$|\.u8$|translate|ascii"),
    _doc("fortunes-min", "fortunes", "games/fortunes/*", leave_out=r"\.dat$|\.u8$"),
    # Dictionaries.
    _doc("dict-gcide", "text", "dictd/gcide.dict.dz"),
    _doc("dict-devil", "text", "dictd/devil.dict.dz"),
    # Games: what they tell and how they are played.
    _doc("crawl-common", "text", "crawl/dat/database/*.txt", "crawl/dat/descript/*.txt"),
    _doc("nethack-common", "text", "doc/nethack-common/Guidebook.txt.gz"),
    _doc("freeciv-data", "text", "doc/freeciv-data/*.gz", leave_out=r"\.[a-z]{2}\.gz$|hangelog"),
    _doc("angband-data", "text", "angband/help/*.txt"),
    # Handbooks of systems and servers.
    _doc("debian-handbook", "html", "doc/debian-handbook/html/en-US/*.html"),
    _doc(
        "debian-reference-en",
        "html",
        "doc/debian-reference-en/docs/*.en.html",
        "debian-ref*/*.en.html",
    ),
    _doc("developers-reference", "html", "developers-reference/*.html", leave_out="search|index"),
    _doc("debian-faq", "html", "doc/debian/FAQ/*.html", "doc/debian-faq/**/*.html"),
    _doc("debian-kernel-handbook", "html", "doc/debian-kernel-handbook/**/*.html"),
    _doc("debmake-doc", "html", "doc/debmake-doc/html/*.en.html"),
    _doc("maint-guide", "html", "doc/maint-guide/html/*.en.html"),
    _doc("harden-doc", "html", "doc/harden-doc/html/en-US/*.html"),
    _doc("installation-guide-amd64", "html", "doc/installation-guide-amd64/en/*.html"),
    _doc("apt-doc", "html", "doc/apt-doc/**/*.html", leave_out=r"\.(?!en)[a-z]{2}(_[A-Z]+)?/"),
    _doc("aptitude-doc-en", "html", "doc/aptitude/html/en/*.html"),
    _doc("apache2-doc", "html", "doc/apache2-doc/manual/en/**/*.html"),
    _doc("exim4-doc-html", "html", "doc/exim4-doc-html/**/*.html", leave_out="filter_toc|_toc"),
    _doc("postfix-doc", "html", "doc/postfix/html/*.html", leave_out=r"\.\d\.html$"),
    _doc("postgresql-doc-15", "html", "doc/postgresql-doc-15/html/*.html"),
    _doc("sqlite3-doc", "html", "doc/sqlite3/**/*.html", leave_out="releaselog|syntax|toc|c3ref"),
    _doc(
        "linux-doc-6.1",
        "text",
        "doc/linux-doc-6.1/Documentation/**/*.rst.gz",
        leave_out="translations",
    ),
    # Languages and their libraries.
    _doc("python3.11-doc", "text", "doc/python3.11/html/_sources/**/*.txt"),
    _doc(
        "perl-doc", "pod", "perl/5.36.0/pod/*.pod", leave_out=r"delta|perltoc|perl(cn|jp|ko|tw)\."
    ),
    _doc("golang-1.19-doc", "html", "doc/golang-1.19-doc/html/*.html", leave_out="go1.17_spec"),
    _doc(
        "rust-doc",
        "html",
        *(
            f"doc/rust-doc/html/{book}/**/*.html"
            for book in (
                "book",
                "reference",
                "nomicon",
                "edition-guide",
                "embedded-book",
                "rust-by-example",
            )
        ),
        leave_out="print.html|toc.html|second-edition|2018-edition|first-edition",
    ),
    _doc("mit-scheme-doc", "html", "doc/mit-scheme-doc/html/**/*.html"),
    _doc("octave-doc", "html", "doc/octave/octave.html/*.html"),
    _doc("maxima-doc", "html", "doc/maxima-doc/html/*.html", leave_out="singlepage|_[a-z]{2}/"),
    _doc("r-doc-html", "html", "R/doc/manual/*.html", leave_out="fullrefman"),
    _doc("nodejs-doc", "text", "doc/nodejs/api/*.md.gz", "doc/nodejs-doc/**/*.md.gz"),
    _doc(
        "python-django-doc",
        "html",
        "doc/python-django-doc/html/**/*.html",
        leave_out="genindex|_modules|search",
    ),
    _doc(
        "python-scrapy-doc",
        "html",
        "doc/python-scrapy-doc/html/**/*.html",
        leave_out="genindex|_modules|search",
    ),
    _doc(
        "python-sqlalchemy-doc",
        "text",
        "doc/python-sqlalchemy-doc/**/*.rst",
        "doc/python-sqlalchemy-doc/**/*.rst.txt",
    ),
    _doc(
        "python-sklearn-doc",
        "text",
        "doc/python-sklearn-doc/html/_sources/**/*.rst.txt",
        leave_out="generated/|whats_new|testimonials",
    ),
    _doc(
        "python-biopython-doc",
        "html",
        "doc/python-biopython-doc/Tutorial.html",
        "doc/**/Tutorial.html",
    ),
    # Tools and programs.
    _doc("git-doc", "text", "doc/git-doc/**/*.txt", leave_out="RelNotes"),
    _doc("vim-runtime", "text", "vim/vim*/doc/*.txt", leave_out="version|todo"),
    _doc("bash-doc", "html", "doc/bash/*.html"),
    _doc("zsh-doc", "html", "doc/zsh-common/html/*.html"),
    _doc("gimp-help-en", "html", "gimp/*/help/en/*.html", "**/help/en/*.html"),
    _doc("libreoffice-help-en-us", "html", "libreoffice/help/en-US/text/**/*.html"),
    _doc("gnome-user-docs", "mallard", "help/C/**/*.page"),
    _doc(
        "lilypond-doc-html",
        "html",
        *(
            f"doc/lilypond/html/Documentation/{book}/*.html"
            for book in ("learning", "notation", "essay", "usage", "extending", "music-glossary")
        ),
        leave_out=r"\.[a-z]{2}\.html$|big-page",
    ),
    _doc("povray-doc", "html", "doc/povray-doc/**/*.html", "doc/povray/**/*.html"),
    _doc("csound-doc", "html", "doc/csound-doc/html/*.html"),
)
