"The views as a person uses them: by keys and by eye, in a real JupyterLab in a real browser."

import time

import browser
import pytest
from browser import chromium
from invented_runs import make_run

from dr2seg_lib.runs.annotations import annotate, read_annotations
from dr2seg_lib.viewing.agreement import agreement_rows, disagreements, reviewed_answers
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.run_reader import RunReader

KINDS = "inspect", "live", "compare", "ask"
CELLS = [
    browser.IMPORTS + "import ipywidgets as widgets",
    "w = inspect('one')\nw",
    "live('one')",
    "compare(['one', 'two'], cards=1)",
    "Playground('embedded', 2_000_049)",
    # a user's own controls
    "slider = widgets.IntSlider(min=1, max=12, description='my step')\n"
    "own = widgets.IntSlider(min=0, max=7, description='my answer')\n"
    "label = widgets.Label()\n"
    "def told(change):\n"
    "    row = change.new\n"
    '    label.value = f\'chosen: answer {row["rollout"]} of step {row["step"]}\'\n'
    "widgets.link((slider, 'value'), (w, 'step'))\n"
    "widgets.jslink((own, 'value'), (w, 'rollout'))\n"
    "w.observe(told, 'selected')\n"
    "widgets.VBox([slider, own, label]).add_class('mine')",
    "",  # what a test runs
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A page with the four views, and a user's own controls beside them."
    if not chromium():
        pytest.skip("no Chromium is found")
    folder = tmp_path_factory.mktemp("lab")
    make_run(folder / "one", steps=12, samples=16)
    make_run(folder / "two", steps=12, samples=16, recipe="visionreasoner", seed=1, end=70.0)
    browser.notebook(folder / "views.ipynb", CELLS)
    with browser.jupyterlab(folder) as address, browser.browser() as page:
        page.errors, page.folder = [], folder
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        browser.opened(page, address, "views.ipynb")
        for _ in CELLS[:-1]:
            browser.command(page, "notebook:run-cell-and-select-next")
        page.wait_for_selector(".d2-ask .d2-main")
        page.wait_for_function(
            "() => document.querySelector('.d2-inspect .d2-status').textContent.includes('IoU')"
        )
        yield page


@pytest.fixture
def view(lab):
    "The inspector at its start, its keyboard ready."
    lab.errors.clear()
    view = lab.locator(".d2-inspect")
    view.locator(".d2-filter").fill("")
    view.get_by_label("sort by").select_option("order")
    view.get_by_label("step", exact=True).evaluate(
        "e => { e.value = 0; e.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    waits(lab, "() => document.querySelector('.d2-inspect .d2-meta').innerText.includes('step 1 ')")
    view.locator("h4").first.click()
    return view


def waits(page, script, *values):
    page.wait_for_function(script, arg=list(values))


def until(page, reached, seconds=20):
    "Waits for what no script of the page can see: its accessibility tree, and Python behind it."
    ends = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < ends
        page.wait_for_timeout(200)


def verdict(page, rollout, name):
    "Waits until a card shows a verdict, and no other."
    waits(
        page,
        """([k, v]) => [...document.querySelectorAll(
          `.d2-inspect .d2-card[data-rollout="${k}"] [aria-pressed=true]`)]
          .map(b => b.dataset.verdict).join() === v""",
        rollout,
        name,
    )


def said(page, rollout=None):
    rows = read_annotations(page.folder / "one")
    return rows.get(("rollouts", 1, "mini-1000007", rollout))


# ---- reviewing


@pytest.mark.browser
def test_a_key_marks_an_answer_and_takes_the_mark_back(lab, view):
    lab.keyboard.press("2")
    for key, name in ("w", "wrong"), ("i", "interesting"), ("i", ""), ("r", "right"):
        lab.keyboard.press(key)
        verdict(lab, 1, name)
        assert said(lab, 1)["verdict"] == (name or None)
    card = view.locator('.d2-card[data-rollout="2"]')
    card.get_by_role("button", name="wrong").click()
    verdict(lab, 2, "wrong")
    assert view.locator("button.d2-row .d2-mark").all_inner_texts()[1:3] == ["✓", "✗"]
    assert not lab.errors


@pytest.mark.browser
def test_tags_and_a_note_are_kept_and_found(lab, view):
    "What is typed is text, whatever it is; keys that mean something elsewhere are letters here."
    lab.keyboard.press("t")
    lab.keyboard.type("crowded,r2 ")
    lab.keyboard.press("Enter")
    view.locator(".d2-word").nth(1).wait_for()
    lab.keyboard.press("Escape")
    lab.keyboard.press("n")
    hostile = "<img src=x onerror=alert(1)> 123 w"
    lab.keyboard.type(hostile)
    lab.keyboard.press("Enter")
    waits(lab, "() => document.activeElement.classList.contains('d2-inspect')")
    lab.wait_for_timeout(500)
    assert said(lab) == said(lab) | dict(tags=["crowded", "r2"], note=hostile)
    view.get_by_label("remove the tag r2").click()
    waits(lab, "() => document.querySelectorAll('.d2-inspect .d2-word').length === 1")
    count = view.locator(".d2-count")
    for filter_, found in ("tag=crowded", 1), ("onerror", 1), ("tag=nothing", 0):
        view.locator(".d2-filter").fill(filter_)
        text = "nothing fits" if not found else f"{found} of 8 samples"
        waits(lab, "([t]) => document.querySelector('.d2-count').textContent.startsWith(t)", text)
    view.locator(".d2-filter").fill("verdict=none tag!=crowded")
    assert count.inner_text().startswith("7 of 8 samples")
    assert view.locator("img[src=x]").count() == 0
    assert not lab.errors


@pytest.mark.browser
def test_reviews_of_others_are_there_when_the_run_is_opened_again(lab, view):
    word, note = "<b>hand</b>", "<script>document.title = 'pwned'</script>"
    said = dict(verdict="wrong", tags=[word], note=note)
    annotate(lab.folder / "one", "rollouts", 1, "mini-1000007", 7, **said)
    again = inspect(lab.folder / "one")
    assert again.reviews["rollouts"]["0/7"]["tags"] == [word]
    lab.keyboard.press("4")
    lab.keyboard.press("r")  # writing reads, too
    verdict(lab, 7, "wrong")
    shown = view.locator('.d2-card[data-rollout="7"] .d2-own').inner_text()
    assert word in shown
    assert note in shown
    assert lab.title() != "pwned"
    assert not lab.errors


@pytest.mark.browser
def test_the_view_says_how_far_the_reward_agrees(lab, view):
    "The numbers are those of the file, and a button leads to the answers that disagree."
    run = RunReader(lab.folder / "one")
    rows = {row["judge"]: row for row in agreement_rows(reviewed_answers(run))}
    contrary = disagreements(run, "accuracy")
    expected = f"{rows['reward']['agree']} of {rows['reward']['n']}"
    waits(
        lab,
        "([t]) => document.querySelector('.d2-agree summary').textContent.endsWith(t)",
        expected,
    )
    if not view.locator(".d2-agree").get_attribute("open"):
        view.locator(".d2-agree summary").click()
    text = view.locator(".d2-agree tbody").inner_text()
    assert rows["accuracy"]["share"] in text
    assert contrary, "the invented verdicts contradict the invented rewards somewhere"
    view.get_by_role("button", name="accuracy ≥ 1.5 disagrees").click()
    assert view.locator(".d2-filter").input_value() == "disagrees=accuracy"
    pale = "e => [...e].filter(c => !c.classList.contains('d2-dim')).map(c => +c.dataset.rollout)"
    left = view.locator(".d2-card").evaluate_all(pale)
    assert left == sorted(answer["number"] for answer in contrary)
    assert not lab.errors


@pytest.mark.browser
def test_what_cannot_be_kept_is_said(lab, view):
    path = lab.folder / "one/annotations.jsonl"
    aside = path.rename(path.with_name("aside.jsonl"))
    path.mkdir()
    try:
        lab.keyboard.press("1")
        lab.keyboard.press("w")
        waits(lab, "() => document.querySelector('.d2-why').textContent.startsWith('Not kept')")
        text = view.locator(".d2-why").inner_text()
        assert "annotations.jsonl is no plain file; remove it" in text
    finally:
        path.rmdir()
        aside.rename(path)
    lab.keyboard.press("w")
    verdict(lab, 0, "wrong")
    assert view.locator(".d2-why").is_hidden()


# ---- traits


def runs(page, code):
    "Runs the last cell with some code."
    page.evaluate(
        """([code]) => {
          const notebook = window.jupyterapp.shell.currentWidget.content;
          notebook.activeCellIndex = notebook.widgets.length - 1;
          notebook.activeCell.model.sharedModel.setSource(code);
        }""",
        [code],
    )
    browser.command(page, "notebook:run-cell")


@pytest.mark.browser
def test_a_slider_of_the_users_own_leads_the_inspector_and_follows_it(lab, view):
    mine = lab.locator(".mine")
    step = mine.get_by_role("slider").first
    step.focus()
    lab.keyboard.press("End")
    waits(lab, "() => document.querySelector('.d2-inspect .d2-meta').innerText.includes('step 12')")
    mine.get_by_text("of step 12").wait_for()
    view.locator("h4").first.click()
    lab.keyboard.press("ArrowLeft")
    waits(lab, "() => document.querySelector('.d2-inspect .d2-meta').innerText.includes('step 7')")
    assert float(step.get_attribute("aria-valuenow")) == 7
    mine.get_by_text("of step 7").wait_for()
    own = mine.get_by_role("slider").nth(1)  # linked in the browser
    lab.keyboard.press("5")
    mine.get_by_text("chosen: answer 4 of step 7").wait_for()
    assert float(own.get_attribute("aria-valuenow")) == 4
    own.focus()
    lab.keyboard.press("ArrowRight")
    waits(lab, "() => document.querySelector('.d2-inspect .d2-card.d2-on').dataset.rollout == '5'")
    mine.get_by_text("chosen: answer 5 of step 7").wait_for()
    assert not lab.errors


@pytest.mark.browser
def test_python_leads_filter_order_and_layers(lab, view):
    "And hears of them when they are changed by hand."
    runs(
        lab,
        "w.filter = 'accuracy>=3'\nw.sort, w.descending = 'reward', True\n"
        "w.layers = w.layers | dict(truth=False)\nw.step = 12",
    )
    waits(lab, "() => document.querySelector('.d2-inspect .d2-sort select').value === 'reward'")
    assert view.locator(".d2-filter").input_value() == "accuracy>=3"
    assert view.locator(".d2-flip").inner_text() == "↓"
    assert view.locator(".d2-truth").get_attribute("aria-pressed") == "false"
    view.locator("h4").first.click()
    lab.keyboard.press("g")
    view.get_by_label("sort by").select_option("order")
    view.locator(".d2-filter").fill("")
    code = "print(w.layers['truth'], w.sort, repr(w.filter), type(w.iou).__name__, w.sample)"

    def heard():
        runs(lab, code)
        return lab.get_by_text("True order '' float mini-").is_visible()

    until(lab, heard)
    assert not lab.errors


# ---- help and accessibility


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_the_question_mark_lists_the_keys(lab, kind):
    "Escape closes; the focus stays within and comes back."
    view = lab.locator(f".d2-{kind}")
    view.scroll_into_view_if_needed()
    before = view.get_by_role("button").first
    before.focus()
    lab.keyboard.press("?")
    box = view.locator("dialog")
    box.wait_for(state="visible")
    assert box.locator("dt").count() >= 3
    inside = "() => !!document.activeElement.closest('dialog')"
    for key in ["Tab"] * 4 + ["Shift+Tab"] * 3 + ["ArrowRight", "r"]:
        lab.keyboard.press(key)
        assert lab.evaluate(inside), key
    lab.keyboard.press("Escape")
    box.wait_for(state="hidden")
    assert before.evaluate("e => e === document.activeElement")
    view.get_by_label("keys of this view").click()
    box.wait_for(state="visible")
    box.get_by_role("button", name="Close").click()
    box.wait_for(state="hidden")


CONTROLS = "button slider combobox textbox searchbox checkbox link switch spinbutton img".split()
LEAST = dict(inspect=30, live=1, compare=1, ask=8)  # controls of a view


def controls_of(client, kind):
    "Role and name of a view's controls, as the browser's accessibility tree has them now."
    root = client.send("DOM.getDocument")["root"]["nodeId"]
    at = client.send("DOM.querySelector", dict(nodeId=root, selector=f".d2-{kind}"))["nodeId"]
    return [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in client.send("Accessibility.queryAXTree", dict(nodeId=at))["nodes"]
        if not node["ignored"] and node["role"]["value"].lower() in CONTROLS
    ]


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_every_control_has_a_name_for_a_screen_reader(lab, kind):
    lab.locator(f".d2-{kind}").scroll_into_view_if_needed()
    client = lab.context.new_cdp_session(lab)
    client.send("DOM.enable")
    until(lab, lambda: len(controls_of(client, kind)) >= LEAST[kind])
    controls = controls_of(client, kind)
    assert len(controls) >= LEAST[kind]
    assert [role for role, name in controls if not name.strip()] == []
    client.detach()


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_stands_out_from_its_ground(lab, kind, dark):
    "4.5 to 1, computed from the styles of every text that is seen, the pale ones of a filter too."
    browser.theme(lab, dark)
    lab.locator(".d2-inspect .d2-filter").fill("accuracy>=3")
    lab.wait_for_timeout(300)
    found = lab.evaluate(CONTRAST, f".d2-{kind}")
    assert len(found) >= dict(inspect=50, live=5, compare=20, ask=10)[kind]
    weak = {(f["text"], f["name"], round(f["ratio"], 2)) for f in found if f["ratio"] < 4.5}
    assert not weak


CONTRAST = """selector => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { // any colour of CSS
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [R, G, B]) =>
    [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const light = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  function ground(e) { // the colours behind it, one over the other
    const behind = [];
    for (let at = e; at; at = at.parentElement)
      behind.unshift(getComputedStyle(at).backgroundColor);
    return behind.map(rgba).reduce((below, c) => over(c, below), [255, 255, 255, 1]);
  }
  const opacity = e => e ? +getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
  const found = [], root = document.querySelector(selector);
  const seen = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true})
    && !e.closest('svg, .js-plotly-plot, [disabled], .d2-zoom');
  const tell = (e, text, colour) => {
    const below = ground(e), own = rgba(colour);
    own[3] *= opacity(e);
    const pair = [light(over(own, below)), light(below)].sort((a, b) => b - a);
    const ratio = (pair[0] + .05) / (pair[1] + .05);
    found.push({text: text.slice(0, 30), name: e.className || e.tagName, ratio});
  };
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
    if (text && seen(e)) tell(e, text, getComputedStyle(e).color);
  }
  for (const e of root.querySelectorAll('input[placeholder], textarea[placeholder]'))
    if (seen(e)) { const s = getComputedStyle(e, '::placeholder');
      const [r, g, b, a] = rgba(s.color);
      tell(e, e.placeholder, `rgb(${r} ${g} ${b} / ${a * s.opacity})`); }
  return found;
}"""


@pytest.mark.browser
@pytest.mark.parametrize("kind", KINDS)
def test_the_focus_is_seen(lab, kind):
    "Each control that Tab comes to has a ring of two pixels, or its view's border turns."
    view = lab.locator(f".d2-{kind}")
    view.evaluate("e => e.focus()")
    kinds = set()
    for _ in range(14):
        lab.keyboard.press("Tab")
        ring = lab.evaluate(
            """selector => {
              const e = document.activeElement, s = getComputedStyle(e);
              if (!e.closest(selector) || e.closest('.js-plotly-plot')) return null;
              return [e.tagName, s.outlineStyle, parseFloat(s.outlineWidth)];
            }""",
            f".d2-{kind}",
        )
        if ring:
            assert ring[1:] == ["solid", 2], ring
            kinds.add(ring[0])
    assert kinds
