"Run folders of a stranger: each viewer makes a page on which nothing runs, or says a sentence."

import ast
import json
import re
from pathlib import Path

import browser
import hostile_runs as hostile
import pytest
from invented_runs import Reader
from jinja2 import UndefinedError

from dr2seg_lib.core.markup import latex_text
from dr2seg_lib.core.notes import cut_note
from dr2seg_lib.core.templates import TEMPLATE_FOLDER, render
from dr2seg_lib.core.text_table import rows_table
from dr2seg_lib.evaluation.published import COLUMN_TITLES, MORE_TITLES
from dr2seg_lib.viewing.compare import compare
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.live import Live
from dr2seg_lib.viewing.paper_tables import format_tables, side_by_side
from dr2seg_lib.viewing.report import write_report
from dr2seg_lib.viewing.responses import response_parts
from dr2seg_lib.viewing.run_reader import RunReader
from dr2seg_lib.viewing.view import view_script

ROOT = Path(__file__).parents[2]
POLICY = render("policy.html.j2")
N = 40
WIDTHS = {len(COLUMN_TITLES) + 1, len(COLUMN_TITLES) + len(MORE_TITLES) + 1}  # bars of a row
SENTENCE = ValueError, FileNotFoundError
PAGES = "report", "inspect", "live", "compare", "html", "markdown", "latex"


def state(view):  # of a widget, as it goes to the browser
    kept = {
        k: v
        for k, v in view.get_state().items()
        if k
        in (
            "kind",
            "about",
            "index",
            "source",
            "at",
            "rollout",
            "shown",
            "state",
            "html",
        )
    }
    return json.loads(json.dumps(kept, allow_nan=False))


def inspected(folder):
    "The first and the last group of each source, with a mask and the still."
    view = inspect(folder)
    for source, groups in view.run.groups.items():
        if groups:
            view.source, view.at = source, len(groups) - 1
    if view.shown:
        view.answer(view.source, view.at, 0)
    assert view.still()._repr_mimebundle_()[0]["image/png"].startswith(b"\x89PNG")
    return state(view)


def watched(folder):
    view = Live(folder, every=60)
    view.close()
    return state(view)


def shown(what, folder, good):
    "What a viewer makes of a folder."
    if what == "report":
        return write_report(folder, cards=1).read_text()
    if what == "inspect":
        return inspected(folder)
    if what == "live":
        return watched(folder)
    if what == "compare":
        return state(compare([folder, good], cards=1))
    return format_tables(side_by_side([folder]), what)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    "{(number of the folder, viewer): page, or the sentence}; any other error ends the test."
    root = tmp_path_factory.mktemp("hostile")
    good, found = hostile.write(root / "good", hostile.training("visionreasoner")), {}
    for i, folder in enumerate(hostile.cases(root, N)):
        for what in PAGES:
            try:
                found[i, what] = shown(what, folder, good)
            except SENTENCE as e:
                found[i, what] = e
    return found


def pages(outcomes, what):
    return {
        i: page
        for (i, w), page in outcomes.items()
        if w == what and not isinstance(page, Exception)
    }


def test_every_outcome_is_a_page_or_one_sentence(outcomes):
    said = [e for e in outcomes.values() if isinstance(e, Exception)]
    assert len(outcomes) == N * len(PAGES)
    assert said
    for e in said:
        text = str(e)
        assert len(text) < 2000, text
        assert re.search(r"does not exist|; |has no figures", text), text


def test_the_report_and_the_views_are_made_of_every_folder(outcomes):
    "What does not fit is left out and named; the page comes all the same."
    for what in "report", "inspect", "live", "compare":
        assert len(pages(outcomes, what)) == N, what
    assert sum("Not shown" in page for page in pages(outcomes, "report").values()) > N // 2


def test_hostile_texts_reach_the_pages(outcomes):
    "The attack is not turned away at the door: a script stands where a name may stand."
    for what in "report", "html", "markdown", "latex":
        assert any(
            "__pwned" in page or r"\_\_pwned" in page for page in pages(outcomes, what).values()
        ), what
    assert any("__pwned" in json.dumps(page) for page in pages(outcomes, "inspect").values())


def test_html_is_whole_and_holds_no_script(outcomes):
    found = [
        *pages(outcomes, "report").values(),
        *pages(outcomes, "html").values(),
        *(p["html"] for p in pages(outcomes, "compare").values()),
    ]
    for html in found:
        page = Reader(html)
        assert not page.open
        assert not {"script", "iframe", "math", "object"} & set(page.tags)
        assert all(
            link.startswith(("data:image/webp;base64,", "data:image/png;base64,", "#"))
            for link in page.links
        )


def test_pages_tell_the_browser_to_run_nothing(outcomes):
    for what in "report", "html":
        for html in pages(outcomes, what).values():
            assert POLICY in html[:400]


# ---- in a browser

FOUND = """() => {
  const every = selector => [...document.querySelectorAll(selector)];
  const leads = a => /^(href|xlink:href|src|srcdoc|action|formaction|data)$/i.test(a.name);
  const acts = a => /^on/i.test(a.name) || (leads(a) && /^\\s*javascript:/i.test(a.value));
  return {
    run: window.__pwned !== undefined || document.title === 'pwned',
    tags: every('body script, iframe, object, embed, math').map(e => e.tagName),
    handlers: every('*').flatMap(e => [...e.attributes].filter(acts).map(a => e.tagName + a.name)),
  };
}"""
NOTHING = dict(run=False, tags=[], handlers=[])


@pytest.fixture(scope="module")
def tab():
    "A page of Chromium that notes every message, error, dialog and request."
    with browser.browser(1000, 800) as page:
        page.noted = []
        page.on("console", lambda m: page.noted.append(m.text) if "pwned" in m.text else None)
        page.on("pageerror", lambda e: page.noted.append(str(e)))
        page.on("dialog", lambda d: (page.noted.append(d.message), d.dismiss()))
        page.on(
            "request",
            lambda r: (
                page.noted.append(r.url)
                if not r.url.startswith(("data:", "about:", "blob:"))
                else None
            ),
        )
        yield page


def load(page, html):
    "Puts a page into the tab without its policy: only escaping keeps a script from running."
    page.goto("about:blank")
    page.noted.clear()
    page.set_content(html.replace(POLICY, ""), wait_until="load")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    page.wait_for_timeout(60)
    return page.evaluate(FOUND), list(page.noted)


@pytest.mark.browser
@pytest.mark.parametrize(
    "raw", [w for w in hostile.WORDS if "<img src=x" in w or w.startswith("<script")]
)
def test_the_watch_sees_a_script_that_runs(tab, raw):
    "The control: what no one escaped is seen."
    found, noted = load(
        tab, f"<!doctype html><title>x</title><body><textarea></textarea><p>{raw}</p>"
    )
    assert found["run"]
    assert any("pwned" in n for n in noted)


@pytest.mark.browser
def test_the_policy_of_the_page_stops_what_would_run(tab):
    "The second wall: with the policy a script in the page does not run."
    tab.goto("about:blank")
    tab.set_content(
        f"<!doctype html><head>{POLICY}</head><body>{hostile.WORDS[0]}{hostile.WORDS[1]}",
        wait_until="load",
    )
    tab.wait_for_timeout(60)
    assert not tab.evaluate(FOUND)["run"]


@pytest.mark.browser
@pytest.mark.parametrize("what", ["report", "html"])
def test_nothing_runs_in_pages(outcomes, tab, what):
    for i, html in pages(outcomes, what).items():
        assert load(tab, html) == (NOTHING, []), f"folder {i}"


@pytest.mark.browser
def test_nothing_runs_in_markdown(outcomes, tab):
    "As nbconvert and JupyterLab render it: a table keeps its shape, and a name is text."
    from nbconvert.filters import markdown2html

    for i, text in pages(outcomes, "markdown").items():
        assert load(tab, f"<!doctype html><body>{markdown2html(text)}") == (NOTHING, []), (
            f"folder {i}"
        )
        assert tab.locator("a:not(.anchor-link), img").count() == 0
        tables = re.findall(r"(?:^\|.*\n?)+", text, re.M)
        rows = [row for table in tables for row in table.splitlines()]
        for table in tables:
            bars = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
            assert len(bars) == 1 and bars <= WIDTHS, table
        assert tab.locator("tr").count() == len(rows) - sum(
            line.startswith("| --- |") for line in text.splitlines()
        )


VIEW = """([source, state]) => {
  document.body.replaceChildren();
  const module = new Function(source.replace('export default', 'return '));
  const nothing = () => {};
  const set = (k, v) => { state[k] = v; };
  const model = {get: k => state[k], set, on: nothing, send: nothing, save_changes: nothing};
  module().render({model, el: document.body});
}"""


@pytest.mark.browser
@pytest.mark.parametrize("what", ["inspect", "live", "compare"])
def test_nothing_runs_in_the_views(outcomes, tab, what):
    "The drawing side itself, given what the kernel would send."
    source = view_script()
    for i, values in pages(outcomes, what).items():
        load(tab, "<!doctype html><title>x</title><body>")
        tab.evaluate(VIEW, [source, values])
        tab.wait_for_timeout(40)
        assert (tab.evaluate(FOUND), tab.noted) == (NOTHING, []), f"folder {i}"
        assert tab.locator(f".d2-{what}").inner_text().strip(), f"folder {i}"


@pytest.mark.browser
def test_nothing_runs_in_jupyterlab(tab, tmp_path):
    "Where scripts of outputs may run: views and tables of three folders in a trusted notebook."
    folders = [f for i, f in enumerate(hostile.cases(tmp_path / "runs", 5)) if i in (0, 1, 4)]
    good = hostile.write(tmp_path / "good", hostile.training("visionreasoner"))
    cells = [
        browser.IMPORTS + "from IPython.display import Markdown\n"
        "from dr2seg_lib.viewing.paper_tables import format_tables, side_by_side"
    ]
    for f in map(str, folders):
        cells += [
            f"inspect({f!r})",
            f"live({f!r})",
            f"compare([{f!r}, {str(good)!r}], cards=1)",
            f"Markdown(format_tables(side_by_side([{f!r}])))",
            f"[*side_by_side([{f!r}]).values()][-1][0]",
        ]
    browser.notebook(tmp_path / "views.ipynb", cells)
    with browser.jupyterlab(tmp_path) as address, tab.context.browser.new_page() as page:
        page.set_default_timeout(browser.PATIENCE)
        noted = []
        page.on("console", lambda m: noted.append(m.text) if "pwned" in m.text else None)
        page.on("dialog", lambda d: (noted.append(d.message), d.dismiss()))
        browser.opened(page, address, "views.ipynb")
        for _ in cells:
            browser.command(page, "notebook:run-cell-and-select-next")
        page.wait_for_function(
            f"() => document.querySelectorAll('.dr2seg').length === {3 * len(folders)}"
        )
        page.wait_for_timeout(1000)
        assert page.locator(".jp-RenderedMarkdown table").count() >= len(folders)
        assert page.locator(".jp-RenderedHTMLCommon table").count() > 0
        assert not page.evaluate("() => window.__pwned !== undefined || document.title === 'pwned'")
        assert not noted
        assert page.evaluate(
            """() => [...document.querySelectorAll('.jp-OutputArea-output *')].every(
              e => [...e.attributes].every(a => !/^on/i.test(a.name)))"""
        )


# ---- the mechanism: no HTML but from templates

MODULES = [*(ROOT / "dr2seg_lib/core").glob("*.py"), *(ROOT / "dr2seg_lib/viewing").glob("*.py")]
TEMPLATES = sorted(TEMPLATE_FOLDER.glob("*.j2"))
SAID = {"think", "answer", "description", "caption", "score"}  # tags of a response: no HTML
PLOTLY = {"b", "br", "extra"}  # plotly's own words for a label, whose texts it escapes itself
MATPLOTLIB = {"svg", "metadata", "!--"}  # what is read in matplotlib's own SVG
OTHER_TAGS = {
    "figures.py": MATPLOTLIB,
    "charts.py": MATPLOTLIB | PLOTLY,
    "marks.py": PLOTLY,
    "axes.py": PLOTLY,
}
TAG = re.compile(r"</?(!--|[a-z!][\w-]*)(?=[\s>/]|$)", re.I)
SVG = "figure_svg", "svg"  # give matplotlib's SVG, the one text that is trusted as it comes


def named(path):
    return path.name


def is_documented(node):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return isinstance(node, kinds) and bool(node.body) and isinstance(node.body[0], ast.Expr)


def functions(tree, *names):  # every function of these names, with all that is in it
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    return {id(inner) for n in found for inner in ast.walk(n)}


def literals(source):  # every text in a module that is no docstring
    tree = ast.parse(source)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if is_documented(n)}
    texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
    return [n for n in texts if isinstance(n.value, str)]


def tags(text):
    return {name.lower() for name in TAG.findall(text)}


def calls(tree, name):
    every = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return [n for n in every if isinstance(n.func, ast.Name) and n.func.id == name]


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_tags_stand_in_templates_alone(module):
    "No text of a module holds a tag of HTML: Python makes data, templates lay it out."
    known = SAID | OTHER_TAGS.get(module.name, set())
    stray = [n.value for n in literals(module.read_text()) if tags(n.value) - known]
    assert not stray


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_markup_is_only_what_templates_made(module):
    "`Markup` takes what a template has rendered, and matplotlib's SVG."
    tree = ast.parse(module.read_text())
    trusted = functions(tree, "render", *SVG)
    assert not [ast.unparse(n) for n in calls(tree, "Markup") if id(n) not in trusted]


def test_the_watch_over_modules_sees_a_tag():
    "The control: what was done before is seen."
    source = 'def card(x):\n    return Markup(f"<p class=raw>{x}</p>")'
    assert [n.value for n in literals(source) if tags(n.value)] == ["<p class=raw>", "</p>"]
    assert len(calls(ast.parse(source), "Markup")) == 1


@pytest.mark.parametrize("template", TEMPLATES, ids=named)
def test_templates_escape_every_value(template):
    text = template.read_text()
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", text)


@pytest.mark.parametrize("template", TEMPLATES, ids=named)
def test_values_stand_in_quotes_inside_a_tag(template):
    "Escaping keeps a value inside quotes; without them a space would begin another attribute."
    text = re.sub(r"{#.*?#}", "", template.read_text(), flags=re.S)
    text = re.sub(r"{%.*?%}", "", text, flags=re.S)
    text = re.sub(r"<(/?){{ tag }}", r"<\1td", text)  # th or td, of the template itself
    for tag in re.findall(r"<[^<>]*>", text):
        assert "{" not in re.sub(r'"[^"]*"', "", tag), tag


def test_a_template_refuses_what_is_missing():
    "A value that nobody gave is an error, not an empty place."
    with pytest.raises(UndefinedError):
        render("example.html.j2", body="")


@pytest.mark.parametrize("word", hostile.WORDS, ids=range(len(hostile.WORDS)))
def test_a_template_keeps_a_hostile_word_as_text(word):
    page = Reader(render("response.html.j2", parts=response_parts(dict(text=word))))
    assert not page.open
    assert set(page.tags) == {"p"}


# ---- what the parts do


def test_a_name_in_markdown_is_one_cell_of_text():
    t = rows_table([dict(arm=w, tokens=1.0) for w in hostile.WORDS], dict(arm="", tokens=".1f"))
    lines = t.markdown.splitlines()
    assert len(lines) == len(hostile.WORDS) + 2
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)
    assert not re.search(r"[<`\[$]", "".join(lines))


def test_a_name_in_latex_is_text():
    for word in hostile.WORDS:
        text = latex_text(word)
        bare = re.sub(r"\\[{}]", "", text)  # an escaped brace needs no other
        assert "\n" not in text
        assert bare.count("{") == bare.count("}")
        assert not re.search(r"(?<!\\)[&%#_]", text)
        assert not re.search(
            r"\\(?!textbackslash|textasciitilde|textasciicircum|textless|textgreater|[&%$#_{}])",
            text.replace(r"$\pm$", ""),
        )


def test_a_string_for_a_number_is_named(tmp_path):
    "The line, the field and the mend; the other lines are shown."
    files = hostile.training()
    files["metrics.jsonl"][1]["reward"] = hostile.WORDS[0]
    files["results.json"]["after"]["gIoU"] = "much"
    hostile.write(tmp_path / "run", files)
    html = write_report(tmp_path / "run", cards=1).read_text()
    assert "metrics.jsonl, line 2: field &#34;reward&#34; is" in html
    assert "make it a number" in html
    assert "results.json: field &#34;after.gIoU&#34; is &#39;much&#39;; make it a number" in html
    assert 'id="training"' in html
    assert "2 of 3 steps" in html
    with pytest.raises(
        ValueError,
        match='results.json: field "after.gIoU" is .much.; make it a number, or leave the run out',
    ):
        side_by_side([tmp_path / "run"])


OBJECTS = (
    "bom",
    "twice",
    "digits",
)  # an object with none of the known fields: it fits, and says nothing


@pytest.mark.parametrize("how", hostile.RAW)
@pytest.mark.parametrize(
    "file", ["run.json", "rollouts.jsonl", "results.json", "metrics.jsonl", "progress.json"]
)
def test_each_file_spoiled_in_each_way(tmp_path, how, file):
    "The inspector names the file, or needs it not; the watcher stays; the tables say a sentence."
    folder = hostile.write(tmp_path / "run", hostile.training())
    hostile.spoil(folder / file, how)
    missing = RunReader(folder).missing
    if file == "rollouts.jsonl" and how != "empty" or file == "run.json" and how not in OBJECTS:
        assert file in missing
    view = watched(folder)
    assert view["state"]["status"] == (
        "waiting"
        if file == "run.json" and how in ("gone", "link")
        else "unreadable"
        if file == "run.json"
        else "done"
    )
    assert (
        file != "run.json"
        or view["state"]["status"] == "waiting"
        or "run.json" in view["state"]["error"]
    )
    if file in ("run.json", "results.json") and how not in OBJECTS:
        with pytest.raises(SENTENCE, match="run") as e:
            side_by_side([folder])
        assert "\n" not in str(e.value)


def test_a_mask_that_is_none_is_said(tmp_path):
    "Run lengths that do not add up, or of a picture of a terabyte, never reach the decoder."
    files = hostile.training()
    files["predictions_after.jsonl"][0]["rle"]["counts"] = "~" * 200
    files["predictions_after.jsonl"][1]["rle"]["size"] = [60_000, 60_000]
    hostile.write(tmp_path / "run", files)
    html = write_report(tmp_path / "run").read_text()
    assert "no mask: sample mini-2000000: rle has counts that do not add up" in html
    assert (
        "predictions_after.jsonl, line 2: field &#34;rle.size&#34; is [60000, 60000]; "
        "make it no more than" in html
    )
    assert (
        inspect(tmp_path / "run")
        .answer("evaluation", 0, 1)["note"]
        .startswith("no mask: sample mini-2000000: rle")
    )


def test_looking_fetches_nothing(tmp_path, monkeypatch):
    "A record may name any data set of the hub: it is not asked for."
    import huggingface_hub

    files = hostile.training()
    files["run.json"]["parameters"]["data"] = "someone/set"
    for r in files["rollouts.jsonl"]:
        r["sample"] = "photo-1"
    folder = hostile.write(tmp_path / "run", files)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked")
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    view = inspect(folder)
    assert "someone/set is not on this disk, and looking fetches nothing" in view.shown["note"]
    assert view.shown["image"] is None
    assert "photo-1" in write_report(folder, cards=1).read_text()


def test_split_and_cut_answers_are_told(tmp_path):
    files = hostile.training()
    files["results.json"]["before"]["cut"], files["results.json"]["after"]["cut"] = 0.031, 0.004
    html = write_report(hostile.write(tmp_path / "run", files), cards=1).read_text()
    assert "<p class=note>The set names no splits: 20 % of it was held out.</p>" in html
    warning, rest = cut_note(dict(cut=0.031)), cut_note(dict(cut=0.004), least=0)
    assert f"<p class=notice>before training: {warning}</p>" in html
    assert f"<p class=note>after training: {rest}</p>" in html
    files = hostile.evaluate()
    html = write_report(hostile.write(tmp_path / "eval", files), cards=1).read_text()
    assert f"<p class=notice>{cut_note(dict(cut=0.02))}</p>" in html
    del files["results.json"]["cut"], files["results.json"]["evaluation"]["split_note"]
    html = write_report(hostile.write(tmp_path / "eval", files), cards=1).read_text()
    assert "cut short" not in html
    assert "held out" not in html
