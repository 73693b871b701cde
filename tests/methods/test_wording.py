"Prompts of a file, and the chat in the form of the peers' trainers and evaluations."

import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import Template
from qwen import QWEN_TEMPLATE

from dr2seg_lib.core.parameters import EvaluateConfig, TrainConfig
from dr2seg_lib.core.settings import TrainedMethod
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.evaluation.evaluate import run_evaluation
from dr2seg_lib.methods.wording import worded_method
from dr2seg_lib.models.chat import chat_messages
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.verify import inherit
from dr2seg_lib.training.config import load_preset
from dr2seg_lib.training.trainer import train
from dr2seg_lib.viewing.run_reader import RunReader
from dr2seg_lib.viewing.word_attention import asked_prompt

QUESTIONS = ["The Cup.", "What's left?", "... which one?!", "Dr. No..", 'say "it"', "a{b}%s"]

# VisionReasoner: verl/utils/rl_dataset.py and vision_reasoner_model.py, from their texts
EXAMPLE = (
    '[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, '
    '{"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]'
)
ASKED = (
    'Please find "{Question}" with bboxs and points.'
    "Compare the difference between object(s) and find the most closely matched object(s)."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the bbox(es) and point(s) inside the interested object(s) in JSON format."
    "i.e., <think> thinking process here </think>"
    "<answer>{Answer}</answer>"
)
# Seg-Zero's evaluation: single quotes, another sentence
SEG_ZERO = (
    "Please find '{question}' with bbox and points."
    "Compare the difference between objects and find the most closely matched one."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the one bbox and points of two largest inscribed circles inside the interested object "
    "in JSON format.i.e., <think> thinking process here </think>"
    "<answer>{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': [35,180]}</answer>"
)


def rendered(messages):
    return Template(QWEN_TEMPLATE).render(messages=messages, add_generation_prompt=True)


def of_the_trainer(question):
    "The prompt of VisionReasoner's loader: its user turn is one text, whose picture is a mark."
    text = "<image>\n" + ASKED.format(Question=question.lower().strip("."), Answer=EXAMPLE)
    system = dict(role="system", content="You are a helpful assistant.")
    chat = rendered([system, dict(role="user", content=text)])
    return chat.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


def of_the_evaluation(question):
    "The prompt of VisionReasoner's model: no system turn, picture and text as two parts."
    text = ASKED.format(Question=question.lower().strip('."?!'), Answer=EXAMPLE)
    return rendered([dict(role="user", content=[dict(type="image"), dict(type="text", text=text)])])


@pytest.mark.parametrize("preset", ["visionreasoner_7k", "visionreasoner_7k_3b"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_chat_is_visionreasoners_byte_for_byte(preset, question):
    config = TrainConfig(**{k: v for k, v in load_preset(preset, steps=1).items() if k != "epochs"})
    method = worded_method(config.method)
    assert rendered(chat_messages(method.prompt(question))) == of_the_trainer(question)
    asked = method.prompt(question, eval=True)
    assert rendered(chat_messages(asked)) == of_the_evaluation(question)


@pytest.mark.parametrize("name", ["seg_zero", "pixelthink", "dpad"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_published_wording_of_the_seg_zero_family(tmp_path, name, question):
    (tmp_path / "seg_zero.txt").write_text(SEG_ZERO + "\n")
    method = worded_method(TrainedMethod(name=name, prompt=str(tmp_path / "seg_zero.txt")))
    want = SEG_ZERO.replace("{question}", question.lower().strip("."))
    assert method.prompt(question) == method.prompt(question, eval=True) == want


def test_the_second_pass_has_the_newline_too():
    method = worded_method(TrainedMethod(name="dr2seg", newline=True))
    plain = worded_method(TrainedMethod(name="dr2seg"))
    assert method.second_prompt("a cup") == "\n" + plain.second_prompt("a cup")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A training by a prompt of its own, whose file has gone since."
    tmp = tmp_path_factory.mktemp("wording")
    file = tmp / "mine.txt"
    file.write_text("look for {question}, then say what you see\n")
    config = TrainConfig(
        method=dict(name="dr2seg", prompt=str(file)),
        steps=2,
        rollout=dict(questions_per_step=2, group_size=2, max_new_tokens=24),
        evaluation=dict(samples=2),
    )
    train(config, tmp / "run")
    file.unlink()
    return tmp / "run"


def test_a_run_keeps_its_prompt(run):
    assert (run / "prompt.txt").read_text() == "look for {question}, then say what you see\n"
    reader = RunReader(run)
    row = next(r for g in reader.groups["rollouts"] for r in g)
    query = row["query"].lower().strip(".")
    assert asked_prompt(reader, row, "first") == f"look for {query}, then say what you see"


def test_a_run_goes_on_with_the_prompt_that_it_keeps(run):
    config = TrainConfig(**Run.open(run).info["parameters"] | dict(steps=3))
    train(config, run, resume=True)
    assert [row["step"] for row in Run.open(run).metrics()] == [1, 2, 3]


def dr2seg(*words):
    program = Path(sys.executable).parent / "dr2seg"
    return subprocess.run(
        [program, "run", "train", *map(str, words)], capture_output=True, text=True
    )


def test_the_command_line_goes_on_too(run):
    "What is checked before a run goes on are its own copies, not the files that were named."
    done = dr2seg("--resume", "--out", run, "-p", "steps", 4)
    assert done.returncode == 0, done.stderr
    assert len(Run.open(run).metrics()) == 4
    anew = dr2seg("-p", "method.prompt", run.parent / "mine.txt")
    assert anew.returncode == 2
    assert "method.prompt" in anew.stderr and "cannot be read" in anew.stderr


def test_an_evaluation_asks_as_the_run_did(run, tmp_path, monkeypatch):
    given = inherit(dict(adapter=str(run / "checkpoints" / "step-000002")))[0]
    assert given["method"]["prompt"] == str(run / "prompt.txt")
    asked, write = [], EvaluateConfig(**given | dict(data=dict(name="mini", samples=2)))
    from dr2seg_lib.models.policy import Policy

    prefill = Policy.prefill

    def listen(self, texts, encoded):
        asked.extend(texts)
        return prefill(self, texts, encoded)

    monkeypatch.setattr(Policy, "prefill", listen)
    run_evaluation(write, tmp_path / "eval")
    want = [s.query.lower().strip('."?!') for s in MiniReasonSeg("val", 2)]
    assert asked == [f"look for {q}, then say what you see" for q in want]
    assert (tmp_path / "eval" / "prompt.txt").is_file()
