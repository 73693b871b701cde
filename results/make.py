"""Every figure of docs/results.md, made again.

    python results/make.py run [STUDY ...]    the experiments, one by one (hours); resumable
    python results/make.py keep [STUDY ...]   their tables, as results/STUDY.json, and their plots
    python results/make.py write              those tables into the pages
    python results/make.py pack STUDY ...     records of finished runs, as records/STUDY.tar.xz
    python results/make.py unpack STUDY ...   those records as run folders, from which `run` goes on

`make results` does the first three. A study is an experiment of the workbench with its parameters,
and perhaps a plot in docs/; they stand in results/studies.json. Records are what tables are made
of: parameters, metrics and answers to held-out questions, without weights and rollouts.
"""

import json
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

from dr2seg_lib.core.files import read_jsonl
from dr2seg_lib.experiments.sweeps import arm_results, is_done, sweep_arms
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.viewing.comparison_plots import before_after_plot
from dr2seg_lib.viewing.curves import training_curves
from dr2seg_lib.viewing.premise_plot import premise_plot
from dr2seg_lib.viewing.tables import aggregate_seeds, before_after_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RUNS = ROOT / "runs" / "results"
PACKED = HERE / "records"
RECORDS = "run.json", "results.json", "metrics.jsonl", "predictions*.jsonl"
PAGES = ROOT / "docs" / "results.md", ROOT / "docs" / "world.md", ROOT / "README.md"
STUDIES = json.loads((HERE / "studies.json").read_text())
BLOCK = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


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


def sweep_runs(folder: Path) -> dict:  # {arm: [run names]}
    "The runs of a sweep, by its own parameters."
    given = json.loads((folder / "run.json").read_text())["parameters"]
    named = {k: given[k] for k in ("methods", "seeds", "vary") if k in given}
    return {arm: list(runs) for arm, runs in sweep_arms(**named, **given["config"]).items()}


def curves(folder: Path):
    "Entropy, tokens, accuracy and held-out gIoU over the steps of a training, or of each arm."
    if (folder / "metrics.jsonl").exists():
        return training_curves(Run.open(folder).metrics())
    runs = sweep_runs(folder).items()
    return training_curves(
        {a: [Run.open(folder / n).metrics() for n in names] for a, names in runs}
    )


def change(folder: Path):
    "Tokens against gIoU of a sweep's arms, from the start to the end of training."
    arms = arm_results(folder, sweep_runs(folder)).items()
    ends = {a: [r["after"] for r in results] for a, results in arms}
    return before_after_plot(
        {a: dict(before=r[0]["before"], after=aggregate_seeds(ends[a])) for a, r in arms}
    )


def premise(folder: Path):
    "Right answers over the length of the chain."
    return premise_plot(json.loads((folder / "results.json").read_text())["forms"])


PLOTS = dict(curves=curves, change=change, premise=premise)


def tables_of(folder: Path) -> dict:  # {name: Markdown}
    "What an experiment says of itself as tables; of a training, before and after."
    found = json.loads((folder / "results.json").read_text())
    tables = {k: v for k, v in found.items() if isinstance(v, str) and v.startswith("|")}
    if "before" in found and "after" in found:
        rows = (read_jsonl(folder / f"predictions_{when}.jsonl") for when in ("before", "after"))
        tables["table"] = before_after_table(found, *rows).markdown
    return tables


def keep(name: str):
    "A study's tables, with where and by what they were made, and its plots."
    about = record(name)
    if about.get("status") != "done":
        raise SystemExit(f"{name}: its run is {about.get('status', 'not there')}; run it first")
    kept = dict(
        command=shlex.join(words_of(name)),
        processor=processor(),
        day=about["ended"][:10],
        commit=about["git"][:7],
        versions={k: about["versions"][k] for k in ("dr2seg_lib", "torch", "transformers")},
        tables=tables_of(RUNS / name),
    )
    for picture, plot in STUDIES[name].get("plots", {}).items():
        PLOTS[plot](RUNS / name).savefig(ROOT / "docs" / picture, dpi=140, facecolor="white")
    (HERE / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def pack(name: str):
    "Packs the records of a study and of its finished runs."
    folder = RUNS / name
    PACKED.mkdir(exist_ok=True)
    with tarfile.open(PACKED / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for run in [folder, *(p for p in sorted(folder.iterdir()) if p.is_dir() and is_done(p))]:
            for path in sorted(path for kind in RECORDS for path in run.glob(kind)):
                archive.add(path, path.relative_to(RUNS))


def unpack(name: str):
    "Makes run folders of a study's records, where it has none."
    if (RUNS / name).exists():
        raise SystemExit(f"{RUNS / name} exists; delete it, or go on with it: make.py run {name}")
    with tarfile.open(PACKED / f"{name}.tar.xz") as archive:
        archive.extractall(RUNS, filter="data")


def written(page: str) -> str:
    "The page with each of its tables as it is kept."

    def table(match):
        head, study, name, end = match.groups()
        return head + json.loads((HERE / f"{study}.json").read_text())["tables"][name] + "\n" + end

    return BLOCK.sub(table, page)


def main(task: str, *names: str):
    for name in names or STUDIES:
        dict(run=run, keep=keep, write=lambda _: None, pack=pack, unpack=unpack)[task](name)
    for page in PAGES if task == "write" else ():
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
