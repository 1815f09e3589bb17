"""The picture of decode steps."""

from PIL import Image

from benchmarks import picture


def test_panels_are_numbers_of_requests_with_several_contexts():
    def row(cell, **times):
        return {"cell": cell} | times

    rows = [
        row("24 x 2k", sparse=2.0),
        row("24 x 1k", stock=1.0),
        row("6 x 1k", hf_eager=9.0),
        row("6 x 2k", hf_eager="out of memory"),
    ]
    ((title, group),) = picture.panels_of(rows)
    assert title == "24 requests" and [(r["requests"], r["context"]) for r in group] == [
        (24, 1024),
        (24, 2048),
    ]
    ((title, group),) = picture.panels_of(rows[1:])
    assert title == "" and [r["cell"] for r in group] == ["24 x 1k", "6 x 1k"]


def test_a_picture_shows_every_engine_that_was_timed(tmp_path):
    times = {key: 2.0 + place for place, key in enumerate(picture.STYLES)}
    rows = [
        {"cell": f"2 x {n}k", "stock_limit": 1.5, "sparse_limit": 1.0, **times} for n in (1, 32)
    ]
    rows.append(
        {
            "cell": "2 x 128k",
            "stock_limit": 1.6,
            "sparse_limit": 1.1,
            **times,
            "hf_eager": "out of memory",
        }
    )
    picture.draw_steps(rows, "T", tmp_path / "a.png", {"Source": "here"})
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.info["Source"] == "here" and drawn.width > drawn.height > 300
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert {tuple(bytes.fromhex(colour[1:])) for _, colour, _ in picture.STYLES.values()} <= colours
