"""A real JupyterLab in a real browser, for the tests and for the pictures of the documentation.

python tests/browser.py RUN [OTHER] [--to docs]     the pictures
python tests/browser.py RUN --animation             docs/inspector.gif
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
PATIENCE = 120_000  # milliseconds: a busy machine is no failure
NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"


def chromium() -> str | None:
    "Where a Chromium is; None where there is none."
    return next((path for path in map(shutil.which, NAMES) if path), None)


def notebook(path: Path, cells: list[str]):
    "A notebook of these cells, not yet run."
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
    )
    nbformat.write(nb, path)


@contextmanager
def jupyterlab(folder: Path):
    "A server on a free port that serves a folder; gives its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = Path(folder) / ".jupyter"
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DR2SEG_WATCHED": "1",
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_CONFIG_DIR": str(own),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
    }
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.expose_app_in_browser=True",
    ]
    quiet = own / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text(
        json.dumps(dict(fetchNews="false", checkForUpdates=False))
    )
    log = open(Path(folder) / "jupyter.log", "w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log
    )
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > until:
                    ending = Path(log.name).read_text()[-2000:]
                    raise RuntimeError(f"JupyterLab did not start: {ending}") from None
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@contextmanager
def browser(width=1440, height=1000):
    "A page of a headless Chromium."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        with play.chromium.launch(
            executable_path=chromium(),
            timeout=PATIENCE,
            args=["--no-sandbox", "--force-color-profile=srgb"],
        ) as app:
            page = app.new_page(viewport=dict(width=width, height=height), device_scale_factor=2)
            page.set_default_timeout(PATIENCE)
            yield page


def command(page, name: str, args: dict | None = None, wait: bool = True):
    "Runs a command of JupyterLab and waits for it: that of a cell is over when the cell is."
    page.evaluate(
        """([name, args, wait]) => {
            const done = window.jupyterapp.commands.execute(name, args);
            return wait ? done.then(() => {}) : null;
        }""",
        [name, args or {}, wait],
    )


def opened(page, address: str, name: str):
    "Opens a notebook, alone in the window, its kernel ready."
    page.goto(f"{address}/lab/tree/{name}")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.evaluate("() => window.jupyterapp.restored")
    if page.locator("#jp-left-stack:visible").count():
        command(page, "application:toggle-left-area")
    page.wait_for_function(
        """() => {
            const panel = window.jupyterapp.shell.currentWidget;
            return panel?.sessionContext?.session?.kernel?.status === 'idle';
        }"""
    )


def theme(page, dark: bool):
    "JupyterLab's dark theme or its light one."
    command(
        page, "apputils:change-theme", dict(theme="JupyterLab Dark" if dark else "JupyterLab Light")
    )
    page.wait_for_selector(
        f'body[data-jp-theme-light="{"false" if dark else "true"}"]', state="attached"
    )
    page.wait_for_timeout(400)


def shown(canvas):
    "What a canvas holds: [H,W,4] uint8."
    import base64
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(
        Image.open(
            io.BytesIO(base64.b64decode(canvas.evaluate("c => c.toDataURL()").split(",")[1]))
        )
    )


def pixels(page, selector: str):
    "What the first canvas of a selector holds: [H,W,4] uint8."
    return shown(page.locator(selector).first)


def plain_page(notebook: Path, to: Path):
    "A notebook as HTML, as nbconvert makes it."
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter().from_filename(str(notebook))
    to.write_text(html)


IMPORTS = """\
from dr2seg_lib.viewing.compare import compare
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.live import live
from dr2seg_lib.viewing.playground import Playground
"""
VIEWS = dict(
    inspector="w = inspect('{run}')\nw.at = {at}\nw",
    live="live('{run}')",
    compare="compare(['{run}', '{other}'], cards=1)",
    ask="a = Playground('{model}', 2_000_020)\na",
)


def telling(run: Path) -> int:
    "The number of the group whose rewards differ most, of those whose lengths do too."
    import numpy as np

    from dr2seg_lib.viewing.run_reader import RunReader

    groups = RunReader(run).groups["rollouts"]

    def spread(g):
        return np.std([r["reward"] for r in g]) * np.std(
            [min(r["first"]["think_tokens"], 100) for r in g]
        )

    return max(range(len(groups)), key=lambda i: spread(groups[i])) if groups else 0


def small(path: Path, width: int = 1100):
    "A screenshot no wider than a page shows it."
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS).save(
        path, optimize=True
    )


def whole(page, view, path: Path):
    "All of a view; it grows by the pictures that come into sight."
    for _ in range(3):
        page.set_viewport_size(dict(width=1240, height=int(view.bounding_box()["height"]) + 200))
        view.scroll_into_view_if_needed()
        page.wait_for_timeout(400)
    page.mouse.move(0, 0)  # nothing is pointed at
    page.wait_for_timeout(400)
    view.screenshot(path=path)
    small(path)


def looking(page, name: str):
    "Holds the word of a view's reasoning that looks hardest at the picture, of the first rollout."
    words = page.locator(f".d2-{name} [data-pass=first]").first.locator(".heat i")
    words.last.click()
    page.wait_for_function(
        "() => document.querySelector('.d2-inspect .d2-status').textContent.includes('attention')"
    )
    shares = []
    for i in range(words.count()):
        words.nth(i).hover()
        page.wait_for_timeout(60)
        said = re.search(r"(\d+) % of", page.locator(f".d2-{name} .d2-status").inner_text())
        shares.append(int(said[1]) if said else 0)
    words.nth(max(range(len(shares)), key=shares.__getitem__)).click()
    page.locator(f".d2-{name} .d2-right").first.evaluate("e => { e.scrollTop = 0 }")
    page.wait_for_timeout(300)


def report_pictures(page, run: Path, folder: Path, to: Path):
    "The top of the report, and in it the group with the least rewards."
    from dr2seg_lib.viewing.report import write_report

    page.goto(write_report(run, folder / "report.html").as_uri())
    page.set_viewport_size(dict(width=1180, height=1125))
    page.evaluate("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    page.add_style_tag(
        content=".bar-of-layers { position: static !important }"
    )  # it would stand in the picture
    for dark in (False, True):
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.wait_for_timeout(400)
        page.evaluate("scrollTo(0, 0)")
        names = [f"{n}{'-dark' if dark else ''}.png" for n in ("report", "report-rollouts")]
        page.screenshot(path=to / names[0])
        page.locator("#rollouts article").nth(1).screenshot(path=to / names[1])
        for n in names:
            small(to / n)


class Film:
    "Pictures of a view, each with the seconds that it stays."

    def __init__(self, page, view):
        self.page, self.view, self.shots = page, view, []

    def shot(self, seconds: float):
        self.page.wait_for_timeout(250)
        self.shots.append((self.view.screenshot(), seconds))

    def says(self, text: str):
        self.page.wait_for_function(
            "t => document.querySelector('.d2-inspect .d2-status').textContent.includes(t)",
            arg=text,
        )


def film_looking(film: Film):
    "Other answers, other steps, and where the model looks."
    page, view = film.page, film.view
    film.shot(0.8)
    for key in "234":  # answers
        page.keyboard.press(key)
        film.says("IoU")
        film.shot(0.5)
    for _ in range(3):  # steps
        page.keyboard.press("ArrowRight")
        film.says("IoU")
        film.shot(0.4)
    words = view.locator("[data-pass=first]").first.locator(".heat i")
    words.first.hover()
    film.says("attention")
    for i in range(max(words.count() - 8, 0), words.count()):
        words.nth(i).hover()
        film.shot(0.3)
    view.locator("h4").first.hover()
    film.says("IoU")


def film_reviewing(film: Film):
    "Verdicts, and the filter that finds them."
    for answer, verdict in ("1", "wrong"), ("2", "interesting"), ("3", "right"):
        film.page.keyboard.press(answer)
        film.page.keyboard.press(verdict[0])
        film.view.locator(f".d2-mark.d2-v-{verdict}").first.wait_for()
        film.shot(0.6)
    film.view.locator(".d2-filter").press_sequentially("verdict=right", delay=20)
    film.shot(1.4)


def common_palette(pages: list):
    "256 colours for all pages: most for what there is much of, some for what is rare and bright."
    from PIL import Image

    width, height = pages[0].size
    every = Image.new("RGB", (width, height * len(pages)))
    for k, page in enumerate(pages):
        every.paste(page, (0, k * height))
    none, how = Image.Dither.NONE, Image.Quantize
    common = every.quantize(176, method=how.MEDIANCUT, dither=none).getpalette()[: 3 * 176]
    rare = every.quantize(80, method=how.MAXCOVERAGE, dither=none).getpalette()[: 3 * 80]
    palette = Image.new("P", (1, 1))
    palette.putpalette(common + rare)
    return palette


def save_gif(shots: list, to: Path, width: int):
    "Pictures with their seconds, as one that moves."
    import io

    from PIL import Image

    images = [Image.open(io.BytesIO(data)).convert("RGB") for data, _ in shots]
    sizes = [(width, round(i.height * width / i.width)) for i in images]
    sheet, pages = Image.new("RGB", (width, max(h for _, h in sizes)), "white"), []
    for image, size in zip(images, sizes):
        pages.append(sheet.copy())
        pages[-1].paste(image.resize(size, Image.Resampling.LANCZOS))
    palette = common_palette(pages)
    first, *others = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pages]
    durations = [round(1000 * seconds) for _, seconds in shots]
    first.save(to, save_all=True, append_images=others, duration=durations, loop=0, optimize=True)


def animation(run: Path, to: Path, width: int = 760):
    "The inspector at work, as a GIF of ten seconds at most. The run is copied: it gets reviews."
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / run.name
        shutil.copytree(run, copy)
        (copy / "annotations.jsonl").unlink(missing_ok=True)
        cell = f"w = inspect('{copy}')\nw.at = {telling(run)}\nw"
        notebook(Path(folder) / "view.ipynb", [IMPORTS, cell])
        with jupyterlab(folder) as address, browser(1100, 1000) as page:
            opened(page, address, "view.ipynb")
            command(page, "notebook:run-all-cells")
            film = Film(page, page.locator(".d2-inspect"))
            film.view.locator("h4").first.click()
            film_looking(film)
            film_reviewing(film)
    save_gif(film.shots, to, width)


def pictures(run: Path, other: Path | None, to: Path):
    "Each view and the report in light and dark, as PNG files; the inspector with a word held, too."
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        views = {
            k: v.format(
                run=run,
                other=other,
                at=telling(run),
                model="embedded" if not (run / "checkpoints").exists() else run,
            )
            for k, v in VIEWS.items()
            if other or k != "compare"
        }
        notebook(Path(folder) / "views.ipynb", [IMPORTS, *views.values()])
        with jupyterlab(folder) as address, browser(1240) as page:
            opened(page, address, "views.ipynb")
            command(page, "notebook:run-all-cells")
            page.locator(".d2-ask .d2-main").click()
            page.wait_for_selector(".d2-ask [data-pass=second]:visible")
            page.wait_for_function(
                "() => document.querySelector('.d2-inspect .d2-status').textContent.includes('IoU')"
            )
            for dark in (False, True):
                theme(page, dark)
                for name in views:
                    whole(
                        page,
                        page.locator(f".d2-{name.removesuffix('or')}").first,
                        to / f"{name}{'-dark' if dark else ''}.png",
                    )
            theme(page, False)
            looking(page, "inspect")
            whole(page, page.locator(".d2-inspect").first, to / "look.png")
            report_pictures(page, run, Path(folder), to)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--animation", action="store_true", help="inspector.gif alone")
    parser.add_argument("--to", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if not chromium():
        sys.exit("no Chromium is found; install one: apt-get install -y chromium")
    args.to.mkdir(parents=True, exist_ok=True)
    if args.animation:
        animation(args.run.resolve(), args.to / "inspector.gif")
    else:
        pictures(args.run.resolve(), args.other and args.other.resolve(), args.to)
