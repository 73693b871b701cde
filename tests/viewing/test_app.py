"The page of a demonstration, as a visitor finds it: in a browser, with the token and without."

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from urllib.error import HTTPError

import pytest
from browser import PATIENCE, browser
from PIL import Image

from dr2seg_lib.data.mini import draw_sample
from dr2seg_lib.viewing.app import DemoPage, DemoSettings, demo_policy, playground_of

pytest.importorskip("voila")
TOKEN = "a-token-of-the-tests"
CLI = "from dr2seg_lib.cli import main; import sys; sys.exit(main(sys.argv[1:]))"


def command(*words):
    "Starts the command."
    words = [sys.executable, "-c", CLI, "app", *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(words, **pipes, start_new_session=True)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "A page that is served, without its token."
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    server = command("--port", port, "--token", TOKEN)
    assert server.stdout.readline() == f"http://127.0.0.1:{port}/?token={TOKEN}\n"
    until = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/login", timeout=5)
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.3)
    yield f"http://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def status(url, **headers):
    "What is answered, redirections not followed."

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args):
            return None

    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.build_opener(Stay).open(request, timeout=60) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


@pytest.mark.browser
@pytest.mark.parametrize("path", ["/", "/?token=wrong-token-here", "/voila/render/app.ipynb"])
def test_without_the_token_a_visitor_is_sent_to_the_door(address, path):
    code, text = status(address + path)
    assert code in (302, 403) and b"d2-" not in text and b"kernel" not in text


@pytest.mark.browser
def test_without_the_token_there_are_no_kernels_and_no_files(address):
    for path in "/api/kernels", "/api/kernels/x/channels", "/voila/files/app.ipynb":
        assert status(address + path)[0] in (302, 403, 404), path
    assert status(f"{address}/api/kernels", Authorization="token wrong")[0] in (302, 403)


@pytest.mark.browser
def test_a_visitor_uploads_a_picture_and_asks(address, tmp_path):
    sample = draw_sample(2_000_049)
    Image.fromarray(sample.image).save(tmp_path / "mine.png")
    (tmp_path / "text.png").write_text("no picture")
    with browser(1400, 900) as page:
        outside = []
        page.on("request", lambda r: outside.append(r.url) if r.url[:4] == "http" else None)
        page.goto(f"{address}/?token={TOKEN}")
        page.wait_for_selector(".d2-ask")

        def upload(name):
            with page.expect_file_chooser() as chooser:
                page.get_by_text("Your picture").click()
            chooser.value.set_files(tmp_path / name)

        first = page.locator(".d2-ask canvas").count()
        assert first
        upload("text.png")
        page.get_by_text("text.png").wait_for()  # the sentence names the file
        upload("mine.png")
        page.wait_for_function("() => document.querySelector('.d2-ask textarea')?.value === ''")
        page.locator(".d2-ask textarea").first.fill(sample.query)
        page.locator(".d2-ask button.d2-main").click()
        page.wait_for_function(
            "() => document.querySelector('.d2-status')?.textContent.includes('first pass')"
        )
        page.wait_for_function(
            "() => document.querySelectorAll('.d2-steps .d2-said').length >= 2"
            " && !document.querySelector('.d2-wait')"
        )
        description = page.locator(".d2-steps textarea").input_value()
        assert description
        assert not [url for url in outside if not url.startswith(address)]


def test_a_broken_upload_leaves_what_is_there():
    made = playground_of(*demo_policy(DemoSettings()))
    shown = made(2_000_000)
    page = DemoPage(made, shown)
    content = b"\x89PNG\r\n\x1a\n" + b"\x00" * 50
    given = dict(name="<img src=x>.png", type="image/png", size=len(content), content=content)
    page.upload.value = (given | dict(last_modified=datetime.now(UTC)),)
    assert page.playground is shown and "cannot be" in page.problem.value


@pytest.mark.parametrize(
    "words, says",
    [
        (["--token", "short"], "--token needs 8 letters or more"),
        (["--model", "nope"], "model 'nope' is unknown"),
        (["--photo", "nowhere.jpg"], "nowhere.jpg is no picture that can be read"),
        (["--port", "70000"], "invalid value for '--port'"),
    ],
)
def test_a_mistake_is_one_sentence(words, says):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    server = command("--port", port, *words)
    text, _ = server.communicate(timeout=300)
    assert server.returncode == 2 and text.count("\n") == 1 and says in text
