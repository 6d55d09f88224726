"""The README's pictures: python docs/pictures.py (or make pictures), after make quickstart.

ratios.svg is a chart of docs/measured.csv. quickstart.png is the head of quickstart/report.html, as a headless Chromium shows it;
without one on the path (chromium, chromium-browser, google-chrome) it stays as it is, and that is told.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MOST_BYTES = 150_000
WIDTH, BAR, GAP, LEFT, RIGHT, TOP = 860, 20, 16, 330, 190, 58
SCALE = 4.0  # the right end of the chart, times as fast


def chart(rows: list[dict[str, str]]) -> str:
    """Horizontal bars as SVG: how many times as fast ours is; a line at 1, where nothing would be won."""
    height = TOP + len(rows) * (BAR + GAP) + 24
    unit = (WIDTH - LEFT - RIGHT) / SCALE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="16" y="26" font-size="16" font-weight="bold" fill="#1f2430">Measured: times as fast as ...</text>',
        '<text x="16" y="44" fill="#667085">on two CPU cores; docs/measured.csv names machine and command of every bar</text>',
    ]
    for number, row in enumerate(rows):
        y, ratio = TOP + number * (BAR + GAP), float(row["times_as_fast"])
        what, against = escape(row["what"]), escape(f"against {row['against']}; {row['machine'].split(', ')[-1]}")
        parts += [
            f'<text x="{LEFT - 12}" y="{y + 10}" text-anchor="end" fill="#1f2430">{what}</text>',
            f'<text x="{LEFT - 12}" y="{y + 25}" text-anchor="end" font-size="11" fill="#667085">{against}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{ratio * unit:.1f}" height="{BAR}" rx="3" fill="#2f6f8f"/>',
            f'<text x="{LEFT + ratio * unit + 8:.1f}" y="{y + 15}" font-weight="bold" fill="#1f2430">{ratio:g}x</text>',
        ]
    bottom = TOP + len(rows) * (BAR + GAP)
    parts.append(f'<line x1="{LEFT + unit}" x2="{LEFT + unit}" y1="{TOP - 6}" y2="{bottom}" stroke="#c2410c" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{LEFT + unit}" y="{bottom + 14}" text-anchor="middle" font-size="11" fill="#c2410c">1x</text></svg>')
    return "\n".join(parts) + "\n"


def screenshot(page: Path, picture: Path, browser: str, width: int = 1000, height: int = 1180) -> None:
    """The top of an HTML page as a PNG of at most 256 colours."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "page.png")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        command = [browser, *flags, f"--window-size={width},{height}", f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        for colours in (256, 128, 64, 32):
            Image.open(shot).convert("RGB").quantize(colours).save(picture, optimize=True)
            if picture.stat().st_size <= MOST_BYTES:
                return
    raise RuntimeError(f"{picture} has {picture.stat().st_size} bytes, at most {MOST_BYTES} are wanted; take less of the page")


def main() -> int:
    IMAGES.mkdir(exist_ok=True)
    with (ROOT / "docs/measured.csv").open(encoding="utf-8") as file:
        (IMAGES / "ratios.svg").write_text(chart(list(csv.DictReader(file))), encoding="utf-8")
    print(f"written: {IMAGES / 'ratios.svg'}")
    page, browser = ROOT / "quickstart/report.html", next(filter(None, map(shutil.which, BROWSERS)), None)
    if not page.exists() or browser is None:
        mend = "make quickstart writes it" if not page.exists() else "install chromium"
        print(f"quickstart.png stays as it is: no {'quickstart/report.html' if not page.exists() else 'browser'}; {mend}", file=sys.stderr)
        return 1
    screenshot(page, IMAGES / "quickstart.png", browser)
    print(f"written: {IMAGES / 'quickstart.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
