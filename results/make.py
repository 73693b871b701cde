"""Every figure of docs/results.md, made again.

    python results/make.py run [STUDY ...]    the experiments, one by one (hours); resumable
    python results/make.py keep [STUDY ...]   their tables, as results/STUDY.json
    python results/make.py write              those tables into the page

`make results` does all three. A study is an experiment of the workbench with its parameters; they
stand in results/studies.json.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RUNS = ROOT / "runs" / "results"
PAGE = ROOT / "docs" / "results.md"
STUDIES = json.loads((HERE / "studies.json").read_text())
BLOCK = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def words_of(name: str) -> list[str]:
    "A study's command line, without its folder."
    study = STUDIES[name]
    words = ["dr2seg", "run", study["experiment"]]
    for key, value in study["parameters"].items():
        words += ["-p", key, value if isinstance(value, str) else json.dumps(value)]
    return words


def record(name: str) -> dict:
    "What a study's run says of itself; empty where there is none."
    path = RUNS / name / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run(name: str):
    "Starts a study, or goes on with it; one that has ended well is left alone."
    if record(name).get("status") == "done":
        return print(f"{name}: done")
    program, *words = words_of(name)
    words += ["--out", str(RUNS / name), *(["--resume"] if record(name) else [])]
    print(f"{name}: {shlex.join([program, *words])}", flush=True)
    subprocess.run([str(Path(sys.executable).parent / program), *words], cwd=ROOT, check=True)


def processor() -> str:
    "The name of this machine's processor."
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def keep(name: str):
    "A study's tables, with where and by what they were made."
    about, found = record(name), json.loads((RUNS / name / "results.json").read_text())
    if about.get("status") != "done":
        raise SystemExit(f"{name}: its run is {about.get('status', 'not there')}; run it first")
    kept = dict(
        command=shlex.join(words_of(name)),
        processor=processor(),
        day=about["ended"][:10],
        commit=about["git"][:7],
        versions={k: about["versions"][k] for k in ("dr2seg_lib", "torch", "transformers")},
        tables={k: v for k, v in found.items() if isinstance(v, str) and v.startswith("|")},
    )
    (HERE / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def written(page: str) -> str:
    "The page with each of its tables as it is kept."

    def table(match):
        head, study, name, end = match.groups()
        return head + json.loads((HERE / f"{study}.json").read_text())["tables"][name] + end

    return BLOCK.sub(table, page)


def main(task: str, *names: str):
    for name in names or STUDIES:
        dict(run=run, keep=keep, write=lambda _: None)[task](name)
    if task == "write":
        PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
